"""A plan cut for several ranks: every rank computes its share, all get the model's logits."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_lora import chat_adapted
from threaded_ranks import Rank, on_ranks
from tiny_models import adapted, prompt, tiny
from torch import fx

from hybrid_fx.capture import capture
from hybrid_fx.errors import InputError
from hybrid_fx.passes.pipeline import OPTIONAL
from hybrid_fx.plan.build import build_plan, normalize
from hybrid_fx.plan.plan import Plan
from hybrid_fx.runtime import PlanRunner


@functools.lru_cache(maxsize=1)
def canonical(model: Any) -> fx.Graph:
    return normalize(capture(model).graph)


def plans(model: Any, size: int, **options: Any) -> list[Plan]:
    graph = canonical(model)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    given = {"model": "tiny", "vocab_size": vocabulary, **options}
    return [build_plan(graph, shard=(rank, size), **given) for rank in range(size)]


def tensors_of(model: Any) -> dict[str, Any]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())


def greedy(runner: PlanRunner, rows: dict[str, Any], count: int) -> tuple[Any, Any]:
    """The logits of the first step and ``count`` tokens a row."""
    ids, mask = rows["input_ids"], rows["attention_mask"]
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)
    session = runner.session(batch=len(ids), capacity=ids.shape[1] + count)
    with torch.no_grad():
        logits = first = session.forward(ids, positions, mask.bool())
        found = []
        for step in range(count):
            found.append(logits[:, -1].argmax(-1))
            positions = positions[:, -1:] + 1
            if step + 1 < count:
                logits = session.forward(found[-1][:, None], positions)
    session.close()
    return first, torch.stack(found, 1)


def make_runner(plan: Plan, model: Any, group: Rank | None) -> PlanRunner:
    def timer(_: str) -> Any:
        return nullcontext(SimpleNamespace(tokens=0))

    runner = PlanRunner(plan, device=torch.device("cpu"), timer=timer, group=group)
    runner.prepare(tensors_of(model))
    return runner


ROWS = prompt((3, 7, 1))
CASES = {
    "llama": ("llama", {}, 2),
    "four ranks, two KV heads": ("llama", {}, 4),
    "qwen2": ("qwen2", {}, 2),
    "qwen3": ("qwen3", {}, 2),
    "gpt2": ("gpt2", {}, 2),
    "opt": ("opt", {}, 2),
    "phi3": ("phi3", {}, 2),
    "mistral": ("mistral", {}, 2),
    "opt350": ("opt350", {}, 2),
    "one KV head": ("llama", {"num_key_value_heads": 1}, 2),
    "an uneven MLP": ("llama", {"intermediate_size": 45}, 2),
    "three ranks": (
        "llama",
        {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 3},
        3,
    ),
}


def expected(model: Any, count: int) -> Any:
    out = model.generate(**ROWS, max_new_tokens=count, min_new_tokens=count, do_sample=False)
    return out[:, ROWS["input_ids"].shape[1] :]


#: Their layers are cut as those of the others.
ALIKE = {"qwen3", "phi3", "mistral", "opt", "qwen2"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.deep if n in ALIKE else ()) for n in CASES]
)
def test_ranks_together_give_the_models_tokens(name: str) -> None:
    kind, options, size = CASES[name]
    model = tiny(kind, **options).eval()
    cut = plans(model, size)
    (whole,) = plans(model, 1)

    def work(rank: Rank) -> Any:
        return greedy(make_runner(cut[rank.rank], model, rank), ROWS, 6), rank.calls

    results = on_ranks(size, work)
    logits, _ = greedy(make_runner(whole, model, None), ROWS, 6)
    for (first, tokens), calls in results:
        torch.testing.assert_close(first, logits, rtol=1e-4, atol=1e-4)
        assert tokens.tolist() == expected(model, 6).tolist()
        assert calls.count("all_gather") == 6
        assert calls.count("all_reduce") == 6 * 2 * model.config.num_hidden_layers
    for mine, all_of_it in zip(cut[0].manifest.kv, whole.manifest.kv, strict=True):
        assert mine.kv_heads == max(1, all_of_it.kv_heads // size)
    assert all(not row["missed"] or row["policy"] for row in cut[0].manifest.layers)


def test_a_rank_prepares_its_share_alone() -> None:
    model = tiny("llama").eval()
    (whole,) = plans(model, 1)
    for plan in plans(model, 2):
        mine = {p.name: p.shape for p in plan.manifest.prepared}
        for prepared in whole.manifest.prepared:
            if "layers" in prepared.name and len(prepared.shape) == 2:
                half = [s for s in mine.values() if sorted(s) != sorted(prepared.shape)]
                assert half
        total = sum(torch.Size(s).numel() for n, s in mine.items() if "layers" in n and len(s) == 2)
        full = sum(
            torch.Size(p.shape).numel()
            for p in whole.manifest.prepared
            if "layers" in p.name and len(p.shape) == 2
        )
        assert total * 2 == full


@pytest.mark.parametrize("form", ["peft", "chat"])
@pytest.mark.parametrize("lora", ["fold", "side"])
def test_adapters_are_cut_with_what_they_adapt(lora: str, form: str) -> None:
    model = (adapted if form == "peft" else chat_adapted)(tiny("llama")).eval()
    passes = OPTIONAL.without(("fold_lora",) if lora == "side" else ())
    cut = plans(model, 2, passes=passes)

    def work(rank: Rank) -> Any:
        return greedy(make_runner(cut[rank.rank], model, rank), ROWS, 6)[1]

    for tokens in on_ranks(2, work):
        assert tokens.tolist() == expected(model, 6).tolist()
    (whole,) = plans(model, 1, passes=passes)
    assert [kv.kv_heads for kv in cut[0].manifest.kv] == [1, 1], "no attention stands whole beside"
    assert 1.6 * elements(cut[0]) < elements(whole), "low-rank factors alone stay whole"


def elements(plan: Plan) -> int:
    """Of all prepared tensors of layers."""
    return sum(prod(p.shape) for p in plan.manifest.prepared if "layers" in p.name)


def test_heads_that_the_ranks_cannot_share_stay_whole_and_are_named() -> None:
    model = tiny("llama").eval()
    cut = plans(model, 3)

    def work(rank: Rank) -> Any:
        return greedy(make_runner(cut[rank.rank], model, rank), ROWS, 6), rank.calls

    for (_, tokens), calls in on_ranks(3, work):
        assert tokens.tolist() == expected(model, 6).tolist()
        assert calls.count("all_reduce") == 6 * model.config.num_hidden_layers  # the MLPs
    missed = [m for row in cut[0].manifest.layers for m in row["missed"] if m["what"] == "shard_tp"]
    assert [m["expected"] for m in missed] == ["heads that 3 ranks share"] * 2


def test_a_plan_of_several_ranks_needs_their_group() -> None:
    model = tiny("llama").eval()
    with pytest.raises(InputError, match="the plan is for 2 ranks, group is None"):
        make_runner(plans(model, 2)[0], model, None)
