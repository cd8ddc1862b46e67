"""Mistakes in the passes that stage a graph: gather, hoist, workspace, last tokens."""

from __future__ import annotations

from mutant import Fault, Group

_HOIST = ("tests/passes/test_hoist.py",)
_THREAD_KV = ("tests/passes/test_thread_kv.py",)
_LAST_TOKENS = ("tests/passes/test_last_tokens.py",)
_SESSIONS = ("tests/runtime/test_sessions.py",)

GROUPS = (
    Group(
        "gather_weights",
        "passes/gather.py",
        ("tests/passes/test_gather_weights.py",),
        (
            Fault(
                "the weight is read beside its gather", "if user is not whole:", "if user is whole:"
            ),
            Fault(
                "a second run puts a second gather",
                'if any(name_of(user) == "gather" for user in node.users):',
                'if any(name_of(user) == "" for user in node.users):',
            ),
        ),
    ),
    Group(
        "stream_gathers",
        "passes/stream.py",
        ("tests/passes/test_stream_gathers.py",),
        (
            Fault(
                "a buffer, which may be written, is gathered with the weights",
                'if _weight_of(node).meta.get("parameter")]',
                "if _weight_of(node).meta]",
            ),
            Fault(
                "a weight that two layers read is gathered in one of them",
                "if readers and all(inside(n, layer) for n in (*derived, *readers)):",
                "if readers and any(inside(n, layer) for n in (*derived, *readers)):",
            ),
            Fault(
                "what is made of a weight is left in front of its gather",
                "    for node in stage.early:\n        stage.first.prepend(node)\n",
                "",
            ),
            Fault(
                "a layer is handed the weights of another order",
                '_named(graph, name, "getitem", whole, index,',
                '_named(graph, name, "getitem", whole, -1 - index,',
                ("tests/runtime/test_streamed_plans.py",),
            ),
            Fault(
                "the next gather is issued when the layer has computed",
                "            with graph.inserting_after(last):\n",
                "            with graph.inserting_before(graph.output_node()):\n",
                ("tests/runtime/test_streamed_plans.py",),
            ),
            Fault(
                "layers gather in the order of their names",
                "return sorted(found, key=lambda stage: place[stage.first])",
                "return sorted(found, key=lambda stage: stage.layer, reverse=True)",
            ),
        ),
    ),
    Group(
        "hoist",
        "passes/hoist.py",
        _HOIST,
        (
            Fault(
                "prepared tensors are handed over in the wrong order",
                "prepare.output(tuple(copies[node] for node in crossing))",
                "prepare.output(tuple(copies[node] for node in reversed(crossing)))",
            ),
            Fault(
                "what has memory of its own is taken for a view",
                'return node.op != "placeholder"',
                "return False",
            ),
            Fault(
                "a cast is taken for a view",
                "if not isinstance(source, fx.Node) or dtype_of(node) != dtype_of(source):",
                "if not isinstance(source, fx.Node):",
            ),
            Fault(
                "two prepared tensors have one name",
                "    while name in taken:\n",
                "    while not name:\n",
            ),
        ),
    ),
    Group(
        "hoist",
        "passes/binding.py",
        _HOIST,
        (
            Fault(
                "what reads a written buffer moves to prepare",
                "    touched = written_memory(graph)\n",
                "    touched: set[fx.Node] = set()\n",
            ),
            Fault(
                "what has an effect moves to prepare",
                'elif node.op == "call_function" and is_pure(node) and node not in touched:',
                'elif node.op == "call_function" and node not in touched:',
            ),
            Fault(
                "values that are no tensors cross into the body",
                "or (node.all_input_nodes and isinstance(value_of(node), torch.Tensor))",
                "or node.all_input_nodes",
            ),
        ),
    ),
    Group(
        "thread_kv_prefill",
        "passes/thread_kv.py",
        (*_THREAD_KV, *_SESSIONS),
        (
            Fault(
                "keys and values are swapped",
                "                key,\n                value,\n",
                "                value,\n                key,\n",
            ),
            Fault("all layers write one memory", 'f"keys_{index}")', '"keys_0")'),
            Fault(
                "the window is lost",
                "                window,\n                softcap,",
                "                0,\n                softcap,",
            ),
            Fault(
                "the softcap is lost",
                "                softcap,\n                sinks,",
                "                0.0,\n                sinks,",
            ),
            Fault(
                "sinks are lost",
                "                sinks,\n                path",
                "                None,\n                path",
            ),
            Fault(
                "attention with dropout is threaded", "        if dropout:\n", "        if sinks:\n"
            ),
        ),
    ),
    Group(
        "thread_kv_decode",
        "passes/thread_kv.py",
        (*_THREAD_KV, *_SESSIONS),
        (
            Fault(
                "the scale of one layer serves all",
                "query, key, value, scale = node.args[:4]",
                "query, key, value, scale = (*node.args[:3], 1.0)",
            ),
            Fault(
                "a decode threads the prefill's operator",
                'return _thread(graph, "attend_one")',
                'return _thread(graph, "attend")',
            ),
        ),
    ),
    Group(
        "keep_last_tokens",
        "passes/last_tokens.py",
        _LAST_TOKENS,
        (
            Fault(
                "a slice of the tokens is taken for one of the vocabulary",
                "return wide and plain and all(part in whole for part in lead) and len(tail) <= 1",
                "return wide and plain and len(tail) <= 1",
            ),
            Fault(
                "an operand with one value a token is sliced past",
                "return all(shape is not None and len(shape) <= wide for shape in shapes)",
                "return True",
            ),
            Fault(
                "logits that others read are cut short",
                "while isinstance(node, fx.Node) and len(node.users) == 1:",
                "while isinstance(node, fx.Node):",
            ),
            Fault(
                "any operation may stand behind the projection",
                "if name_of(node) not in _POINTWISE or not",
                "if not",
            ),
        ),
    ),
    Group(
        "keep_last_tokens",
        "passes/kernels.py",
        _LAST_TOKENS,
        (
            Fault("the first tokens are kept", "x[:, x.shape[1] - keep :]", "x[:, :keep]"),
            Fault(
                "the tokens before the last are kept",
                "x[:, x.shape[1] - keep :]",
                "x[:, x.shape[1] - keep - 1 : x.shape[1] - 1]",
            ),
        ),
    ),
    Group(
        "take_embeds",
        "passes/take_embeds.py",
        ("tests/passes/test_take_embeds.py",),
        (
            Fault(
                "the embeddings stand for one lookup of several",
                "    return leaving[0]\n",
                "    return lookups[0]\n",
            ),
            Fault(
                "ids that are read elsewhere count for nothing",
                "if len(leaving) != 1 or astray:",
                "if len(leaving) != 1:",
            ),
            Fault(
                "lookups that share no module are replaced",
                "    if not owner or any(",
                "    if any(",
            ),
        ),
    ),
    Group(
        "take_embeds",
        "passes/kernels.py",
        ("tests/passes/test_take_embeds.py",),
        (
            Fault(
                "the ids count though embeddings are given",
                "return computed if embeds is None else embeds",
                "return computed if embeds is None else computed + 0 * embeds",
            ),
        ),
    ),
    Group(
        "thread_masks",
        "passes/thread_masks.py",
        ("tests/passes/test_thread_masks.py",),
        (
            Fault(
                "attention with a window gets the mask of attention without",
                "mask = fresh_input(graph, MASKS[windowed])",
                "mask = fresh_input(graph, MASKS[0])",
            ),
            Fault(
                "all attentions share one implementation",
                'f"implementations_{index}")',
                '"implementations_0")',
            ),
            Fault(
                "keys and values are swapped in training",
                "                key,\n                value,\n                mask,",
                "                value,\n                key,\n                mask,",
            ),
        ),
    ),
    Group(
        "keep_selected_tokens",
        "passes/kernels.py",
        _LAST_TOKENS,
        (
            Fault(
                "the first tokens are left out and not the last kept",
                "slice(-keep, None) if isinstance(keep, int)",
                "slice(keep, None) if isinstance(keep, int)",
            ),
        ),
    ),
)
