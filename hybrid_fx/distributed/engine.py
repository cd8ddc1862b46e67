"""The engine's class: a DeepSpeedEngine that trains as it is and generates from rewritten graphs.

Take an initialised engine over with :func:`attach`; its class changes, the object stays.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from ..config import HybridConfig
from ..engine.engine import HybridEngine
from ..engine.stand_in import has, holder, refuse
from .block import HybridBlock
from .random_states import ranks_alike, say_alike
from .rank_board import RankBoard, open_board
from .seam import DeepSpeedEngine, free_gathered, is_sharded, share_rng_state
from .source import ShardedSource, WrappedSource
from .team import Team, make_team, world_size


class DeepSpeedHybridEngine(HybridEngine, DeepSpeedEngine):  # type: ignore[misc]
    """A ``DeepSpeedEngine`` with the generating of a :class:`~hybrid_fx.HybridEngine`.

    Forward, backward, step, checkpoints and attributes are DeepSpeed's. Under ZeRO-3
    :meth:`generate` is collective at its beginning, or with ``pin_parameters=False`` throughout:
    every rank calls it equally often; lengths and early stops may differ. With
    ``inference_tp_size`` it is collective as a whole in each team of ranks: prompts, numbers of
    rows (none too) and lengths may differ, other options must not. Edits of master weights by
    ``deepspeed.utils.safe_set_*`` are seen with the next step; after others that nothing can see,
    call :meth:`weights_changed` on any rank.

    Of several ranks, rank 0 logs the latencies of all in one line, see
    :class:`~hybrid_fx.distributed.rank_board.RankBoard`; :attr:`stats` are this rank's own.
    """

    _board: RankBoard | None
    _sync_rng: str

    __call__ = DeepSpeedEngine.__call__
    __getattr__ = DeepSpeedEngine.__getattr__
    __deepcopy__ = None  # type: ignore[assignment]
    __dir__ = DeepSpeedEngine.__dir__
    __repr__ = DeepSpeedEngine.__repr__
    forward = DeepSpeedEngine.forward

    def __setattr__(self, name: str, value: Any) -> None:
        """A public name that the model alone has is the model's; others are DeepSpeed's.

        Raises:
            AttributeError: for one that a hybrid engine adds.
        """
        found = self._holder(name)
        if found is self:
            DeepSpeedEngine.__setattr__(self, name, value)
        else:
            setattr(found, name, value)

    def __delattr__(self, name: str) -> None:
        found = self._holder(name)
        if found is self:
            DeepSpeedEngine.__delattr__(self, name)
        else:
            delattr(found, name)

    def _holder(self, name: str) -> nn.Module:
        """What ``name`` is set on."""
        if name.startswith("_") or "_added" not in vars(self):
            return self
        if name in _ADDED:
            refuse(name)
        model: nn.Module = self.module
        found = holder(model, name)
        return found if has(found, name) and not has(self, name) else self

    @property
    def options(self) -> HybridConfig:
        """The options of generating; ``config`` is DeepSpeed's."""
        return self._options

    def train(self, mode: bool = True) -> DeepSpeedHybridEngine:
        """As of a :class:`HybridEngine`."""
        if not mode:
            return self.eval()
        DeepSpeedEngine.train(self)
        self._begin_training()
        return self

    def eval(self) -> DeepSpeedHybridEngine:
        """As of a :class:`HybridEngine`; under ZeRO-3 also frees what DeepSpeed keeps gathered."""
        DeepSpeedEngine.eval(self)
        if self._source.sharded:
            free_gathered(self)
        self._begin_generating()
        return self

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As of a :class:`HybridEngine`. ``synced_gpus`` is accepted: ranks may end at any length.

        Under ZeRO-3, and in a team of ranks, a call whose arguments are refused on one rank
        raises on all of them.

        Raises:
            InputError: as of a :class:`HybridEngine`; and where the options of a team differ.
            RankError: where another rank raised, or is gone.
        """
        # Left to itself, transformers keeps the ranks of ZeRO-3 in step at each token.
        if len(args) > _BEFORE_SYNCED:
            args = (*args[:_BEFORE_SYNCED], False, *args[_BEFORE_SYNCED + 1 :])
        elif self._source.collective or "synced_gpus" in kwargs:
            kwargs["synced_gpus"] = False
        try:
            return super().generate(*args, **kwargs)
        finally:
            self._look_at_board()

    def step(self, *args: Any, **kwargs: Any) -> None:
        """DeepSpeed's step. Where it changed the weights, they have another version.

        Between the boundaries of gradient accumulation, and on overflow, it did not.
        """
        before = self._tracker.raised
        DeepSpeedEngine.step(self, *args, **kwargs)
        if self.was_step_applied() and self._tracker.raised == before:
            self._tracker.mark("DeepSpeedEngine.step()")
            self._after_step()
        self._look_at_board()

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """DeepSpeed's; the weights have another version afterwards."""
        try:
            return DeepSpeedEngine.load_checkpoint(self, *args, **kwargs)
        finally:
            self._tracker.mark("load_checkpoint()")

    def _look_at_board(self) -> None:
        if self._board is not None:
            self._board.look()

    def fuse_lora_weight(self) -> None:
        """Does nothing: adapters are folded into prepared weights, never into the model's."""

    def unfuse_lora_weight(self) -> None:
        """Does nothing, see :meth:`fuse_lora_weight`."""

    def close(self) -> None:
        """As of a :class:`HybridEngine`; what is left is the DeepSpeedEngine of before."""
        super().close()
        if self._board is not None:
            self._board.flush()
        self.__class__ = self._plain_class
        for name in self._added:
            self.__dict__.pop(name, None)


