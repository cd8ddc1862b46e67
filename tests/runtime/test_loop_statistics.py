"""What an engine counts over a loop of generating and training, and what it logs."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_models import prompt, tiny
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
)

import hybrid_fx

ROWS, LENGTHS, NEW = 4, (5, 3, 2, 5), 6


def rollout_and_step(engine, optimizer):
    """One iteration as GRPO has it: sample, score, weigh log-probabilities, step."""
    engine.eval()
    inputs = prompt(LENGTHS)
    sampled = engine.generate(**inputs, max_new_tokens=NEW, do_sample=True)
    assert sampled.shape == (ROWS, 5 + NEW)
    reward = (sampled[:, 5:] % 2).float().mean(1)
    advantage = (reward - reward.mean()) / (reward.std() + 1e-4)
    engine.train()
    mask = torch.cat((inputs["attention_mask"], torch.ones(ROWS, NEW, dtype=torch.long)), 1)
    logits = engine(input_ids=sampled, attention_mask=mask).logits[:, 4:-1]
    chosen = logits.log_softmax(-1).gather(2, sampled[:, 5:, None]).squeeze(2)
    (-(advantage[:, None] * chosen).mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("release", [False, True])
def test_a_loop_logs_one_line_an_iteration_with_parts_that_sum_to_the_whole(caplog, release):
    model = tiny("llama")
    engine = hybrid_fx.hybridize(model, release_inference_cache=release)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with caplog.at_level(logging.INFO, logger="hybrid_fx"):
        for _ in range(3):
            rollout_and_step(engine, optimizer)
        engine.eval()
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("iteration")]
    assert len(lines) == len(engine.stats.iterations) == 3
    for index, (line, record) in enumerate(zip(lines, engine.stats.iterations, strict=True)):
        assert line == str(record)
        assert line.startswith(f"iteration {index} | E2E ")
        assert sum(record.percents.values()) == pytest.approx(100)
        assert sum(record.parts.values()) == pytest.approx(record.e2e_seconds)
        for part in ("generate", "train", "prepare"):
            assert record.parts[part] > 0, part
        assert record.samples == ROWS
        # Padding is no token; the last new token is chosen and not fed back.
        assert record.tokens == {"prefill": sum(LENGTHS), "decode": ROWS * (NEW - 1)}
        assert record.kv_bytes > 0
        assert record.fallbacks == {}
        assert "fallbacks: none" in line
    counters = engine.stats.counters
    assert counters["captures"] + counters["cache_hits_disk"] == 1
    assert counters["prepares"] == counters["generate_calls"] == 3
    assert counters["hf_forwards"] == 0


def test_forwards_of_the_module_are_counted_where_it_generates():
    engine = hybrid_fx.hybridize(tiny("llama"))
    holed = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]])
    ids = prompt((4, 4))["input_ids"]
    engine.generate(ids, attention_mask=holed, max_new_tokens=NEW, do_sample=False)
    assert engine.stats.counters["hf_forwards"] == NEW
    assert sum(engine.stats.fallbacks.values()) == 1
    assert engine.stats.tokens["decode"] == 0


class Breaks(LogitsProcessor):
    """Raises at the third token."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 3:
            raise self.error
        return scores


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()])
def test_an_exception_in_the_middle_of_decoding_leaves_no_timer_open(error):
    engine = hybrid_fx.hybridize(tiny("llama"))
    inputs = prompt((5, 3))
    with pytest.raises(type(error)):
        engine.generate(
            **inputs, max_new_tokens=8, logits_processor=LogitsProcessorList([Breaks(error)])
        )
    assert engine.stats._stack == []
    assert engine.stats.tokens["decode"] == 2 * 2
    before = dict(engine.stats.seconds)
    engine.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert engine.stats.tokens["decode"] == 2 * 2 + 2 * 7
    assert engine.stats.seconds["decode"] > before["decode"]
    assert engine.stats._stack == []


