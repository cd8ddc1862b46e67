"""Claims about weights that layers gather themselves while they run, checked on every rank."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zero3_checks as sharded
from engines import call, ds_config, hf_tokens, make, plain, start, train, weights
from tiny_models import tiny
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from hybrid_fx.capture import plain_linear
from hybrid_fx.distributed import stream as streaming
from hybrid_fx.distributed.shards import Staging
from hybrid_fx.engine.plans import Plans
from hybrid_fx.errors import RankError
from hybrid_fx.plan.plan import Plan

#: In a config of ZeRO-3: layers gather their own weights.
UNPINNED = {"hybrid_engine": {"enabled": True, "max_out_tokens": 32, "pin_parameters": False}}

LAYERS = 4


def streamed(**changes: Any) -> dict[str, Any]:
    """A config of ZeRO-3 whose layers gather their own weights."""
    return ds_config(3, **{**UNPINNED, **changes})


def deep(**changes: Any) -> Any:
    """The engine of a model of :data:`LAYERS` layers."""
    return start(streamed(**changes), tiny("llama", layers=LAYERS))


def tokens_of(engine: Any, kind: str, given: dict[str, Any]) -> Tensor:
    """What transformers generates on the weights of an engine, of a model of any depth."""
    depth = len(engine.module.model.layers) if kind == "llama" else 2
    held = weights(engine)
    model = tiny(kind, layers=depth)
    model.load_state_dict(held, strict=False)
    with plain_linear():
        found: Tensor = model.generate(**given)
    return found


@functools.cache
def kept() -> Any:
    """One engine of :func:`deep` for the checks that do not train."""
    return deep()


def other_families_generate_as_transformers(rank: int, kinds: tuple[str, ...]) -> None:
    for kind in kinds:
        engine = start(streamed(), make(False, kind=kind))
        for seed in range(2):
            with plain_linear():
                expected = plain(weights(engine), False, kind).generate(**call(rank))
            assert torch.equal(engine.generate(**call(rank)), expected), kind
            train(engine, rank, seed)
        assert engine._graphs.runner.plan.manifest.streamed
        assert not engine.stats.fallbacks


class Ledger:
    """The storages that gathers were given, as long as anything holds them."""

    def __init__(self) -> None:
        self.held: list[tuple[StorageWeakRef, int]] = []
        self.peak = 0
        self._fresh = Staging.fresh

    def fresh(self, use: str, count: int, like: Any) -> Tensor:
        """A new storage, entered."""
        made = self._fresh(use, count, like)
        storage = made.untyped_storage()
        self.held.append((StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, self.live())
        return made

    def live(self) -> int:
        """Bytes alive now."""
        self.held = [row for row in self.held if not row[0].expired()]
        return sum(size for _, size in self.held)


@contextmanager
def ledger() -> Iterator[Ledger]:
    """Enter everything that is gathered meanwhile."""
    book = Ledger()
    original, Staging.fresh = Staging.fresh, staticmethod(book.fresh)
    try:
        yield book
    finally:
        Staging.fresh = staticmethod(original)


def no_more_is_gathered_than_two_layers_and_what_stands_outside(rank: int) -> None:
    engine = deep()
    sizes = {n: p.ds_tensor.numel() * 2 * 4 for n, p in engine.module.named_parameters()}
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    outside = sum(size for name, size in sizes.items() if ".layers." not in name)
    assert layer * LAYERS + outside == sum(sizes.values())
    with ledger() as book:
        for seed in range(2):  # the first one proves the plan
            engine.generate(**call(rank, **({"num_beams": 2} if rank else {})))
            assert book.live() == outside
            assert outside + layer < book.peak <= outside + 2 * layer
            book.peak = 0
            train(engine, rank, seed)
        engine.generate(**sharded._right_padded(rank))
        assert book.live() == outside
        assert book.peak > sum(sizes.values()), "the module itself runs on all weights"
    engine.close()
    assert book.live() == 0


def memory_is_given_back(rank: int) -> None:
    config = streamed()
    config["hybrid_engine"] = {**config["hybrid_engine"], "release_inference_cache": True}
    engine = start(config, make(False))
    expected = hf_tokens(weights(engine), False, call(rank))
    with ledger() as book:
        for _ in range(2):
            assert torch.equal(engine.generate(**call(rank)), expected)
            assert book.live() == 0
    assert engine.stats.counters["prepares"] == 2


def ranks_may_do_different_amounts(rank: int) -> None:
    """Nothing but a prefill here and many steps there, beams, other widths and early stops."""
    engine = kept()
    first = tokens_of(engine, "llama", call(rank))
    ways = [
        call(rank, max_new_tokens=1 if rank else 9),
        call(rank, **({"num_beams": 3, "max_new_tokens": 2} if rank else {"max_new_tokens": 7})),
        call(rank, eos_token_id=int(first[0, -6]), max_new_tokens=8) if rank else call(rank),
        call(rank, prefill_chunk_size=2) if rank else call(rank),
    ]
    for given in ways:
        assert torch.equal(engine.generate(**given), tokens_of(engine, "llama", given))
    assert engine.stats.counters["prepares"] == 1
    assert engine.stats.seconds["gather"] > 0


def an_error_between_two_steps_stops_all(rank: int) -> None:
    engine = kept()
    expected = tokens_of(engine, "llama", call(rank))
    steps = 0

    def odd(ids: Any, scores: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise LookupError("a processor fails")
        return scores

    given = call(rank, **({"logits_processor": [odd]} if rank else {"max_new_tokens": 20}))
    with pytest.raises(LookupError if rank else RankError, match="fails" if rank else "rank 1"):
        engine.generate(**given)
    assert torch.equal(engine.generate(**call(rank)), expected)
    # the other rank has nothing left to do
    steps = 0
    given = call(rank, **({"logits_processor": [odd]} if rank else {"max_new_tokens": 1}))
    with pytest.raises(LookupError if rank else RankError, match="fails" if rank else "rank 1"):
        engine.generate(**given)
    assert torch.equal(engine.generate(**call(rank)), expected)


def an_error_inside_a_layer_stops_all(rank: int) -> None:
    engine = kept()
    expected = engine.generate(**call(rank))
    original, cuts = streaming.cut, 0

    def full(*given: Any) -> Any:
        nonlocal cuts
        cuts += 1
        if rank and cuts == 2 * LAYERS + 2:  # in the second layer of the third forward
            raise MemoryError("no room")
        return original(*given)

    streaming.cut = full
    try:
        with pytest.raises(MemoryError if rank else RankError, match="room" if rank else "rank 1"):
            engine.generate(**call(rank))
    finally:
        streaming.cut = original
    assert torch.equal(engine.generate(**call(rank)), expected)


def both_kinds_of_plan_are_kept_apart_and_proven_when_stored(rank: int, folder: str) -> None:
    options = {"cache_dir": str(Path(folder) / str(rank))}  # one would find the other's plan
    for pinned in (False, True, False):
        block = {**UNPINNED["hybrid_engine"], "pin_parameters": pinned}
        engine = start(ds_config(3, hybrid_engine=block, hybrid_fx=options), make(True))
        expected = hf_tokens(weights(engine), True, call(rank))
        assert torch.equal(engine.generate(**call(rank)), expected)
        manifest = engine._graphs.runner.plan.manifest
        assert bool(manifest.streamed) != pinned
        assert bool(manifest.lora) == pinned, "folding would cost a fold each time"
    counters = engine.stats.counters
    assert (counters["cache_hits_disk"], counters["captures"]) == (1, 1), "captured to prove"


def a_wrong_plan_is_found_out(rank: int) -> None:
    """Fresh norms are all one: on the weights as they are, the wrong one would do."""
    model = make(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
    engine = start(streamed(hybrid_fx={"disk_cache": False}), model)
    original = Plans.plan

    def wrong(self: Plans, *given: Any) -> Plan:
        plan = original(self, *given)
        sources = dict(plan.sources)
        here = "op.rms_norm(hidden, input_layernorm_weight"
        assert here in sources["decode"]
        there = here.replace("input", "post_attention")
        sources["decode"] = (
            sources["decode"].replace(here, there).replace("\n    del input_layernorm_weight", "")
        )
        sources["decode"] = sources["decode"].replace(
            "\n    del post_attention_layernorm_weight", ""
        )
        return Plan(manifest=plan.manifest, sources=sources)

    Plans.plan = wrong  # type: ignore[method-assign]
    try:
        found = engine.generate(**call(rank))
    finally:
        Plans.plan = original  # type: ignore[method-assign]
    assert "do not reproduce" in engine._graphs.failure
    assert torch.equal(found, hf_tokens(weights(engine), False, call(rank)))


def gathers_are_under_way_while_layers_compute(rank: int) -> None:
    """One gather a layer, and the next one issued before the layer computes."""
    engine = kept()
    engine.generate(**call(rank))
    events: list[str] = []
    stream = engine._source.stream
    issue, landed = stream._staging.take, stream._landed

    def take(use: str, *given: Any) -> Tensor:
        events.append("issue")
        taken: Tensor = issue(use, *given)
        return taken

    def waited(pending: Any) -> Any:
        events.append("wait")
        return landed(pending)

    stream._staging.take, stream._landed = take, waited
    try:
        engine.generate(**call(rank, max_new_tokens=2))
    finally:
        del stream._staging.take, stream._landed
    forward = ["issue", *["wait", "issue"] * (LAYERS - 1), "wait"]
    assert events == forward * 2


def _resident() -> tuple[int, int]:
    """Resident bytes of this process: now, and the most since this was last asked."""
    said = Path("/proc/self/status").read_text()
    now, most = (int(re.findall(f"{name}:\\s+(\\d+) kB", said)[0]) for name in ("VmRSS", "VmHWM"))
    Path("/proc/self/clear_refs").write_text("5")
    return now * 1024, most * 1024


def resident_memory_grows_by_two_layers(rank: int) -> None:
    """Of a model of 470 MB; gloo holds another layer while it gathers one."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=512, hidden_size=1024, intermediate_size=4096, num_hidden_layers=7,
            num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=64,
        )
    )  # fmt: skip
    engine = start(streamed(), model)
    sizes = {name: 4 * p.ds_numel for name, p in engine.module.named_parameters()}
    whole = sum(sizes.values())
    layer = sum(size for name, size in sizes.items() if ".layers.0." in name)
    assert whole > 400 << 20
    engine.generate(**call(rank))
    engine._graphs.release()
    before, _ = _resident()
    engine.generate(**call(rank))
    _, most = _resident()
    print(f"rank {rank}: {(most - before) / layer:.2f} layers, the model {whole / layer:.2f}")
    assert layer < most - before < 3.5 * layer
