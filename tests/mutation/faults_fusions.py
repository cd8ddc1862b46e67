"""Mistakes in the passes that rewrite layers, and in the operators that they leave there."""

from __future__ import annotations

from mutant import Fault, Group

_FUSIONS = ("tests/passes/test_fusions.py",)
_MLP = ("tests/passes/test_fuse_mlp.py", *_FUSIONS)

GROUPS = (
    Group(
        "fuse_rms_norm",
        "passes/fuse_norm.py",
        _FUSIONS,
        (
            Fault("wrong eps", 'found["weight"], found["eps"]', 'found["weight"], 1e-4'),
            Fault(
                "a norm that stays wide is rounded",
                "    if dtype_of(normed) != dtype_of(x):\n        return None\n",
                "",
            ),
            Fault(
                "a norm computed in half precision becomes one in float32",
                "    if any(dtype_of(node) != torch.float32 for node in found.nodes",
                "    if any(dtype_of(node) is None for node in found.nodes",
            ),
        ),
    ),
    Group(
        "fuse_rms_norm",
        "passes/kernels.py",
        _FUSIONS,
        (
            Fault("the mean is over the tokens", "x, x.shape[-1:], None", "x, x.shape[-2:], None"),
            Fault("nothing is added to the mean", "None, eps)", "None, 0.0)"),
            Fault(
                "rounding comes behind the weight",
                "F.rms_norm(x, x.shape[-1:]",
                "F.rms_norm(x.float(), x.shape[-1:]",
            ),
            Fault("the cast to float32 is missing", "wide = x.float()", "wide = x"),
            Fault("elsewhere over the tokens", "wide.pow(2).mean(-1,", "wide.pow(2).mean(-2,"),
            Fault(
                "elsewhere rounding comes behind the weight",
                "keepdim=True) + eps)).to(x.dtype)",
                "keepdim=True) + eps))",
            ),
            Fault(
                "double precision is kept", 'x.device.type == "cpu" and x.dtype', "True or x.dtype"
            ),
        ),
    ),
    Group(
        "fuse_add_norm",
        "passes/fuse_norm.py",
        _FUSIONS,
        (
            Fault(
                "the sum is taken for the norm",
                "total.replace_all_uses_with(sums)",
                "total.replace_all_uses_with(normed)",
            ),
            Fault(
                "a sum of another layer is taken",
                " or not inside(total, layer):\n        return None\n    if not context.wants",
                ":\n        return None\n    if not context.wants",
            ),
            Fault(
                "a sum that is written in place is taken",
                "return None if written & {x, y, total, norm, *norm.all_input_nodes} else total",
                "return total",
            ),
            Fault(
                "a norm whose weight is computed behind the sum is taken",
                "if any(place[s] > place[total] for s in norm.all_input_nodes):",
                "if not norm.all_input_nodes:",
            ),
            Fault(
                "a norm with keywords loses them",
                "if len(norm.args) != _ARGUMENTS[str(name_of(norm))] or norm.kwargs or",
                "if",
            ),
            Fault(
                "it runs on families that gain nothing",
                'if not context.wants("fuse_add_norm", context.layers[layer]):',
                "if layer not in context.layers:",
                (
                    "tests/engine/test_engine_surroundings.py::"
                    "test_fusions_without_a_recorded_gain_are_made_where_they_are_asked_for",
                    "tests/golden/test_golden.py",
                ),
            ),
        ),
    ),
    Group(
        "fuse_add_norm",
        "passes/kernels.py",
        _FUSIONS,
        (
            Fault(
                "the bias of the norm is dropped",
                "F.layer_norm(total, shape, weight, bias, eps)",
                "F.layer_norm(total, shape, weight, None, eps)",
            ),
            Fault(
                "the sum handed out is one summand",
                "    return total, rms_norm(total, weight, eps)",
                "    return x, rms_norm(total, weight, eps)",
            ),
        ),
    ),
    Group(
        "concat_qkv",
        "passes/concat.py",
        _FUSIONS,
        (
            Fault(
                "weights are stacked in the wrong order",
                'weight = call(graph, "concat_rows", *weights, path=path)',
                'weight = call(graph, "concat_rows", *weights[::-1], path=path)',
            ),
            Fault(
                "biases are dropped",
                "bias = None if biases[0] is None else",
                "bias = None if biases else",
            ),
            Fault(
                "projections of different inputs are joined",
                'if match["x"] is not first["x"]:',
                'if match["x"] is None:',
            ),
            Fault(
                "projections with and without bias are joined",
                'if (match["bias"] is None) != (first["bias"] is None):',
                'if (match["bias"] is None) != (match["bias"] is None):',
            ),
            Fault(
                "values that are written in place are joined",
                "next((m for m in found if reads_written(m, written)), None)",
                "next((m for m in found if not m), None)",
            ),
            Fault(
                "weights that depend on tokens are joined",
                "if weight is not None and place[weight] > place[early]:",
                "if weight is not None and place[weight] < 0:",
            ),
            Fault(
                "weights of different dtypes are joined",
                'if dtype_of(match["weight"]) != dtype_of(first["weight"]):',
                'if dtype_of(match["weight"]) is None:',
                (),
                "a linear whose weight has another dtype than its input does not run at all, and "
                "linears that are joined read one input, so their weights are of its dtype",
            ),
            Fault(
                "an adapter's product of weights is taken for the projection",
                'return next((match for match in found if match["x"] not in fixed), found[0])',
                "return found[0]",
                (*_FUSIONS, "tests/passes/test_fold_lora.py"),
            ),
        ),
    ),
    Group(
        "concat_gate_up",
        "passes/concat.py",
        _FUSIONS,
        (
            Fault(
                "gate and up swap places",
                'return _join_roles(graph, context, ("gate", "up"))',
                'return _join_roles(graph, context, ("up", "gate"))',
                _MLP,
            ),
        ),
    ),
    Group(
        "concat_gate_up",
        "passes/kernels.py",
        _FUSIONS,
        (
            Fault(
                "the last weight comes first",
                "torch.cat(weights, 0)",
                "torch.cat(weights[::-1], 0)",
            ),
        ),
    ),
    Group(
        "fuse_mlp",
        "passes/fuse_mlp.py",
        _MLP,
        (
            Fault(
                "the tanh form of GELU becomes the exact one", 'return "gelu_tanh"', 'return "gelu"'
            ),
            Fault(
                "a write between the linears of an MLP is overlooked",
                "        if written & {node, *node.all_input_nodes}:\n",
                "        if written & {node}:\n",
            ),
            Fault(
                "a write between gate and up is overlooked",
                "_written(written, gate, up)",
                "_written(written)",
            ),
            Fault(
                "an MLP whose inner values others use is taken",
                "alone = safe_to_replace(match)",
                "alone = True",
            ),
            Fault(
                "halves that others use are taken",
                "inner = {*found.nodes, parts, gate, up}",
                "inner = {*graph.nodes}",
            ),
            Fault(
                "uneven parts are taken for halves",
                "len(sizes) == 2 and sizes[0] == sizes[1]",
                "len(sizes) == 2",
            ),
            Fault(
                "gate and up are taken in either order",
                "up.args != (parts, 1) or gate.args[1] != 0:",
                "up.args[0] is not parts:",
            ),
            Fault(
                "the bias of the up projection is dropped",
                'return call(graph, "plain_mlp", x, weight, bias, *down',
                'return call(graph, "plain_mlp", x, weight, None, *down',
            ),
            Fault(
                "an up projection that others use is computed twice",
                "if any(user not in inner for user in up.users):",
                "if not up.users:",
            ),
        ),
    ),
    Group(
        "fuse_mlp",
        "passes/kernels.py",
        _MLP,
        (
            Fault(
                "gate and up are swapped",
                "gate, up = packed_linear(x, gate_up",
                "up, gate = packed_linear(x, gate_up",
            ),
            Fault(
                "the bias of the down projection is dropped",
                "(activate(packed_linear(x, up, up_bias), kind), down, down_bias)",
                "(activate(packed_linear(x, up, up_bias), kind), down, None)",
            ),
            Fault(
                "the exact GELU stands for its tanh form",
                'F.gelu(x, approximate="tanh")',
                "F.gelu(x)",
            ),
        ),
    ),
    Group(
        "shard_tp",
        "passes/shard_tp.py",
        ("tests/runtime/test_tensor_parallel.py::test_ranks_together_give_the_models_tokens",),
        (
            Fault(
                "the parts of a sum stay apart",
                'total = call(graph, "all_reduce", part, fresh_input(graph, "group"), path=path)',
                "total = part",
            ),
            Fault(
                "each rank adds the whole bias before the sum",
                'call(graph, "linear", local, columns, None, path=path)',
                'call(graph, "linear", local, columns, *bias[:1], path=path)',
            ),
            Fault(
                "a low-rank branch is cut in the middle, and what it reads stands whole",
                "sorted(linears, key=lambda node: -spared[node])",
                "linears",
                (
                    "tests/runtime/test_tensor_parallel.py"
                    "::test_adapters_are_cut_with_what_they_adapt",
                ),
            ),
        ),
    ),
    Group(
        "shard_tp",
        "passes/slicing.py",
        ("tests/passes/test_slicing.py",),
        (
            Fault(
                "every rank takes the share of the first",
                "share(cut.length, cut.unit, self.rank, self.size)",
                "share(cut.length, cut.unit, 0, self.size)",
            ),
            Fault(
                "the bias is not cut with its weight",
                "bias = [Part(b, rows) if isinstance(b, fx.Node) else b for b in rest]",
                "bias = rest",
            ),
            Fault(
                "a mean over what is cut is taken for one over what is whole",
                "    if cut.axis >= len(_sizes(node)) - 1:\n        return None\n    x, *rest =",
                "    x, *rest =",
            ),
            Fault(
                "what is written in place is computed again from what it was",
                "if rule is None or part.of in self._written or not is_pure(part.of):",
                "if rule is None or not is_pure(part.of):",
                ("tests/passes/test_shard_claims.py",),
            ),
            Fault(
                "what is drawn is drawn again on each rank",
                "if rule is None or part.of in self._written or not is_pure(part.of):",
                "if rule is None or part.of in self._written:",
                ("tests/passes/test_shard_claims.py",),
            ),
            Fault(
                "a cut of joined heads goes through the middle of one",
                "        if cut.unit % inside:\n            return None\n",
                "",
            ),
            Fault(
                "a range is cut as if it began at the first place",
                "return Part(source, replace(cut, start=cut.start + start))\n\n\ndef _piece",
                "return Part(source, cut)\n\n\ndef _piece",
            ),
            Fault(
                "a piece is cut as if it were the first",
                "return Part(x, replace(cut, start=cut.start + start))",
                "return Part(x, cut)",
            ),
        ),
    ),
    Group(
        "shard_tp",
        "passes/collectives.py",
        ("tests/runtime/test_tensor_parallel.py::test_ranks_together_give_the_models_tokens",),
        (
            Fault(
                "more ranks than heads: the later ones have none",
                "return start * unit, max(start + 1, units * (rank + 1) // size) * unit",
                "return start * unit, units * (rank + 1) // size * unit",
            ),
            Fault(
                "places that fill up a rank's share are taken for places of the whole",
                "part[..., :width] for part, width",
                "part for part, width",
                ("tests/runtime/test_tensor_parallel.py",),
            ),
        ),
    ),
)
