"""GRPO's arithmetic and its loop, on the plain model, so that no engine can hide a fault."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))  # as python does for the script

from arithmetic_grpo.loop import PARTS, GrpoSettings, TorchUpdate, learn, run_grpo  # noqa: E402
from arithmetic_grpo.models import disable_dropout, end_ids, small_llama  # noqa: E402
from arithmetic_grpo.objective import (  # noqa: E402
    clipped_objective,
    group_advantages,
    token_log_probs,
)
from arithmetic_grpo.rollout import PLAIN_SAMPLING, Rollout, Sampler, until_end  # noqa: E402
from arithmetic_grpo.task import Problem, write_out  # noqa: E402

SETTINGS: dict[str, Any] = {
    "iterations": 2,
    "prompts": 3,
    "samples": 4,
    "epochs": 2,
    "clip": 0.2,
    "temperature": 1.0,
    "lr": 1e-2,
    "rows_at_once": 0,
    "positions": True,
    "control": None,
    "seed": 0,
}


@dataclass
class Measured:
    seconds: dict[str, float]


class PlainEngine:
    """The engine's face on the plain model, so that the loop is tested and not the engine."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module: Any = module
        self.modes: list[str] = []
        self.stats = Measured({"decode": 5.0})

    def eval(self) -> None:
        self.modes.append("eval")
        self.module.eval()

    def train(self) -> None:
        self.modes.append("train")
        self.module.train()

    def __call__(self, **inputs: Any) -> Any:
        return self.module(**inputs)

    def generate(self, **inputs: Any) -> Tensor:
        self.stats.seconds["decode"] += 1e-6
        return self.module.generate(**inputs)


@pytest.fixture
def tiny() -> tuple[PlainEngine, Sampler]:
    torch.manual_seed(0)
    model, tokenizer = small_llama(hidden=32, layers=2)
    ends = end_ids(model, tokenizer, newline=False)
    return PlainEngine(model), Sampler(tokenizer, torch.device("cpu"), "", ends, 6)


def problems(*pairs: tuple[int, int]) -> list[Problem]:
    return [write_out(left, right) for left, right in pairs]


def snapshot(module: torch.nn.Module) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in module.state_dict().values()]


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# GRPO's arithmetic


