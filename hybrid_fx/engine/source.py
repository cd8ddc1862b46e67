"""A model as the engine sees it: how it is read, where its tensors are, what other ranks want."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from ..cache.stamp import Stamp, structure_stamp
from ..cache.tree import View
from ..generate import Runner
from ..passes.collectives import Group
from ..runtime import PlanRunner
from ..runtime.prepared import Gather
from ..runtime.session import Timer
from ..runtime.streamed import Stream


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What one rank wants of a generate, or what any of them wants.

    Attributes:
        prepare: Make the prepared tensors anew.
        prove: Hold the plan against the model before, which takes all weights at once.
        whole: Run the module itself, which takes all weights as long as it runs.
    """

    prepare: bool = False
    prove: bool = False
    whole: bool = False


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, by all of its qualified names."""
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    return found | dict(model.named_buffers(remove_duplicate=False))


class Source:
    """A model in one process, whole: the weights are its parameters.

    Attributes:
        model: What the user holds.
        view: What of its modules is its own.
        gather: Makes the arguments of a prepare graph whole; ``None`` where they are.
        stream: Makes the weights of each layer whole while a graph runs; ``None`` where all are
            made whole before.
        sharded: Whether no process has all of the weights, so that generating is collective.
        shard: Which rank of how many compute the model together.
        group: Their collectives within a forward; ``None`` where that is one.
    """

    view: View
    gather: Gather | None
    stream: Stream | None
    sharded: bool
    shard: tuple[int, int]
    group: Group | None

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.view = View()
        self.gather = None
        self.stream = None
        self.sharded = False
        self.shard = (0, 1)
        self.group = None

    @property
    def collective(self) -> bool:
        """Whether ranks generate together, so that each must call generate where others do."""
        return self.sharded or self.joint

    @property
    def joint(self) -> bool:
        """Whether several ranks compute each forward together."""
        return self.shard[1] > 1

    @property
    def in_part(self) -> bool:
        """Whether no rank is to hold all weights at once: they are shared, or come and go."""
        return self.stream is not None or (self.sharded and self.joint)

    def stamp(self) -> Stamp:
        """See :func:`hybrid_fx.cache.stamp.structure_stamp`."""
        return structure_stamp(self.model, view=self.view)

    def structure(self) -> nn.Module:
        """The module to read a key from and to trace; never run. Shapes are those of the whole."""
        return self.model

    def runnable(self) -> nn.Module:
        """The module that transformers' generate is called on, for one call."""
        return self.model

    def tensors(self) -> dict[str, Tensor]:
        """The arguments of a prepare graph: what holds each parameter and buffer, by its names."""
        return tensors_of(self.model)

    def whole(self, timer: Timer) -> dict[str, Tensor]:
        """Every parameter and buffer whole, by its names. Collective where sharded."""
        return self.tensors()

    def disguise(self, change: Callable[[str, Tensor], Tensor]) -> AbstractContextManager[None]:
        """Meanwhile, what is gathered is handed over as ``change(name, whole)`` gives it."""
        return nullcontext()

    def fill(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Give ``model``, of :meth:`runnable`, the weights of :meth:`whole`, to run on."""

    def begin(self) -> None:
        """A generate begins. What follows up to :meth:`finish` is collective where sharded."""

    def agree(self, ask: Ask, contract: str) -> Ask:
        """What any rank wants; ``contract`` is the text that must be the same on all of them.

        Raises:
            RankError: where another rank raised, or has another contract.
        """
        return ask

    def say(self, settings: Mapping[str, str]) -> None:
        """What this generate was asked for, where ranks that generate together must ask alike."""

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which of ``flags`` any rank raises, of those that compute forwards together.

        Raises:
            RankError: where another rank raised.
        """
        return flags

    def prepared(self) -> None:
        """All is gathered and prepared: what follows are forwards.

        Raises:
            RankError: where another rank raised before it came this far.
        """

    def joined(self, runner: PlanRunner, timer: Timer) -> Runner:
        """What generates from ``runner``: itself, or all ranks of a team together."""
        return runner

    def finish(self) -> None:
        """The generate has ended well on this rank.

        Raises:
            RankError: where it ended in an error on another one.
        """

    def abandon(self) -> None:
        """The generate ends in an error on this rank; tell the others."""

    def release(self) -> None:
        """Give back what is kept for the next gather."""
