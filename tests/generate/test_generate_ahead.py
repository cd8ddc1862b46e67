"""A forward queued before it is known who runs changes nothing but when rows leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from generate.same_as_hf import EOS, PAD, VOCAB, prompt, shared_model, watched
from hypothesis import given
from hypothesis import strategies as st
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from hybrid_fx.generate import generate, loop
from hybrid_fx.generate.choose import Memory, probabilities
from hybrid_fx.generate.host import ToHost
from hybrid_fx.runtime.moving import is_asynchronous, to_device

ENDS = [EOS, *range(5, 20)]
ROWS = prompt((3, 9, 1, 6))


class Keeps(LogitsProcessor):
    """Nobody knows what it looks at: rows stay."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.tolist())
        return scores + (input_ids.shape[1] % 3)


class Watches(StoppingCriteria):
    """Ends no row, and keeps what it saw."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.seen.append(input_ids.tolist())
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Heard(BaseStreamer):
    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.parts: list[torch.Tensor] = []

    def put(self, value: torch.Tensor) -> None:
        self.parts.append(value)
        self.seen.append(value.tolist())

    def end(self) -> None:
        self.seen.append("end")


@dataclass
class Told:
    """All that one call gave and showed; ``fed`` is the rows of each decode step."""

    result: Any
    state: torch.Tensor
    seen: list[Any]
    fed: list[int]
    length: int
    capacity: int


def call(
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    rows: dict[str, Any],
    *,
    ahead: bool,
    watch: tuple[str, ...] = (),
    sampling: str = "hf",
    seed: int = 0,
    **asked: Any,
) -> Told:
    watchers: dict[str, Any] = {"keeps": Keeps(), "watches": Watches(), "streamer": Heard()}
    if "keeps" in watch:
        asked["logits_processor"] = LogitsProcessorList([watchers["keeps"]])
    if "watches" in watch:
        asked["stopping_criteria"] = [watchers["watches"]]
    if "streamer" in watch:
        asked["streamer"] = watchers["streamer"]
    runner = watched(shared_model(family))
    notes: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(loop, "is_asynchronous", lambda device: ahead)
        torch.manual_seed(seed)
        result = generate(
            shared_model(family), runner, (), {**rows, **asked},
            on_fallback=notes.append, sampling=sampling,
        )  # fmt: skip
    assert notes == []
    (session,) = runner.sessions
    fed = [batch for batch, width, _ in runner.calls[1:] if width == 1]
    seen = [watchers[name].seen for name in watch]
    return Told(result, torch.get_rng_state(), seen, fed, session.length, session.capacity)


def assert_alike(found: Told, wanted: Told) -> None:
    assert type(found.result) is type(wanted.result)
    if isinstance(wanted.result, torch.Tensor):
        assert torch.equal(found.result, wanted.result)
    else:
        assert torch.equal(found.result.sequences, wanted.result.sequences)
        for name in ("scores", "logits"):
            ours, theirs = found.result.get(name), wanted.result.get(name)
            assert (ours is None) == (theirs is None)
            assert ours is None or all(map(torch.equal, ours, theirs))
    assert torch.equal(found.state, wanted.state)
    assert found.seen == wanted.seen
    assert found.length <= max(found.capacity, wanted.length)
    assert len(wanted.fed) <= len(found.fed) <= len(wanted.fed) + 1


ASKED = st.fixed_dictionaries(
    {"do_sample": st.booleans(), "eos_token_id": st.sampled_from([None, ENDS, list(range(3, 61))])},
    optional={
        "top_k": st.sampled_from([0, 5]),
        "repetition_penalty": st.just(1.3),
        "num_return_sequences": st.integers(2, 3),
        "output": st.sampled_from(["output_scores", "output_logits"]),
        "watch": st.sets(st.sampled_from(["keeps", "watches", "streamer"])).map(tuple),
        "sampling": st.just("per_sequence"),
    },
)


@given(
    family=st.sampled_from(["llama", "gpt2", "mistral"]),
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 8)), min_size=1, max_size=4),
    listed=st.booleans(),
    asked=ASKED,
    seed=st.integers(0, 3),
)
def test_both_orders_give_the_same(
    family: str,
    lengths: list[tuple[int, int]],
    listed: bool,
    asked: dict[str, Any],
    seed: int,
) -> None:
    given_ = dict(asked)
    if output := given_.pop("output", None):
        given_ |= {output: True, "return_dict_in_generate": True}
    if "num_return_sequences" in given_:
        given_["do_sample"] = True
    if "streamer" in given_.get("watch", ()) and not given_["do_sample"]:
        given_.pop("num_return_sequences", None)
    rows = prompt(tuple(start for start, _ in lengths), seed)
    new = [count for _, count in lengths]
    given_ |= {"max_new_tokens": new if listed else max(new), "pad_token_id": PAD, "seed": seed}
    with pytest.MonkeyPatch.context() as patch:
        found, wanted = (call(patch, family, rows, ahead=a, **given_) for a in (True, False))
    assert_alike(found, wanted)


def test_rows_leave_one_step_later_and_only_a_step_nobody_knew_of_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: dict[str, Any] = {"max_new_tokens": 24, "eos_token_id": ENDS, "do_sample": True}
    found, wanted = (
        call(monkeypatch, "llama", ROWS, ahead=a, top_k=0, **asked) for a in (True, False)
    )
    assert_alike(found, wanted)
    assert len(wanted.fed) < 23, "all rows end before the last step"
    assert found.fed == [4, *wanted.fed]


@pytest.mark.parametrize("new", [1, 2, 7])
def test_no_forward_is_queued_behind_the_last_possible_step(
    monkeypatch: pytest.MonkeyPatch, new: int
) -> None:
    asked: dict[str, Any] = {"max_new_tokens": new, "eos_token_id": None, "do_sample": False}
    found, wanted = (call(monkeypatch, "gpt2", ROWS, ahead=a, **asked) for a in (True, False))
    assert_alike(found, wanted)
    assert found.fed == wanted.fed == [4] * (new - 1)
    assert found.length == found.capacity or new == 1


def test_the_last_position_is_not_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = prompt((120, 3))
    asked: dict[str, Any] = {"max_new_tokens": [9, 120], "eos_token_id": ENDS[:3]}
    asked |= {"do_sample": True, "pad_token_id": PAD, "watch": ("keeps", "streamer")}
    found, wanted = (call(monkeypatch, "gpt2", rows, ahead=a, **asked) for a in (True, False))
    assert_alike(found, wanted)


def test_a_streamer_may_keep_what_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    heard = Heard()
    monkeypatch.setattr(loop, "is_asynchronous", lambda device: True)
    ids = prompt((4,))["input_ids"]
    asked = {"input_ids": ids, "max_new_tokens": 5, "eos_token_id": None, "streamer": heard}
    out = generate(shared_model(), watched(shared_model()), (), asked, on_fallback=pytest.fail)
    assert torch.cat(heard.parts[1:]).tolist() == out[0, 4:].tolist()


def test_where_ranks_forward_together_nothing_is_queued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "is_asynchronous", lambda device: True)
    runner = watched(shared_model())
    asked = {**ROWS, "max_new_tokens": 24, "eos_token_id": list(range(3, VOCAB)), "do_sample": True}
    out = generate(
        shared_model(), runner, (), asked, on_fallback=pytest.fail, on_settings=lambda _: None
    )
    assert len(runner.calls) == out.shape[1] - 9


def test_a_cpu_is_not_run_ahead_of() -> None:
    cpu = torch.device("cpu")
    assert not is_asynchronous(cpu)
    assert is_asynchronous(torch.device("cuda", 1))
    told = ToHost(3, cpu)
    for step in range(2):
        told.send(torch.tensor([step, 2, 3]), torch.tensor([1, 0, step]))
        tokens, flags = told.read()
        assert (tokens.tolist(), flags) == ([step, 2, 3], [1, 0, step])
    given_ = torch.arange(3)
    assert to_device(given_, cpu) is given_


@pytest.mark.gpu
def test_a_gpu_copies_behind_its_work_and_looks_at_distributions_itself() -> None:
    gpu = torch.device("cuda")
    told = ToHost(2, gpu)
    told.send(torch.tensor([4, 5], device=gpu), torch.tensor([0, 1], device=gpu))
    tokens, flags = told.read()
    assert (tokens.tolist(), flags) == ([4, 5], [0, 1])
    assert to_device(torch.arange(3), gpu).tolist() == [0, 1, 2]
    scores = torch.randn(2, VOCAB, device=gpu)
    assert torch.equal(probabilities(scores, Memory()), scores.softmax(-1))