def test_advantages_have_mean_zero_and_unit_spread_in_their_own_group() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    advantages = group_advantages(rewards)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(2))
    torch.testing.assert_close(advantages.std(1, correction=0), torch.ones(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(advantages[0, 0], torch.tensor(3.0).sqrt(), atol=1e-3, rtol=0)
    torch.testing.assert_close(advantages[:1], group_advantages(rewards[:1]))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_group_of_equal_rewards_has_no_advantage(value: float) -> None:
    assert not group_advantages(torch.full((2, 5), value)).any()


def test_only_the_first_end_counts_even_if_padding_is_the_same_id() -> None:
    ids = torch.tensor([[5, 1, 1, 1], [1, 5, 6, 7], [5, 6, 9, 1], [5, 6, 7, 8]])
    kept = until_end(ids, [1, 9]).sum(1)
    assert kept.tolist() == [2, 1, 3, 4]


def test_on_policy_the_gradient_is_the_plain_policy_gradient() -> None:
    log_probs = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    advantages = torch.tensor([1.5, -0.5, 0.0])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    loss, clipped = clipped_objective(log_probs, log_probs.detach(), advantages, mask, clip=0.2)
    loss.backward()
    torch.testing.assert_close(log_probs.grad, -advantages[:, None] * mask)
    assert clipped == 0


@pytest.mark.parametrize(
    ("shift", "advantage", "held"),
    [
        (0.5, 1.0, True),
        (-0.5, -1.0, True),
        (-0.5, 1.0, False),
        (0.5, -1.0, False),
        (0.1, 1.0, False),
    ],
)
def test_a_ratio_is_clipped_only_where_it_would_gain(
    shift: float, advantage: float, held: bool
) -> None:
    log_probs = torch.full((1, 1), shift, requires_grad=True)
    loss, clipped = clipped_objective(
        log_probs, torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1).bool(), clip=0.2
    )
    loss.backward()
    assert bool(clipped) is held
    assert (log_probs.grad == 0).all().item() is held


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("family", ["rotary", "learned"])
def test_the_log_probs_of_the_loss_are_those_the_tokens_were_sampled_with(
    tiny: tuple[PlainEngine, Sampler], family: str, temperature: float
) -> None:
    engine, sampler = tiny
    if family == "learned":  # where wrong positions of padded rows would show
        config = GPT2Config(n_layer=2, n_head=2, n_embd=32, vocab_size=384, eos_token_id=1)
        engine = PlainEngine(GPT2LMHeadModel(config).eval())
        disable_dropout(engine.module)
        torch.nn.init.normal_(engine.module.transformer.wpe.weight)
    asked = problems((3, 4), (17, 25), (1, 99))  # uneven: padded on the left
    torch.manual_seed(1)
    rollout = sampler(engine, asked, temperature=temperature, **PLAIN_SAMPLING)
    prompts = sampler.tokenizer(
        [p.prompt for p in asked], return_tensors="pt", padding=True, add_special_tokens=False
    )
    torch.manual_seed(1)
    again = engine.module.generate(
        input_ids=prompts.input_ids,
        attention_mask=prompts.attention_mask,
        max_new_tokens=sampler.max_new_tokens,
        temperature=temperature,
        return_dict_in_generate=True,
        output_scores=True,
        **PLAIN_SAMPLING,
    )
    assert torch.equal(again.sequences, rollout.ids)
    scores = torch.stack(again.scores, dim=1).log_softmax(-1)
    sampled = scores.gather(-1, rollout.ids[:, -rollout.new :, None])[..., 0]
    trained = token_log_probs(
        engine, rollout.ids, rollout.mask, rollout.new, temperature=temperature, positions=True
    )
    mask = rollout.completion_mask
    torch.testing.assert_close(trained[mask], sampled[mask], atol=1e-4, rtol=0)


# The loop


def made_up_rollout() -> Rollout:
    ids = torch.randint(3, 250, (4, 9), generator=torch.Generator().manual_seed(2))
    return Rollout(ids, torch.ones(4, 9).bool(), 5, ["", "", "", ""], 1.0)


def learned(
    tiny: tuple[PlainEngine, Sampler], rollout: Rollout, advantages: Tensor, **changes: Any
) -> float:
    model = tiny[0].module
    settings = GrpoSettings(**{**SETTINGS, **changes})
    optimizer = torch.optim.SGD(model.parameters(), lr=settings.lr)
    update = TorchUpdate(optimizer, frozen=settings.control == "frozen")
    return learn(tiny[0], update, rollout, advantages, settings)[2]


def test_learning_makes_good_samples_likelier_and_bad_ones_rarer(
    tiny: tuple[PlainEngine, Sampler],
) -> None:
    rollout, advantages = made_up_rollout(), torch.tensor([1.0, 1.0, -1.0, -1.0])

    def log_prob() -> Tensor:
        with torch.no_grad():
            return token_log_probs(
                tiny[0], rollout.ids, rollout.mask, 5, temperature=1.0, positions=True
            ).sum(1)

    before = log_prob()
    learned(tiny, rollout, advantages, epochs=1)
    assert ((log_prob() - before) * advantages > 0).all()


def test_a_frozen_control_changes_no_weight_and_the_same_loop_without_it_does(
    tiny: tuple[PlainEngine, Sampler],
) -> None:
    rollout, advantages = made_up_rollout(), torch.tensor([1.0, 1.0, -1.0, -1.0])
    before = snapshot(tiny[0].module)
    learned(tiny, rollout, advantages, control="frozen")
    assert same(before, snapshot(tiny[0].module))
    assert all(p.grad is None for p in tiny[0].module.parameters())
    learned(tiny, rollout, advantages)
    assert not same(before, snapshot(tiny[0].module))


def test_rows_at_once_bounds_memory_and_changes_no_gradient(
    tiny: tuple[PlainEngine, Sampler],
) -> None:
    rollout, advantages = made_up_rollout(), torch.tensor([1.0, 0.5, -1.0, -0.5])
    start = snapshot(tiny[0].module)
    learned(tiny, rollout, advantages, rows_at_once=0)
    whole = snapshot(tiny[0].module)
    names = list(tiny[0].module.state_dict())
    tiny[0].module.load_state_dict(dict(zip(names, start, strict=True)))
    learned(tiny, rollout, advantages, rows_at_once=3)
    for left, right in zip(whole, snapshot(tiny[0].module), strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=0)


def test_the_second_epoch_is_held_against_the_log_probs_of_the_first(
    tiny: tuple[PlainEngine, Sampler],
) -> None:
    rollout, advantages = made_up_rollout(), torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert learned(tiny, rollout, advantages, epochs=1, lr=100.0) == 0.0
    assert learned(tiny, rollout, advantages, epochs=2, lr=100.0) > 0.0


def test_the_loop_samples_in_eval_and_learns_in_train_mode(
    tiny: tuple[PlainEngine, Sampler],
) -> None:
    seen: list[Any] = []
    engine, sampler = tiny
    run_grpo(
        engine, sampler, problems((1, 2), (3, 4), (5, 6)), GrpoSettings(**SETTINGS), seen.append
    )
    assert engine.modes == ["eval", "train"] * 2
    assert [row.index for row in seen] == [1, 2]
    assert all(12 <= row.tokens <= 12 * sampler.max_new_tokens for row in seen)
    assert all(list(row.seconds) == list(PARTS) for row in seen)
    for row in seen:
        assert row.seconds["decode"] == pytest.approx(1e-6)
        assert min(row.seconds[name] for name in ("generate", "learn", "step", "other")) > 0


def test_dropout_is_off_however_a_family_spells_it() -> None:
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32))
    opt = OPTForCausalLM(
        OPTConfig(
            num_hidden_layers=1,
            hidden_size=16,
            word_embed_proj_dim=16,
            ffn_dim=16,
            num_attention_heads=2,
            vocab_size=32,
            dropout=0.5,
            attention_dropout=0.5,
            max_position_embeddings=16,
        )
    )
    ids = torch.arange(3, 9)[None]
    for model in (gpt2, opt):
        disable_dropout(model)
        model.train()
        assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
