"""Models inside a DeepSpeed engine, as the engine sees them: ZeRO 0 to 2 whole, ZeRO-3 sharded.

With a team the ranks of it run each forward together, see :mod:`hybrid_fx.runtime.joint`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.source import Ask, Source
from ..engine.switch import GenerateSwitch
from ..errors import RankError
from ..generate import Runner
from ..passes.layers import layer_of
from ..runtime import PlanRunner
from ..runtime.joint import JointRunner
from ..runtime.session import Timer
from .agreement import digest_of, tell_apart
from .lockstep import Lockstep, Words
from .seam import DeepSpeedView, is_sharded, shard_of
from .shards import BUCKET_BYTES, Shard, ShardGather, buckets, gather
from .stream import FORWARD, ShardStream
from .team import Team
from .twin import outline, twin


class WrappedSource(Source):
    """A model whose parameters are whole, below hooks that are not the model's.

    With a team, a generate is collective in it: ranks agree at its beginning, run forwards
    together, and wait at its end until all have finished.

    Args:
        model: What the user holds.
        team: The ranks that compute it together; ``None``: this one alone.
    """

    def __init__(self, model: nn.Module, team: Team | None = None) -> None:
        super().__init__(model)
        self.view = DeepSpeedView()
        self._team = team
        self._joint: JointRunner | None = None
        self._settings: Mapping[str, str] = {}
        #: In which a team says what it appends, and in which all ranks agree; here the same.
        self._rounds = self._ranks = None if team is None else self._lockstep(team.rounds)
        if team is not None:
            self.shard, self.group = (team.rank, team.size), team.forward

    def _lockstep(self, group: Any) -> Lockstep:
        return Lockstep(group, self._device)

    def _device(self) -> torch.device:
        return next(iter(self.model.parameters())).device

    def structure(self) -> nn.Module:
        """A twin on the very parameters."""
        return self.runnable()

    def runnable(self) -> nn.Module:
        """A twin on the very parameters; those that are sharded stay released."""
        copy = twin(self.model, self.view, lambda parameter: parameter)
        switch = vars(copy).pop("generate", None)
        own = switch.shadowed if isinstance(switch, GenerateSwitch) else switch
        if own is not None:
            vars(copy)["generate"] = own
            if isinstance(own, MethodType) and own.__self__ is self.model:
                vars(copy)["generate"] = MethodType(own.__func__, copy)
        return copy

    def begin(self) -> None:
        """A generate begins."""
        self._joint, self._settings = None, {}
        if self._ranks is not None:
            self._ranks.begin()

    def say(self, settings: Mapping[str, str]) -> None:
        """What this generate was asked for; the ranks of a team must ask alike."""
        self._settings = settings

    def agree(self, ask: Ask, contract: str) -> Ask:
        """Every rank says what it wants; what any of them wants is done by all.

        Raises:
            InputError: where the settings of a team differ.
        """
        if self._ranks is None:
            return ask
        settings = digest_of(self._settings) if self._team else 0
        digest = int.from_bytes(hashlib.sha256(contract.encode()).digest()[:7])
        said = self._ranks.step(ask.prepare, ask.prove, ask.whole, digest, settings)
        rows = [words for words in said if words is not None]
        if len({row[3] for row in rows}) > 1:
            raise RankError(
                "the ranks would not compute the same: their models differ in structure, in hooks "
                "or in the state of adapters; make the same changes on every rank"
            )
        if len({row[4] for row in self._mates(rows)}) > 1:
            assert self._rounds is not None
            tell_apart(self._settings, self._rounds, self._device())
        prepare, prove, whole = (any(row[i] for row in rows) for i in range(3))
        return Ask(prepare=prepare, prove=prove, whole=whole)

    def _mates(self, rows: list[Words]) -> list[Words]:
        """What the ranks of the team said, among those that agree."""
        return rows

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Which of ``flags`` any rank raises; waits for all of a team."""
        if self._ranks is None or self._team is None:
            return flags
        rows = [words for words in self._ranks.step(*flags) if words is not None]
        return tuple(any(row[i] for row in rows) for i in range(len(flags)))

    def joined(self, runner: PlanRunner, timer: Timer) -> Runner:
        """What generates from ``runner``: itself, or the team together."""
        if self._rounds is None or self._team is None:
            return runner
        if self._joint is None:
            self._joint = JointRunner(runner, self._rounds, self._team.rank, timer)
        return self._joint

    def finish(self) -> None:
        """Wait until the generate has ended on all ranks; run forwards for them."""
        if self._rounds is not None:
            self._rounds.finish(self._serve)
        self._joint = None

    def _serve(self, said: list[Words | None]) -> None:
        if self._joint is None:
            raise RankError(
                "other ranks of the team generate from rewritten graphs, which this rank has not"
            )
        self._joint.serve(said)

    def abandon(self) -> None:
        """Let the generate of the other ranks fail."""
        self._joint = None
        if self._rounds is not None:
            self._rounds.fail()


