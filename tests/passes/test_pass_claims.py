"""Every pass of the library, held to all claims on random graphs and on what broke it once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from counterexamples import FOUND
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hybrid_fx.passes.pipeline import PASSES
from hybrid_fx.passes.spec import RULES, THREADED
from hybrid_fx.testing import (
    Example,
    captured,
    check_hoist,
    check_pass,
    check_pipeline,
    decoders,
    graphs,
    orders,
)
from hybrid_fx.testing.layers import PIECES

#: The passes of a canonical graph, and the pieces of a layer that each one reads.
READS = {
    "fuse_rms_norm": ("norm", "residual"),
    "fold_lora": ("joined", "mlp"),
    "concat_qkv": ("joined", "attention"),
    "concat_gate_up": ("mlp",),
    "fuse_mlp": ("mlp",),
    "fuse_add_norm": ("norm", "residual"),
    "shard_tp": ("attention",),  # one rank, which cuts nothing
    "pack_weights": ("joined", "mlp"),
    "gather_weights": PIECES,
    "stream_gathers": PIECES,
    "thread_kv_prefill": ("attention",),
    "thread_kv_decode": ("attention",),
    "keep_last_tokens": ("norm",),
    "take_embeds": ("norm",),
    "thread_masks": ("attention",),
    "keep_selected_tokens": ("norm",),
}


def held(name: str, example: Example) -> None:
    """All claims on one pass. Decoding takes one token a row."""
    one_token = example.with_sizes((1, 1), (3, 1)) if name == "thread_kv_decode" else example
    check_pass(PASSES[name], one_token, rules=THREADED if "thread_kv" in name else RULES)


_ALL = tuple(PASSES[name] for name in READS if name != "thread_kv_decode")  # which takes one token
_EXACT = tuple(one for one in _ALL if one.exact)

#: Claim -> what is drawn for it, and what checks it.
CLAIMS: dict[str, tuple[tuple[Any, ...], Callable[..., object]]] = {
    **{name: ((graphs(pieces=READS[name]),), partial(held, name)) for name in READS},
    "canonicalize": ((captured(),), partial(check_pass, PASSES["canonicalize"])),
    "hoist": ((graphs(),), check_hoist),
    "any order": ((orders(_ALL), graphs()), check_pipeline),
    "any order of exact passes": ((orders(_EXACT), graphs()), check_pipeline),
    "decoders": ((orders(_ALL), decoders(disturbances=2)), check_pipeline),
    "hoisted decoders": ((decoders(disturbances=2),), check_hoist),
}


def _drawn(claim: str, count: int) -> None:
    drawn, check = CLAIMS[claim]

    @settings(max_examples=count)
    @given(st.tuples(*drawn))
    def holds(values: tuple[Any, ...]) -> None:
        check(*values)

    for make in FOUND.get(claim, ()):
        holds = example((make(),))(holds)
    holds()


def test_every_pass_is_held_to_the_claims() -> None:
    assert PASSES.keys() == READS.keys() | {"canonicalize"}


@pytest.mark.parametrize("claim", CLAIMS)
def test_all_claims_hold_on_random_graphs(claim: str) -> None:
    _drawn(claim, max(8, settings().max_examples // 3))


@pytest.mark.deep
@pytest.mark.parametrize("claim", CLAIMS)
def test_all_claims_hold_on_many_random_graphs(claim: str) -> None:
    _drawn(claim, settings().max_examples)


@pytest.mark.parametrize(
    ("name", "make"),
    [(name, make) for name, found in FOUND.items() for make in found],
    ids=lambda value: value if isinstance(value, str) else value.__name__.strip("<>"),
)
def test_what_broke_a_pass_once_does_not_again(name: str, make: Callable[[], Example]) -> None:
    if name == "hoist":
        check_hoist(make())
    else:
        held(name, make())
