"""Models inside a DeepSpeed engine, as the engine sees them: ZeRO 0 to 2 whole, ZeRO-3 sharded."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MethodType

from torch import Tensor, nn

from ..engine.source import Ask, Source
from ..engine.switch import GenerateSwitch
from ..errors import RankError
from ..runtime.session import Timer
from .lockstep import Lockstep, Words
from .seam import DeepSpeedView, is_sharded, shard_of
from .shards import Shard, ShardGather, buckets, gather
from .twin import outline, twin


class WrappedSource(Source):
    """A model whose parameters are whole, below hooks that are not the model's."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.view = DeepSpeedView()

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


class ShardedSource(WrappedSource):
    """A model that ZeRO-3 took apart: each rank holds a shard of every parameter.

    A generate is collective at its beginning, where ranks agree on what it takes and gather
    weights where any of them wants it (an edit may touch the shard of one rank alone), and at its
    end, where each learns whether it went well on all.
    """

    gather: ShardGather

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.sharded = True
        group = next(shard_of(p).group for p in model.parameters() if is_sharded(p))
        self._ranks = Lockstep(group, lambda: next(iter(model.parameters())).device)
        self.gather = ShardGather(self._shards, self._lent, announce=self._announce)

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
        self._ranks.begin()

    def agree(self, ask: Ask, contract: str) -> Ask:
        """Every rank says what it wants; what any of them wants is done by all."""
        digest = int.from_bytes(hashlib.sha256(contract.encode()).digest()[:7])
        said = self._ranks.step(ask.prepare, ask.prove, ask.whole, digest)
        rows = [words for words in said if words is not None]
        if len({row[3] for row in rows}) > 1:
            raise RankError(
                "the ranks would gather different weights: their models differ in structure, in "
                "hooks or in the state of adapters; make the same changes on every rank"
            )
        prepare, prove, whole = (any(row[i] for row in rows) for i in range(3))
        return Ask(prepare=prepare, prove=prove, whole=whole)

    def finish(self) -> None:
        """Wait until the generate has ended on all ranks."""
        self._ranks.finish(self._serve)

    def _serve(self, said: list[Words | None]) -> None:
        raise RuntimeError("a rank has ended a generate in which others still gather")

    def abandon(self) -> None:
        """Let the generate of the other ranks fail."""
        self._ranks.fail()

    def _announce(self, nbytes: int) -> None:
        """The next collective makes weights of ``nbytes`` whole, on all ranks."""
        self._ranks.same(nbytes)

    def release(self) -> None:
        """Free the memory of the collectives."""
        self.gather.staging.release()

    def _shards(self) -> dict[int, Shard]:
        found = (shard_of(p) for p in self.model.parameters() if is_sharded(p))
        return {id(shard.part): shard for shard in found}

    def _lent(self) -> frozenset[int]:
        return frozenset(held.untyped_storage()._cdata for held in self.tensors().values())
