"""Mistakes in folding adapters."""

from __future__ import annotations

from mutant import Fault, Group

_FOLD = ("tests/passes/test_fold_lora.py",)
_LAW = ("tests/laws/test_lora_fold.py",)

GROUPS = (
    Group(
        "fold_lora",
        "passes/fold_lora.py",
        _FOLD,
        (
            Fault("the scale is lost", 'step.get("scale", 1.0))]', "1.0)]"),
            Fault(
                "a branch without a scale gets one of two",
                'step.get("scale", 1.0))]',
                'step.get("scale", 2.0))]',
            ),
            Fault(
                "the factors are swapped",
                '(step["a"], step["b"], step',
                '(step["b"], step["a"], step',
            ),
            Fault(
                "what is to stay a branch is folded",
                "if site_of(path_of(root)) in context.side:",
                "if site_of(path_of(root)) is None:",
            ),
            Fault(
                "the bias of the base is dropped",
                'return call(graph, "linear", end["x"], folded, end["bias"], path=path)',
                'return call(graph, "linear", end["x"], folded, None, path=path)',
            ),
            Fault(
                "the bias under DoRA is dropped",
                'return call(graph, "linear", found["x"], folded, found["bias"], path=path)',
                'return call(graph, "linear", found["x"], folded, None, path=path)',
            ),
            Fault(
                "a branch on another input is folded",
                'if step["x"] is not end["x"] and end["x"] not in step.nodes:',
                'if step["x"] is None:',
            ),
            Fault(
                "factors that depend on tokens are folded",
                "if step[name] not in fixed:",
                "if step[name] is None:",
            ),
            Fault(
                "a base that depends on tokens is folded into",
                'if end["weight"] not in fixed:',
                'if end["weight"] is None:',
            ),
            Fault(
                "a sum of another dtype is folded",
                "    if dtype_of(root) != dtype_of(end.root):",
                "    if dtype_of(root) is None:",
            ),
            Fault(
                "a base that others read is folded",
                "if any(user not in whole.nodes for node in end.nodes for user in node.users):",
                "if not end.nodes:",
            ),
            Fault(
                "a write between base and branch is overlooked",
                "if any(reads_written(part, written) for part in (end, *found)):",
                "if not found:",
            ),
            Fault(
                "a write within DoRA is overlooked",
                "    if reads_written(found, written) or not",
                "    if not",
            ),
            Fault(
                "an embedding's table is not turned back",
                'call(graph, "contiguous", call(graph, "t", folded, path=path), path=path)',
                'call(graph, "contiguous", folded, path=path)',
            ),
            Fault(
                "the second factor of an embedding is turned, and the first is not",
                'deltas[::3] = [call(graph, "t", a, path=path) for a in deltas[::3]]',
                'deltas[1::3] = [call(graph, "t", b, path=path) for b in deltas[1::3]]',
            ),
            Fault(
                "a branch of factors in the linear itself is not told of",
                'if name == "lora_right_weight":',
                'if name == "":',
            ),
            Fault(
                "DoRA on another base is folded",
                'if not found or found["base_again"] is not found["base"]:',
                "if not found:",
            ),
            Fault(
                "DoRA whose magnitude depends on tokens is folded",
                "if any(piece not in fixed for piece in pieces) or not safe_to_replace(found):",
                "if not safe_to_replace(found):",
            ),
        ),
    ),
    Group(
        "fold_lora",
        "passes/folding.py",
        ("tests/passes/test_folding.py",),
        (
            Fault(
                "the scale is not applied",
                "beta=min(number, 1), alpha=scale)",
                "beta=min(number, 1))",
            ),
            Fault("only the last adapter counts", "beta=min(number, 1)", "beta=0"),
            Fault("what the memory held is added", "beta=min(number, 1)", "beta=1"),
            Fault(
                "each adapter is rounded by itself",
                "beta=min(number, 1), alpha=scale)",
                "beta=min(number, 1), alpha=scale).copy_(change.to(weight.dtype))",
            ),
            Fault(
                "the sum is rounded in the weight's dtype",
                "        torch.add(base, change, out=total)",
                "        torch.add(base, change.to(weight.dtype), out=total)",
            ),
            Fault(
                "pieces take the factors of the first one",
                "change.addmm_(left[here], right",
                "change.addmm_(left[: part.shape[0]], right",
            ),
            Fault(
                "a transposed weight is folded with factors as they are",
                "pairs = [(a.t(), b.t(), scale) for b, a, scale in pairs]",
                "pairs = [(b, a, scale) for b, a, scale in pairs]",
            ),
            Fault(
                "a transposed fold is not turned back",
                "return folded.t(), error",
                "return folded, error",
            ),
            Fault(
                "a weight is folded across its memory",
                "if weight.stride(0) >= weight.stride(1):",
                "if weight.stride(0) >= 0:",
            ),
            Fault(
                "DoRA's magnitude scales columns where the weight is transposed",
                "factor = None if factor is None else factor.t()",
                "factor = None if factor is None else factor.t().roll(1, 1)",
            ),
            Fault(
                "DoRA's change leaves the lengths of rows out",
                "change.mul_(factor[here]).addcmul_(base, factor[here] - 1)",
                "change.mul_(factor[here])",
            ),
            Fault(
                "the error of a fold is not relative",
                "torch.where(change > 0, total / change, torch.zeros_like(total))",
                "torch.where(change > 0, total, torch.zeros_like(total))",
            ),
            Fault(
                "no change is not a number",
                "torch.where(change > 0, total / change, torch.zeros_like(total))",
                "total / change",
            ),
            Fault(
                "what rounding takes is seen on the sum in float32",
                "total.copy_(result).sub_(base).sub_(change)",
                "total.sub_(result)",
            ),
            Fault(
                "the last piece alone is measured",
                "lost.append(torch.linalg.vector_norm(total, dim=1))",
                "lost[:] = [torch.linalg.vector_norm(total, dim=1)]",
            ),
            Fault(
                "a float64 weight is folded in float32",
                "return torch.promote_types(dtype, torch.float32)",
                "return torch.float32",
            ),
            Fault(
                "a fold cuts gradients off",
                "return torch.is_grad_enabled() and",
                "return torch.is_inference_mode_enabled() and",
            ),
            Fault(
                "the stated memory of a fold leaves copies out",
                "return _COPIES * _held",
                "return _held",
            ),
            Fault(
                "a fold takes memory of its own where it is given some",
                "folded = empty(weight.shape, weight.dtype, weight.device)",
                "folded = torch.empty_like(weight)",
            ),
        ),
    ),
    Group(
        "fold_lora",
        "hybrid_fx/plan/prepare.py",
        _LAW,
        (
            Fault(
                "the stated error is the folded weight",
                'enumerate(("folded", "error"))',
                'enumerate(("folded", "error"), -1)',
            ),
            Fault(
                "a prepare stores no errors",
                '{"prepared": results, "errors": errors}',
                '{"prepared": results, "errors": []}',
            ),
        ),
    ),
    Group(
        "fold_lora",
        "hybrid_fx/plan/build.py",
        _LAW,
        (
            Fault(
                "places that stay branches are not told to the pass",
                "context = Context(layers=layers, side=side,",
                "context = Context(layers=layers,",
            ),
        ),
    ),
    Group(
        "scratch",
        "hybrid_fx/runtime/scratch.py",
        ("tests/runtime/test_scratch.py",),
        (
            Fault("memory that is held is given again", "if is_alone(block)", "if True"),
            Fault("no memory is given again", "blocks.append(block)", "pass"),
            Fault("memory is not forgotten", "self._blocks = {}\n", "pass\n"),
        ),
    ),
    Group(
        "scratch",
        "hybrid_fx/runtime/runner.py",
        ("tests/runtime/test_scratch.py",),
        (
            Fault("what a prepare used stays", "self._scratch.release()", "pass"),
            Fault("each fold takes fresh memory", "empty=self._scratch.empty", ""),
        ),
    ),
    Group(
        "fold_lora",
        "hybrid_fx/cache/adapters.py",
        ("tests/laws/test_lora_chat.py::test_every_state_of_the_layers_is_followed",),
        (
            Fault(
                "the scaling of factors in the linear itself is no state",
                "    if has_factors:\n        numbers += [",
                "    if not has_factors:\n        numbers += [",
            ),
        ),
    ),
    Group(
        "fold_lora",
        "hybrid_fx/engine/sides.py",
        _LAW,
        (
            Fault("auto folds whatever rounding takes", "FOLD_LIMIT = 0.05", "FOLD_LIMIT = 5.0"),
            Fault(
                "what folded once is folded for ever",
                "stays = not side_of(measured)",
                "stays = not side_of({})",
            ),
            Fault(
                "a branch is not measured again",
                "return bool(self.errors) and not self._side",
                "return bool(self.errors)",
            ),
            Fault(
                "the stated errors are those of the first weights",
                "measured = self.runner.errors",
                "measured = self.errors",
            ),
            Fault(
                "a fold does not measure itself",
                "self._make(plan, measures=self._auto)",
                "self._make(plan, measures=False)",
            ),
        ),
    ),
    Group(
        "fold_lora",
        "hybrid_fx/engine/graphs.py",
        _LAW,
        (
            Fault(
                "a fold is measured twice",
                "folds = self._sides.all_folded and not prove",
                "folds = False",
            ),
        ),
    ),
    Group(
        "fold_lora",
        "hybrid_fx/plan/choice.py",
        (
            "tests/laws/test_lora_tokens.py::test_adapters_beside_the_weights_give_the_tokens_of_peft",
        ),
        (
            Fault(
                'lora="side" folds all the same',
                '["fold_lora"] if config.lora == "side" else []',
                '["fold_lora"] if config.lora == "" else []',
            ),
        ),
    ),
    Group(
        "adapters of a call",
        "hybrid_fx/generate/routes.py",
        ("tests/laws/test_lora_base_model.py",),
        (
            Fault(
                "an adapter that is not active decides the route",
                "active_adapters(r.model) if kept else ()",
                "kept",
            ),
            Fault(
                "nothing is asked of adapters",
                "active_adapters(r.model) if kept else ()",
                "()",
            ),
        ),
    ),
)
