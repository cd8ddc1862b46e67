"""Mistakes about weights that lie elsewhere, wrappers, and positions that end."""

from __future__ import annotations

from mutant import Fault, Group

_LEFT = "tests/laws/test_models_left_as_they_are.py"
_OFFLOADED = f"{_LEFT}::test_an_offloaded_model_generates_as_transformers_does"
_LATER = f"{_LEFT}::test_a_model_offloaded_later_leaves_the_graphs_and_comes_back_to_them"
_ENDS = "tests/laws/test_positions_end.py"

GROUPS = (
    Group(
        "weights elsewhere",
        "hybrid_fx/compat/placement.py",
        (_OFFLOADED,),
        (
            Fault(
                "the first parameter says where a model is, whatever it holds",
                "if first is not None and not first.is_meta:",
                "if first is not None:",
            ),
            Fault(
                "offloading is not looked for",
                "for ask in (offloading, sharding, placing):",
                "for ask in (sharding, placing):",
            ),
        ),
    ),
    Group(
        "weights elsewhere",
        "hybrid_fx/engine/snapshot.py",
        (_LATER,),
        (Fault("loading a weight counts as a change of it", "if tensor.is_meta:", "if False:"),),
    ),
    Group(
        "wrappers",
        "hybrid_fx/compat/wrappers.py",
        (f"{_LEFT}::test_a_wrapper_is_refused_by_the_object_to_pass_and_generates_through_it",),
        (
            Fault(
                "a wrapper answers as the model it holds",
                "    kind = type(model)\n",
                "    kind = model\n",
            ),
        ),
    ),
    Group(
        "positions",
        "hybrid_fx/generate/positions.py",
        (_ENDS,),
        (
            Fault("rows for padding hide a table", "_EXTRA_ROWS = 2", "_EXTRA_ROWS = 0"),
            Fault("precomputed positions are no table", "len(b) == limit", "False"),
            Fault(
                "a token table that an adapter wraps is one of positions",
                "causal.get_input_embeddings().modules()",
                "[causal.get_input_embeddings()]",
            ),
            Fault("long rope is as any other", ' or kind == "longrope"', ""),
        ),
    ),
    Group(
        "positions",
        "hybrid_fx/generate/checks.py",
        (_ENDS,),
        (
            Fault(
                "rows that have finished hold rotary positions",
                "    return None if endless else limit\n",
                "    return limit\n",
            ),
        ),
    ),
)
