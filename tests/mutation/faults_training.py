"""Mistakes in the training graph: its passes, what runs it, and the proof that it is right."""

from __future__ import annotations

from mutant import Fault, Group

_PASSES = ("tests/passes/test_thread_masks.py",)
_LIMITS = "tests/engine/test_train_graph_limits.py"
_CALLS = ("tests/engine/test_train_graph.py::test_every_way_to_call_gives_the_modules_step",)

GROUPS = (
    Group(
        "thread_masks",
        "passes/thread_masks.py",
        _PASSES,
        (
            Fault(
                "window and dropout are dropped on the way",
                "                *options,\n",
                "                *options[:1],\n",
            ),
        ),
    ),
    Group(
        "keep_selected_tokens",
        "passes/last_tokens.py",
        _PASSES,
        (
            Fault(
                "it keeps tokens as generation does",
                'return _keep(graph, "select_tokens")',
                'return _keep(graph, "last_tokens")',
            ),
        ),
    ),
    Group(
        "attention",
        "passes/attention.py",
        _PASSES,
        (
            Fault(
                "an implementation is handed the values for keys",
                "return implementation(query, key, value, mask,",
                "return implementation(query, value, key, mask,",
            ),
        ),
    ),
    Group(
        "random numbers",
        "passes/graph.py",
        _PASSES,
        (
            Fault(
                "dropout without a flag is taken for one that is off",
                '(2, "training", True)',
                '(2, "training", False)',
            ),
            Fault(
                "what draws random numbers may be moved",
                "or name in EFFECTS or draws(node):",
                "or name in EFFECTS:",
            ),
        ),
    ),
    Group(
        "canonicalize",
        "passes/canonicalize.py",
        _PASSES,
        (
            Fault(
                "the row of padding is trained",
                "if rule in _WITHOUT_BACKWARD and training:",
                "if rule in _WITHOUT_BACKWARD and not training:",
            ),
        ),
    ),
    Group(
        "training graphs",
        "hybrid_fx/engine/training_graphs.py",
        (f"{_LIMITS}::test_a_graph_that_computes_something_else_is_found_and_never_serves",),
        (
            Fault(
                "a graph that is wrong serves all the same",
                '        if proof.difference:\n            return f"its graph',
                '        if not proof.settled:\n            return f"its graph',
            ),
            Fault(
                "structures that the model gave up are kept",
                "                    del self._structures[other]",
                "                    pass",
                (f"{_LIMITS}::test_what_the_model_gives_up_is_not_kept_for_it",),
            ),
        ),
    ),
    Group(
        "training graphs",
        "hybrid_fx/engine/training_proof.py",
        (f"{_LIMITS}::test_a_graph_that_computes_something_else_is_found_and_never_serves",),
        (
            Fault(
                "the random state is not compared",
                "if not torch.equal(mine.state, theirs.state):",
                "if mine.state.shape != theirs.state.shape:",
            ),
            Fault(
                "gradients are not compared",
                "if wanted and target.requires_grad:",
                "if not wanted and target.requires_grad:",
            ),
            Fault(
                "gradients are taken of the parameters themselves",
                "value = told.get(name, tensor).detach()",
                "value = told.get(name, tensor)",
                (
                    f"{_LIMITS}::test_a_proof_leaves_gradients_hooks_on_parameters_and_random_"
                    "state_alone",
                ),
            ),
        ),
    ),
    Group(
        "training graphs",
        "hybrid_fx/runtime/training.py",
        _CALLS,
        (
            Fault(
                "positions are looked at beside a cache",
                "position_ids if self.packing and not cached else None",
                "position_ids if self.packing else None",
            ),
            Fault(
                "layers are not computed again under checkpointing",
                "function.__globals__[name] = by_checkpoint(function, checkpoint)",
                "function.__globals__[name] = function",
                (f"{_LIMITS}::test_gradient_checkpointing_is_honoured",),
            ),
        ),
    ),
)