class ShardedSource(WrappedSource):
    """A model that ZeRO-3 took apart: each rank holds a shard of every parameter.

    A generate is collective at its beginning, where ranks agree on what it takes and gather
    weights where any of them wants it (an edit may touch the shard of one rank alone), and at its
    end, where each learns whether it went well on all. Unless ``pinned``, each forward is too:
    layers gather their own weights then, and only what stands outside of them is gathered before.

    Args:
        layers: How many layers one gather of a team may reach over.
        pinned: Whether all weights are gathered before generating.
    """

    gather: ShardGather
    stream: ShardStream | None

    def __init__(
        self,
        model: nn.Module,
        team: Team | None = None,
        layers: int = 8,
        *,
        pinned: bool = True,
    ) -> None:
        super().__init__(model, team)
        self.sharded = True
        shards = (shard_of(p) for p in model.parameters() if is_sharded(p))
        # Teams may lie across the groups of shards: then all ranks agree.
        self._ranks: Lockstep = self._lockstep(next(shards).group if team is None else None)
        self._forwards = False
        self.gather = ShardGather(
            self._shards,
            self._lent,
            announce=self._announce,
            limit=BUCKET_BYTES if pinned else 0,
            layers=None if team is None else layers,
        )
        if not pinned:
            staging = self.gather.staging
            self.stream = ShardStream(self._shards, ranks=self._ranks, staging=staging)

    def structure(self) -> nn.Module:
        """A twin whose sharded parameters have their shapes and no memory."""

        def drawn(parameter: nn.Parameter) -> nn.Parameter:
            if not is_sharded(parameter):
                return parameter
            return outline(self.view.shape(parameter), parameter)

        copy = twin(self.model, self.view, drawn)
        vars(copy).pop("generate", None)
        return copy

    def tensors(self) -> dict[str, Tensor]:
        """Each parameter's shard, each buffer as it is."""
        found = super().tensors()
        return {name: self.view.held(name, tensor)[1] for name, tensor in found.items()}

    def whole(self, timer: Timer) -> dict[str, Tensor]:
        """All parameters gathered, in a few collectives; each tied one once."""
        made: dict[int, Tensor] = {}
        with timer("gather"):
            for bucket in buckets(list(self._shards().values())):
                parts = (id(shard.part) for shard in bucket)
                whole = gather(bucket, self.gather.staging, self._announce)
                made |= dict(zip(parts, whole, strict=True))
        return {name: made.get(id(held), held) for name, held in self.tensors().items()}

    def fill(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Make the twin ``model`` whole."""
        made: dict[int, nn.Parameter] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for name, own in module._parameters.items():
                if own is not None and is_sharded(own):
                    tensor = weights[f"{path}.{name}" if path else name]
                    made.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
                    module._parameters[name] = made[id(tensor)]

    def begin(self) -> None:
        """A generate begins."""
        super().begin()
        self._forwards = False
        if self._rounds is not None:
            self._rounds.begin()

    def _mates(self, rows: list[Words]) -> list[Words]:
        """Of all ranks, those of the team."""
        return [] if self._team is None else [rows[rank] for rank in self._team.ranks]

    def prepared(self) -> None:
        """From here on a team is on its own, until all have finished."""
        if self._rounds is not None:
            self._ranks.same()
            self._forwards = True

    def finish(self) -> None:
        """Wait until the generate has ended on all ranks; run forwards for those of the team."""
        super().finish()
        self._forwards = False
        self._ranks.finish(self._gathers_on)
        self._end_stream()

    def _gathers_on(self, said: list[Words | None]) -> None:
        if self.stream is None or any(words and words[0] != FORWARD for words in said):
            raise RuntimeError("a rank has ended a generate in which others still gather")
        self.stream.serve()

    def abandon(self) -> None:
        """Let the generate of the other ranks fail: of the team first, while it is on its own."""
        if self._forwards:
            super().abandon()
        self._ranks.fail()
        self._end_stream()

    def _end_stream(self) -> None:
        if self.stream is not None:
            self.release()

    @contextmanager
    def disguise(self, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """Hand weights over as ``change(name, whole)`` meanwhile; a tied one by its first name."""
        names = {id(held): name for name, held in reversed(self.tensors().items())}

        def changed(part: Tensor, whole: Tensor) -> Tensor:
            return change(names[id(part)], whole)

        gathering = [one for one in (self.gather, self.stream) if one is not None]
        try:
            for one in gathering:
                one.change = changed
            yield
        finally:
            for one in gathering:
                one.change = None

    def _announce(self, nbytes: int) -> None:
        """The next collective makes weights of ``nbytes`` whole, on all ranks."""
        self._ranks.same(nbytes)

    def release(self) -> None:
        """Free the memory of the collectives."""
        self.gather.staging.release()

    def _shards(self) -> dict[int, Shard]:
        named = self.model.named_parameters()
        found = (shard_of(p, layer_of(name) or "") for name, p in named if is_sharded(p))
        return {id(shard.part): shard for shard in found}

    def _lent(self) -> frozenset[int]:
        return frozenset(held.untyped_storage()._cdata for held in self.tensors().values())