#: Public names that a hybrid engine has and DeepSpeed's has not.
_ADDED = {"stats", *dir(DeepSpeedHybridEngine)} - set(dir(DeepSpeedEngine))

#: Arguments of transformers' generate before ``synced_gpus``.
_BEFORE_SYNCED = 5


def attach(
    engine: Any, options: HybridConfig, block: HybridBlock, sync_rng: str
) -> DeepSpeedHybridEngine:
    """Give an initialised DeepSpeedEngine the generating of a hybrid engine. Collective.

    Args:
        sync_rng: Which ranks take over one random state, see :mod:`.random_states`.

    Raises:
        ConfigError: where ``inference_tp_size`` does not divide the ranks; nothing was changed.
    """
    team = make_team(block.inference_tp_size, engine.mpu)
    if any(is_sharded(parameter) for parameter in engine.module.parameters()):
        layers, pinned = block.tp_gather_partition_size, block.pin_parameters
        source: WrappedSource = ShardedSource(engine.module, team, layers, pinned=pinned)
    else:
        source = WrappedSource(engine.module, team)
    plain = type(engine)
    kind: type = DeepSpeedHybridEngine
    if plain is not DeepSpeedEngine:
        kind = type(f"Hybrid{plain.__name__}", (DeepSpeedHybridEngine, plain), {})
    before = set(vars(engine))
    engine.__class__ = kind
    try:
        engine._begin(source, options)
        engine._board = open_board(lambda: int(engine.global_steps))
        if engine._board is not None:
            engine.stats.on_record = engine._board.close
        _share_random_state(sync_rng, team)
    except BaseException:
        engine.__class__ = plain
        raise
    engine._plain_class, engine._added, engine._sync_rng = plain, (), sync_rng
    engine._added = tuple(set(vars(engine)) - before)
    hybrid: DeepSpeedHybridEngine = engine
    return hybrid


def _share_random_state(choice: str, team: Team | None) -> None:
    who = ranks_alike(choice, world_size() or 1, 1 if team is None else team.size)
    if not who:
        return
    if choice == "all" or team is None:
        share_rng_state()
    else:
        share_rng_state(team.ranks[0], team.rounds)
    if dist.get_rank() == 0:
        say_alike(who, choice)
