"""``graph="cudagraphs"``: recorded decode steps give the tokens of transformers.

On a CPU the recorder is a tape, see tests/tape.py: it repeats operators on the memory of then, with
the numbers of then, and refuses what a GPU could not record.
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from laws.against_hf import hf_generate, near_ties, same_tokens
from tape import TapeRecorder, taped
from tiny_models import KINDS, VOCAB, adapted, prompt, randomize_adapters, reweigh, tiny
from torch import fx, nn
from transformers import DynamicCache

import hybrid_fx
from hybrid_fx.generate import loop
from hybrid_fx.passes import Context, Pass, PassResult
from hybrid_fx.passes.graph import call, calls, path_of
from hybrid_fx.runtime import attend_at as attention
from hybrid_fx.runtime import recorded, runner
from hybrid_fx.runtime.recording import Watch

ENDS = list(range(5, 20))
GREEDY: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False}


@pytest.fixture
def tapes() -> Iterator[type[TapeRecorder]]:
    with taped() as recorders:
        yield recorders


def engine_of(model: nn.Module, **options: Any) -> Any:
    return hybrid_fx.hybridize(model, graph="cudagraphs", **options)


def steps_of(engine: Any) -> recorded.RecordedDecode:
    steps: recorded.RecordedDecode = engine._graphs.runner.recorded
    return steps


def sizes_of(engine: Any) -> list[tuple[int, int]]:
    """Rows and columns of the recordings there are, the latest last."""
    assert not steps_of(engine).failure
    return [(inputs.rows, inputs.columns) for inputs, _ in steps_of(engine)._kept.values()]


def family(kind: str) -> Any:
    """A tiny model of :data:`KINDS`, or with a softcap and windows in every second layer."""
    if kind != "gemma2":
        return tiny(kind)
    config = transformers.Gemma2Config(
        **KINDS["llama"][1], head_dim=8, sliding_window=4, num_hidden_layers=2, eos_token_id=None
    )
    config.attn_logit_softcapping, config.final_logit_softcapping = 5.0, 3.0
    model = transformers.Gemma2ForCausalLM(config).eval()
    reweigh(model, 0)
    return model


def step_elsewhere(engine: Any) -> None:
    """A step on a device without numbers: it must not read or make tensors on another one."""
    nowhere = torch.device("meta")
    manifest = engine._graphs.runner.plan.manifest
    inputs = recorded.Inputs(3, 256, nowhere)
    prepared = [
        torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device=nowhere)
        for entry in manifest.prepared
    ]
    memory = [
        [torch.empty(3, layer.kv_heads, 256, size(layer), device=nowhere) for layer in manifest.kv]
        for size in (lambda layer: layer.head_size, lambda layer: layer.value_head_size)
    ]
    windows = {layer.window or 0 for layer in manifest.kv}
    with Watch(nowhere), torch.no_grad():
        masks = attention.masks_at(inputs.valid, inputs.at, windows, torch.float32)
        fixed = (inputs.ids, inputs.positions, inputs.at, masks, 256, 1)
        logits = steps_of(engine)._decode(*fixed, prepared, *memory)
    assert (logits.shape, logits.device) == ((3, 1, VOCAB), nowhere)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt350", "mistral", "gemma2"])
def test_the_tokens_are_those_of_transformers_in_each_family(
    tapes: type[TapeRecorder], kind: str
) -> None:
    with engine_of(family(kind)) as engine:
        for lengths in ((5, 3, 1, 7), (1,), (4, 4), (2, 6)):
            same_tokens(engine, **prompt(lengths), **GREEDY)
        assert [rows for rows, _ in sizes_of(engine)] == [4, 1, 2]
        assert [tape.replays for tape in tapes.tapes] == [6, 6, 12], "the first is the proof"
        assert not engine.stats.fallbacks
        step_elsewhere(engine)


@given(
    heads=st.sampled_from([(4, 4), (6, 3), (5, 1), (3, 3), (8, 2)]),
    size=st.sampled_from([4, 10]),
    kind=st.sampled_from(["llama", "qwen2", "mistral"]),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    new=st.integers(2, 9),
    ends=st.booleans(),
)
@settings(max_examples=5)
def test_random_shapes_and_prompts_give_the_tokens_of_transformers(
    heads: tuple[int, int], size: int, kind: str, lengths: list[int], new: int, ends: bool
) -> None:
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    model = tiny(kind, **shape, hidden_size=heads[0] * size)
    asked = prompt(lengths, seed=new) | {"max_new_tokens": new, "do_sample": False}
    asked["eos_token_id"] = ENDS if ends else None
    with taped(), engine_of(model) as engine:
        got = engine.generate(**asked)
        near_ties(model, asked, got, hf_generate(model, **asked))
        assert not steps_of(engine).failure


def test_one_recording_serves_all_positions_of_all_calls(tapes: type[TapeRecorder]) -> None:
    with engine_of(tiny("llama")) as engine:
        for length, new in ((2, 40), (9, 5), (30, 60)):
            asked = prompt((length, length)) | {"max_new_tokens": new, "do_sample": False}
            same_tokens(engine, **asked)
        assert sizes_of(engine) == [(2, 256)]
        assert [tape.replays for tape in tapes.tapes] == [39 + 4 + 59]
        assert engine.stats.counters["recordings"] == 1
        assert engine.stats.seconds["record"] > 0
        assert 'graph="cudagraphs": recordings of the decode step: 1' in engine.explain().notes


def test_rows_that_leave_step_down_through_powers_of_two(tapes: type[TapeRecorder]) -> None:
    with engine_of(tiny("llama")) as engine:
        asked = prompt((3, 9, 1, 6, 2, 5)) | {"max_new_tokens": [30, 22, 4, 12, 17, 8]}
        got = engine.generate(**asked, do_sample=False)
        assert [rows for rows, _ in sizes_of(engine)] == [6, 4, 2, 1]
        want = hf_generate(engine.module, **prompt((3, 9, 1, 6, 2, 5)), max_new_tokens=30)
        for row, new in enumerate(asked["max_new_tokens"]):
            assert got[row, : 9 + new].tolist() == want[row, : 9 + new].tolist()
        engine.generate(**asked, do_sample=False)
        assert len(tapes.tapes) == 4


def test_rows_that_are_not_apart_are_never_beside_others(tapes: type[TapeRecorder]) -> None:
    with engine_of(tiny("llama")) as engine:
        engine._graphs.ready().rows_apart = False
        session = engine._graphs.runner.session(batch=4, capacity=9)
        ids = torch.randint(VOCAB, (4, 4))
        session.forward(ids, torch.arange(4).expand(4, 4))
        session.reorder(torch.arange(3))
        session.forward(ids[:3, :1], torch.full((3, 1), 4))
        session.close()
        assert sizes_of(engine) == [(3, 256)]


@pytest.mark.parametrize(
    ("ahead", "sampling"), [(False, "hf"), (True, "hf"), (True, "per_sequence")]
)
def test_draws_are_those_without_recordings_also_where_forwards_are_queued(
    monkeypatch: pytest.MonkeyPatch, tapes: type[TapeRecorder], sampling: Any, ahead: bool
) -> None:
    monkeypatch.setattr(loop, "is_asynchronous", lambda device: ahead)
    asked = prompt((3, 9, 1, 6)) | {"max_new_tokens": 24, "do_sample": True, "eos_token_id": ENDS}
    model = tiny("llama")
    found = []
    for graph in ("eager", "cudagraphs"):
        options: dict[str, Any] = {"graph": graph, "sampling": sampling}
        with hybrid_fx.hybridize(model, **options) as engine:
            torch.manual_seed(3)
            found.append((engine.generate(**asked).tolist(), torch.get_rng_state().tolist()))
    assert found[0] == found[1]
    assert len(tapes.tapes) > 1


def test_logits_that_were_handed_out_outlive_the_next_step(tapes: type[TapeRecorder]) -> None:
    with engine_of(tiny("llama")) as engine:
        session = engine._graphs.ready().session(batch=2, capacity=9)
        ids = torch.randint(VOCAB, (2, 6))
        session.forward(ids[:, :2], torch.arange(2).expand(2, 2))
        found = [session.forward(ids[:, at : at + 1], torch.full((2, 1), at)) for at in (2, 3, 4)]
        copies = [logits.clone() for logits in found]
        session.forward(ids[:, 5:], torch.full((2, 1), 5))
        session.close()
        assert all(map(torch.equal, found, copies))
        assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize(
    "asked",
    [
        {"num_beams": 3},
        {"num_beams": 2, "do_sample": True, "top_k": 9},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 3, "do_sample": True},
        {"use_cache": False},
        {"return_dict_in_generate": True, "output_logits": True},
    ],
    ids=lambda asked: "-".join(asked),
)
def test_other_ways_to_decode_give_what_transformers_gives(
    tapes: type[TapeRecorder], asked: dict[str, Any]
) -> None:
    lengths = (6,) if "prompt_lookup_num_tokens" in asked else (5, 3)
    call_ = prompt(lengths) | {"max_new_tokens": 12, "do_sample": False} | asked
    model = tiny("llama", seed=1)
    torch.manual_seed(5)
    want = hf_generate(model, **call_)
    with engine_of(model) as engine:
        for _ in range(2):
            torch.manual_seed(5)
            got = engine.generate(**call_)
            assert torch.equal(getattr(got, "sequences", got), getattr(want, "sequences", want))
        assert not steps_of(engine).failure
    assert tapes.tapes


def test_a_prefix_in_a_cache_is_gone_on_from(tapes: type[TapeRecorder]) -> None:
    model = tiny("llama")
    given_ = prompt((9, 6))
    caches, found = [DynamicCache(config=model.config) for _ in range(2)], []
    with engine_of(model) as engine:
        for one, cache in zip((engine, None), caches, strict=True):
            asked = {**given_, **GREEDY, "past_key_values": cache}
            ids = one.generate(**asked) if one else hf_generate(model, **asked)
            mask = torch.cat((given_["attention_mask"], torch.ones(2, 7, dtype=torch.int64)), 1)
            asked |= {"input_ids": ids, "attention_mask": mask}
            found.append((one.generate(**asked) if one else hf_generate(model, **asked)).tolist())
    assert found[0] == found[1]
    assert caches[0].get_seq_length() == caches[1].get_seq_length()
    assert tapes.tapes


@pytest.mark.parametrize("options", [{}, {"share_storage": True}, {"disable_passes": True}])
def test_a_weight_step_keeps_the_recordings_and_gives_the_new_tokens(
    tapes: type[TapeRecorder], options: dict[str, Any]
) -> None:
    model = tiny("llama")
    plain = {"disable_passes": ("pack_weights",)} if options else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    with engine_of(model, **options | plain) as engine:
        seen = {str(same_tokens(engine, **prompt((5, 3)), **GREEDY))}
        for _ in range(2):
            engine.train()
            loss = engine(input_ids=torch.randint(VOCAB, (2, 8))).logits.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            engine.eval()
            seen.add(str(same_tokens(engine, **prompt((5, 3)), **GREEDY)))
        assert len(seen) == 3, "a stale weight would show"
        assert engine.stats.counters["prepares"] == 3
    assert len(tapes.tapes) == 1


@pytest.mark.parametrize("lora", ["fold", "side"])
def test_adapters_that_change_keep_the_recordings(tapes: type[TapeRecorder], lora: str) -> None:
    model = adapted(tiny("llama"))
    with engine_of(model, lora=lora) as engine:
        for seed in range(3):
            randomize_adapters(model, seed, size=0.3)
            same_tokens(engine, **prompt((5, 3)), **GREEDY)
        assert engine.stats.counters["prepares"] == 3
    assert len(tapes.tapes) == 1


def test_weights_that_lie_elsewhere_are_recorded_anew(tapes: type[TapeRecorder]) -> None:
    model = tiny("llama")
    with engine_of(model, disable_passes=("pack_weights",)) as engine:
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
        norm = model.model.norm.weight
        norm.data = norm.data.flip(0).clone()
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
        assert sizes_of(engine) == [(2, 256)]
    assert len(tapes.tapes) == 2


def test_weights_that_held_nan_leave_nothing_behind(tapes: type[TapeRecorder]) -> None:
    model = tiny("llama")
    good = copy.deepcopy(model.state_dict())
    with engine_of(model) as engine:
        engine.generate(**prompt((20, 30)), max_new_tokens=70, do_sample=False)
        with torch.no_grad():
            model.model.layers[0].input_layernorm.weight.fill_(torch.nan)
        engine.generate(**prompt((20, 30)), max_new_tokens=70, do_sample=False)
        model.load_state_dict(good)
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
    assert len(tapes.tapes) == 1


def test_more_memory_is_recorded_anew_and_the_old_is_dropped(tapes: type[TapeRecorder]) -> None:
    with engine_of(tiny("llama")) as engine:
        same_tokens(engine, **prompt((5,)), **GREEDY)
        same_tokens(engine, **prompt((5, 3, 2)), **GREEDY)
        assert sizes_of(engine) == [(3, 256)]
        same_tokens(engine, **prompt((5,)), **GREEDY)
        assert sizes_of(engine) == [(3, 256), (1, 256)]
        same_tokens(engine, **prompt((5, 3, 2)), **GREEDY)
        assert sizes_of(engine) == [(1, 256), (3, 256)]
    assert len(tapes.tapes) == 3


def test_a_session_that_outgrows_its_rows_goes_on(tapes: type[TapeRecorder]) -> None:
    model = tiny("llama", max_position_embeddings=300)
    ids = torch.randint(VOCAB, (2, 262))
    at = torch.arange(262).expand(2, 262)
    with engine_of(model) as engine:
        session = engine._graphs.ready().session(batch=2, capacity=9)
        session.forward(ids[:, :252], at[:, :252])
        parts = [session.forward(ids[:, i : i + 1], at[:, i : i + 1]) for i in range(252, 262)]
        session.close()
        assert sizes_of(engine) == [(2, 512)], "in memory of their own"
        with torch.no_grad():
            wanted = model(input_ids=ids, position_ids=at).logits[:, 252:]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-4, atol=1e-4)
    assert len(tapes.tapes) == 2


def test_columns_that_nobody_uses_are_not_read(tapes: type[TapeRecorder]) -> None:
    model = tiny("llama", max_position_embeddings=600)
    with engine_of(model, max_out_tokens=600) as engine:
        for length in (252, 510, 252):
            same_tokens(engine, **prompt((length, 9)), **GREEDY)
        assert engine._graphs.runner.workspace.pitch == 768
        assert sizes_of(engine) == [(2, 768), (2, 256), (2, 512)]
        assert [tape.replays for tape in tapes.tapes] == [8, 6, 4]


def test_columns_that_were_taken_back_are_seen_anew(tapes: type[TapeRecorder]) -> None:
    """As assisted decoding does; a padding column among them is no padding afterwards."""
    model = tiny("llama")
    ids, at = torch.randint(VOCAB, (2, 12)), torch.arange(12).expand(2, 12)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 3:] = False
    with engine_of(model) as engine:
        session = engine._graphs.ready().session(batch=2, capacity=12)
        session.forward(ids[:, :6], at[:, :6], valid)
        session.forward(ids[:, 6:7], at[:, 6:7])
        session.crop(3)
        parts = [session.forward(ids[:, i : i + 1], at[:, i : i + 1]) for i in range(3, 9)]
        session.close()
        with torch.no_grad():
            wanted = model(input_ids=ids[:, :9], position_ids=at[:, :9]).logits[:, 3:]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, rtol=1e-4, atol=1e-5)


def test_a_column_that_is_padding_when_it_comes_is_never_seen(tapes: type[TapeRecorder]) -> None:
    ids, at = torch.randint(VOCAB, (2, 9)), torch.arange(9).expand(2, 9)
    found = []
    with engine_of(tiny("llama")) as engine:
        for recorded_ in (False, True):
            session = engine._graphs.ready().session(batch=2, capacity=9, recorded=recorded_)
            session.forward(ids[:, :3], at[:, :3])
            for i in range(3, 9):
                valid = torch.tensor([[i != 5], [True]]) if i in (4, 5) else None
                logits = session.forward(ids[:, i : i + 1], at[:, i : i + 1], valid)
            session.close()
            found.append(logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert len(tapes.tapes) == 1


def _looks(graph: fx.Graph, context: Context) -> PassResult:
    """Adds nothing, by way of a number that the host reads."""
    count = 0
    for node in calls(graph, "linear"):
        if path_of(node).endswith("o_proj"):
            with graph.inserting_after(node):
                largest = call(graph, "amax", node, path=path_of(node))
            with graph.inserting_after(largest):
                number = call(graph, "item", largest, path=path_of(node))
            with graph.inserting_after(number):
                nothing = call(graph, "mul", number, 0.0, path=path_of(node))
            with graph.inserting_after(nothing):
                new = call(graph, "add", node, nothing, path=path_of(node))
            new.meta["val"] = node.meta.get("val")
            node.replace_all_uses_with(new, delete_user_cb=lambda u, m=(largest, new): u not in m)
            count += 1
    return PassResult(count)


LOOKS = Pass("looks", _looks, may_add=frozenset({"amax", "item", "mul", "add"}), exact=True)


def test_a_step_that_waits_for_the_device_runs_as_it_is_and_says_so_once(
    tapes: type[TapeRecorder], caplog: pytest.LogCaptureFixture
) -> None:
    with engine_of(tiny("llama"), passes=(LOOKS,)) as engine, caplog.at_level(logging.WARNING):
        for lengths in ((5, 3), (4,)):
            same_tokens(engine, **prompt(lengths), **GREEDY)
        why = "_local_scalar_dense reads a result on the host"
        assert [entry.getMessage() for entry in caplog.records] == [
            f"decode steps are not recorded, and run as they are: {why}"
        ]
        notes = [note for note in engine.explain().notes if "cudagraphs" in note]
        assert notes == [f'graph="cudagraphs": decode steps are not recorded: {why}']
        assert not engine.stats.fallbacks
    assert not tapes.tapes


def test_a_recording_that_says_something_else_is_found_out(
    tapes: type[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*given_: Any) -> Any:
        return attention.attend_at(*given_) * 1.5

    monkeypatch.setattr(runner, "attend_at", wrong)
    with engine_of(tiny("llama")) as engine:
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
        assert "its logits differ by" in steps_of(engine).failure
        assert len(steps_of(engine)) == 0


def test_a_model_that_went_where_nothing_records_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with taped():
        engine = engine_of(tiny("llama"))
    same_tokens(engine, **prompt((5, 3)), **GREEDY)
    assert "on cpu, so decode steps are not recorded" in caplog.text
    assert any("decode steps run as they are" in note for note in engine.explain().notes)
    engine.close()


def test_releasing_drops_all_recordings(tapes: type[TapeRecorder]) -> None:
    with engine_of(tiny("llama"), release_inference_cache=True) as engine:
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
        assert len(steps_of(engine)) == steps_of(engine).nbytes == engine.stats.recorded_bytes == 0
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
    assert len(tapes.tapes) == 2
    engine = engine_of(tiny("llama"))
    same_tokens(engine, **prompt((5, 3)), **GREEDY)
    report = engine.explain()
    held = sum(tape.nbytes for tape in tapes.tapes[2:]) + 2 * 256 + 8 * (2 + 2 + 1)
    assert report.recorded_bytes == engine.stats.as_dict()["recorded_bytes"] == held > 0
    assert report.eval_bytes == report.kv_bytes + report.prepared_bytes + report.recorded_bytes
    assert "recorded decode steps" in str(report)
    kept = steps_of(engine)
    released = tapes.released
    engine.close()
    assert len(kept) == kept.nbytes == 0
    assert tapes.released > released


def test_the_recordings_that_served_longest_ago_go_first(
    tapes: type[TapeRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "_MOST", 2)
    with engine_of(tiny("llama")) as engine:
        for rows in (3, 2, 3, 1):
            same_tokens(engine, **prompt((4,) * rows), **GREEDY)
        assert sizes_of(engine) == [(3, 256), (1, 256)]


def test_engines_share_nothing_and_models_are_copied_as_before(tapes: type[TapeRecorder]) -> None:
    one, two = (engine_of(tiny("llama", seed)) for seed in (0, 1))
    for engine in (one, two, one):
        same_tokens(engine, **prompt((5, 3)), **GREEDY)
    assert len(tapes.tapes) == 2
    assert [sizes_of(engine) for engine in (one, two)] == [[(2, 256)]] * 2
    other = copy.deepcopy(one.module)
    stored = pickle.loads(pickle.dumps(other.state_dict()))
    assert all(map(torch.equal, stored.values(), one.module.state_dict().values()))
    two.close()
    same_tokens(one, **prompt((5, 3)), **GREEDY)
    assert len(tapes.tapes) == 2
    one.close()


def test_a_call_in_inference_mode_records_memory_that_later_calls_may_write(
    tapes: type[TapeRecorder],
) -> None:
    model = tiny("llama")
    want = hf_generate(model, **prompt((5, 3)), **GREEDY)
    with engine_of(model) as engine:
        with torch.inference_mode():
            assert torch.equal(engine.generate(**prompt((5, 3)), **GREEDY), want)
        assert torch.equal(engine.generate(**prompt((5, 3)), **GREEDY), want)
    assert len(tapes.tapes) == 1
