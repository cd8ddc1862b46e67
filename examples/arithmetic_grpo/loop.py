"""The GRPO loop: sample with ``eval()``, judge, learn with ``train()``, again."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .clock import now
from .objective import clipped_objective, group_advantages, token_log_probs
from .rollout import PLAIN_SAMPLING, Rollout, Sampler
from .task import Problem, reward


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoSettings:
    """Settings of the loop.

    Attributes:
        epochs: Updates per rollout; above 1 the later ones are off policy, and clipped.
        rows_at_once: Bounds the memory of a backward; 0 takes all rows.
        positions: Whether the model's forward takes ``position_ids``.
        control: None, ``"frozen"`` (no optimizer step) or ``"shuffled"`` (rewards change owners).
    """

    iterations: int
    prompts: int
    samples: int
    epochs: int
    clip: float
    temperature: float
    lr: float
    rows_at_once: int
    positions: bool
    control: str | None
    seed: int


#: Where the time of an iteration goes, in order; the first five are the rollout.
PARTS = ("gather", "prepare", "prefill", "decode", "generate", "learn", "step", "other")


@dataclass(frozen=True, slots=True)
class Iteration:
    """What one iteration did.

    Attributes:
        reward: Mean over the samples.
        tokens: Sampled tokens.
        seconds: Wall time of each of :data:`PARTS`. ``gather`` (of sharded weights), ``prepare``,
            ``prefill`` and ``decode`` are what the engine measured, ``generate`` is the rest of
            ``eval`` and ``generate``, waits for other ranks included, ``learn`` forward and
            backward, ``step`` gradient norm and optimizer, ``other`` tokenizing and judging.
        clipped: Fraction of tokens whose ratio was clipped, over all epochs.
    """

    index: int
    reward: float
    tokens: int
    seconds: Mapping[str, float]
    clipped: float

    @property
    def total(self) -> float:
        """Seconds of the whole iteration."""
        return sum(self.seconds.values())

    @property
    def rollout(self) -> float:
        """Seconds of ``generate``, weights prepared for it included."""
        return sum(self.seconds[name] for name in PARTS[:5])


class Update(Protocol):
    """One update of the weights, from one backward or several."""

    def backward(self, loss: torch.Tensor, *, last: bool) -> None: ...
    def step(self) -> None: ...


class TorchUpdate:
    """An update by an optimizer of torch; a frozen one leaves out ``optimizer.step()`` alone."""

    def __init__(self, optimizer: torch.optim.Optimizer, *, frozen: bool = False) -> None:
        self._optimizer, self._frozen = optimizer, frozen
        self._trained = [p for group in optimizer.param_groups for p in group["params"]]

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Add the gradients of ``loss``."""
        loss.backward()

    def step(self) -> None:
        """Clip, step, and drop the gradients."""
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        if not self._frozen:
            self._optimizer.step()
        self._optimizer.zero_grad()


def split_rollout(whole: float, engine: Any, before: Mapping[str, float]) -> dict[str, float]:
    """Return ``whole`` seconds of eval and generate, split by what ``engine.stats`` measured.

    Args:
        before: ``engine.stats.seconds`` as they were before.
    """
    after = engine.stats.seconds
    parts = {name: after.get(name, 0.0) - before.get(name, 0.0) for name in PARTS[:4]}
    return {**parts, "generate": max(0.0, whole - sum(parts.values()))}


def judge(problems: Sequence[Problem], texts: Sequence[str], samples: int) -> torch.Tensor:
    """Return rewards [G, samples] float32 of ``texts``, which stand problem by problem."""
    answers = (problem.answer for problem in problems for _ in range(samples))
    earned = [reward(text, answer) for text, answer in zip(texts, answers, strict=True)]
    return torch.tensor(earned).view(len(problems), samples)


def learn(
    engine: Any,
    update: Update,
    rollout: Rollout,
    advantages: torch.Tensor,
    settings: GrpoSettings,
) -> tuple[float, float, float]:
    """Update the model ``epochs`` times on one rollout.

    The first epoch is on policy: its log-probabilities are the old ones of the later epochs, so the
    ratio is exactly 1 there.

    Returns:
        Seconds of forward and backward, seconds of the optimizer, fraction of tokens clipped.
    """
    mask = rollout.completion_mask
    device = mask.device
    rows = settings.rows_at_once or len(mask)
    parts = [slice(start, start + rows) for start in range(0, len(mask), rows)]
    old: list[torch.Tensor] = []
    learn_seconds = step_seconds = clipped = 0.0
    for epoch in range(settings.epochs):
        start = now(device)
        for number, part in enumerate(parts):
            log_probs = token_log_probs(
                engine,
                rollout.ids[part],
                rollout.mask[part],
                rollout.new,
                temperature=settings.temperature,
                positions=settings.positions,
            )
            if epoch == 0:
                old.append(log_probs.detach())
            loss, held = clipped_objective(
                log_probs, old[number], advantages[part], mask[part], clip=settings.clip
            )
            update.backward(loss / rollout.tokens, last=number == len(parts) - 1)
            clipped += float(held)
        middle = now(device)
        update.step()
        learn_seconds += middle - start
        step_seconds += now(device) - middle
    return learn_seconds, step_seconds, clipped / (rollout.tokens * settings.epochs)


def run_grpo(
    engine: Any,
    sampler: Sampler,
    problems: Sequence[Problem],
    settings: GrpoSettings,
    report: Callable[[Iteration], None],
    update: Update | None = None,
) -> list[Iteration]:
    """Run the loop on ``engine`` (what ``hybrid_fx.hybridize`` returns); ``report`` sees each.

    Args:
        update: Who changes the weights; by default AdamW of torch.
    """
    draw = random.Random(settings.seed)
    trained = [p for p in engine.module.parameters() if p.requires_grad]
    device = trained[0].device
    if update is None:
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
        update = TorchUpdate(optimizer, frozen=settings.control == "frozen")
    history: list[Iteration] = []
    for index in range(1, settings.iterations + 1):
        start = now(device)
        chosen = draw.sample(problems, settings.prompts)
        measured = dict(engine.stats.seconds)
        engine.eval()
        switched = now(device) - start
        rollout = sampler(
            engine,
            chosen,
            num_return_sequences=settings.samples,
            temperature=settings.temperature,
            **PLAIN_SAMPLING,
        )
        seconds = split_rollout(switched + rollout.seconds, engine, measured)
        rewards = judge(chosen, rollout.texts, settings.samples)
        earned = float(rewards.mean())
        if settings.control == "shuffled":
            rewards = rewards.flatten()[torch.randperm(rewards.numel())].view_as(rewards)
        advantages = group_advantages(rewards).flatten().to(device)
        engine.train()
        seconds["learn"], seconds["step"], clipped = learn(
            engine, update, rollout, advantages, settings
        )
        seconds["other"] = now(device) - start - sum(seconds.values())
        history.append(Iteration(index, earned, rollout.tokens, seconds, clipped))
        report(history[-1])
    return history