def test_an_exception_inside_a_graph_leaves_no_timer_and_no_session_open(monkeypatch):
    engine = hybrid_fx.hybridize(tiny("llama"))
    inputs = {**prompt((5, 3)), "max_new_tokens": 8, "do_sample": False}
    wanted = engine.generate(**inputs)
    functions = engine._graphs.runner._functions["decode"]
    real, calls = functions["decode"], []

    def decode(*args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("in the middle")
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setitem(functions, "decode", decode)
        with pytest.raises(RuntimeError, match="in the middle"):
            engine.generate(**inputs)
    assert engine.stats._stack == []
    assert torch.equal(engine.generate(**inputs), wanted)


def test_padding_behind_a_row_that_ended_counts_as_no_token():
    engine = hybrid_fx.hybridize(tiny("llama"))
    lengths = [1, 6, 3]
    engine.generate(**prompt((5, 3, 4)), max_new_tokens=lengths, pad_token_id=0, eos_token_id=None)
    assert engine.stats.fallbacks == {}
    # The last new token of a row is chosen and not fed back.
    assert engine.stats.tokens["decode"] == sum(length - 1 for length in lengths)
    assert engine.stats.tokens["prefill"] == 5 + 3 + 4


class Mine(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


KEEPS_ROWS = {
    "logits processor Mine, stopping criterion Never": lambda: {
        "logits_processor": LogitsProcessorList([TemperatureLogitsWarper(0.7), Mine(), Mine()]),
        "stopping_criteria": StoppingCriteriaList([Never()]),
    },
    "scores or logits are returned": lambda: {
        "return_dict_in_generate": True,
        "output_scores": True,
    },
}


@pytest.mark.parametrize("why", KEEPS_ROWS)
def test_what_keeps_finished_rows_is_named_with_the_tokens_it_costs(why):
    asked = {**prompt((5, 3, 4)), "pad_token_id": 0, "eos_token_id": None}
    lengths = [1, 6, 3]
    with hybrid_fx.hybridize(tiny("llama")) as engine:
        engine.generate(**asked, max_new_tokens=lengths)
        engine.generate(**asked, max_new_tokens=6, **KEEPS_ROWS[why]())
        assert engine.stats.waited == {}, "nothing was computed for nobody"
        for times in (1, 2):
            engine.generate(**asked, max_new_tokens=lengths, **KEEPS_ROWS[why]())
            assert engine.stats.waited == {why: times * (5 + 0 + 3)}
        assert engine.stats.as_dict()["waited"] == {why: 16}
        (note,) = (note for note in engine.explain().notes if "finished" in note)
        assert note.startswith("16 tokens were computed for rows")
        assert note.endswith(why)


def test_a_prompt_counts_as_often_as_it_is_computed():
    engine = hybrid_fx.hybridize(tiny("llama"))
    asked = {"do_sample": True, "num_return_sequences": 4, "max_new_tokens": 2}
    engine.generate(**prompt((5, 3)), **asked, eos_token_id=None)
    assert engine.stats.tokens == {"prefill": 5 + 3, "decode": 8}


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_engine_samples_per_sequence_where_it_is_told_to(kind):
    asked = {**prompt((5, 3)), "do_sample": True, "max_new_tokens": 6, "eos_token_id": None}
    model = tiny(kind)
    with hybrid_fx.hybridize(model, sampling="per_sequence") as engine:
        found = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            found.append(engine.generate(**asked))
            after = torch.rand(())
            torch.manual_seed(seed)
            torch.empty((), dtype=torch.int64).random_()
            assert torch.rand(()) == after  # one number was drawn
        greedy = engine.generate(**{**asked, "do_sample": False})
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(greedy, model.generate(**{**asked, "do_sample": False}))


def test_another_way_of_sampling_is_refused_by_name():
    with pytest.raises(hybrid_fx.ConfigError, match="sampling='fast' is not known; use one of hf"):
        hybrid_fx.hybridize(tiny("llama"), sampling="fast")
