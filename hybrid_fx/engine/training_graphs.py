"""Training on the captured graph: from a call of the engine to loss and logits.

A graph belongs to a structure of the model and to the set of arguments it is called with. Each is
captured once, kept in memory and on the disk, and proven on the live model before its first use.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..cache.key import StructureKey
from ..cache.stamp import structure_stamp
from ..capture import assumptions, capture_call
from ..config import HybridConfig
from ..errors import CaptureError, StrictError
from ..generate import causal_lm
from ..plan.plan import Plan
from ..plan.training import build_training_plan
from ..runtime.configured import loss_of
from ..runtime.training import TrainingRunner
from .attempt import capture_once
from .plans import find_plan, open_cache
from .proof import said
from .source import tensors_of
from .stats import Stats
from .training_call import TrainingCall, read_call
from .training_proof import Proof, prove, without_checkpointing

logger = logging.getLogger("hybrid_fx")

#: Structures of one model whose graphs are kept bound: adapters on and off, and some more.
_KEPT = 4
_NO_MEMORY = (MemoryError, torch.OutOfMemoryError)


@dataclass
class _Structure:
    """The graphs of one structure.

    Attributes:
        modules: Of the model: kept, so that the addresses in a stamp stay theirs.
        digest: Of the structure's key.
        runners: By the arguments of a call; or why there is none.
        built: The arguments whose plan was made here and now, and not read from the disk.
        proofs: By the arguments and their kind.
    """

    modules: list[nn.Module]
    digest: str
    runners: dict[str, TrainingRunner | str] = field(default_factory=dict)
    built: set[str] = field(default_factory=set)
    proofs: dict[tuple[Any, ...], Proof] = field(default_factory=dict)


def _uncached_autocast(device: str) -> AbstractContextManager[Any]:
    """The caller's autocast, without its cache: what is proven must not be kept there."""
    if not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, torch.get_autocast_dtype(device), cache_enabled=False)


class TrainingGraphs:
    """The training graphs of one model, kept in step with it.

    Args:
        lock: Held while a graph is captured and proven, as while generating.

    Attributes:
        plan: Of the graph that served last, or ``None``.
        failure: Why the latest call that was not served ran as the module, or "".
    """

    def __init__(
        self,
        model: nn.Module,
        config: HybridConfig,
        stats: Stats,
        lock: AbstractContextManager[Any],
    ) -> None:
        self._model = model
        self._config = config
        self._stats = stats
        self._lock = lock
        self._cache = open_cache(config)
        self._structures: OrderedDict[Any, _Structure] = OrderedDict()
        self.plan: Plan | None = None
        self.failure = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What ``model(*args, **kwargs)`` returns, from the graph where it serves the call.

        Raises:
            StrictError: under ``strict=True``, where it does not.
        """
        causal: Any = causal_lm(self._model)
        call = self._refuse() or read_call(self._model, causal, args, kwargs)
        found = call if isinstance(call, str) else self._ready(causal, call)
        if isinstance(call, str) or isinstance(found, str):
            self.failure = f"training forward: {found}"
            self._stats.fallback(self.failure)
            if self._config.strict:
                raise StrictError(
                    f"{self.failure}; set strict=False to run such calls as the module"
                )
            return self._model(*args, **kwargs)
        runner, proof = found
        self.plan = runner.plan
        self._stats.count("train_graph_calls")
        logits = runner.logits(
            call.input_ids,
            call.attention_mask,
            call.position_ids,
            keep=call.keep,
            cached=call.cached,
        )
        loss = None if call.labels is None else loss_of(causal, logits, call.labels, {**call.loss})
        output = proof.output(loss=loss, logits=logits)
        return output if call.return_dict else output.to_tuple()

    def _refuse(self) -> str:
        """Why nothing runs from graphs here and now, or ""."""
        if torch.is_inference_mode_enabled():
            return "inference mode is on"
        for path, module in self._model.named_modules():
            if module._backward_hooks or module._backward_pre_hooks:
                return f"a backward hook on {path or 'the model'}"
        return ""

    def _ready(self, causal: Any, call: TrainingCall) -> tuple[TrainingRunner, Proof] | str:
        """A runner that serves ``call``, proven; or why there is none."""
        device = call.input_ids.device.type
        names = " ".join(f"{name}:{dtype}" for name, dtype in call.given.items())
        if torch.is_autocast_enabled(device):
            names += f" under autocast:{torch.get_autocast_dtype(device)}"
        with self._lock, _uncached_autocast(device):
            return self._proven(causal, call, names)

    def _proven(
        self, causal: Any, call: TrainingCall, names: str
    ) -> tuple[TrainingRunner, Proof] | str:
        try:
            structure = self._structure()
        except _NO_MEMORY:
            raise
        except Exception as error:  # a model that cannot be read trains all the same
            return said(error)
        runner = structure.runners.get(names)
        if runner is None:
            runner = structure.runners[names] = self._bind(structure, names, call)
        if isinstance(runner, str):
            return runner
        if runner.reads_positions and call.position_ids is not None:
            return "its attention implementation may look at position_ids"
        kept = "all" if type(call.keep) is int and not call.keep else type(call.keep)
        kind = (names, kept, call.cached)
        if kind not in structure.proofs:
            proof = self._prove(causal, runner, call)
            if proof.difference and names not in structure.built:
                warnings.warn(
                    f"hybrid_fx: the stored training plan of {type(causal).__name__} is not used "
                    f"({proof.difference}); the model is captured again and the file replaced",
                    RuntimeWarning,
                    stacklevel=2,
                )
                runner = structure.runners[names] = self._bind(structure, names, call, fresh=True)
                if isinstance(runner, str):
                    return runner
                proof = self._prove(causal, runner, call)
            if not proof.settled:
                return "its loss is not finite, which proves nothing about its graph"
            structure.proofs[kind] = proof
            if proof.difference:
                logger.warning(
                    "%s trains as its module: %s", type(causal).__name__, proof.difference
                )
        proof = structure.proofs[kind]
        if proof.difference:
            return f"its graph does not reproduce the module: {proof.difference}"
        return runner, proof

    def _prove(self, causal: Any, runner: TrainingRunner, call: TrainingCall) -> Proof:
        tensors = tensors_of(self._model)
        looks = call.position_ids is not None and call.attention_mask is None and not call.cached
        try:
            proof = prove(self._model, causal, runner, tensors, call)
            if proof.difference and looks and runner.packing:
                runner.packing = False
                proof = prove(self._model, causal, runner, tensors, call)
        except Exception as error:  # whatever fails on the small batch, the module may do
            return Proof(type(None), said(error))
        return proof

    def _structure(self) -> _Structure:
        stamp = structure_stamp(self._model, training=True)
        found = self._structures.get(stamp)
        if found is None:
            key = StructureKey.of(self._model, self._config, training=True)
            found = _Structure(list(self._model.modules()), key.digest())
            alive = {id(module) for module in found.modules}
            for other, known in list(self._structures.items()):
                if not alive.issuperset(map(id, known.modules)):
                    del self._structures[other]  # it would hold weights that the model gave up
            self._structures[stamp] = found
            while len(self._structures) > _KEPT:
                self._structures.popitem(last=False)
        self._structures.move_to_end(stamp)
        return found

    def _bind(
        self, structure: _Structure, names: str, call: TrainingCall, *, fresh: bool = False
    ) -> TrainingRunner | str:
        """The plan of one set of arguments, bound to the model; or why there is none."""
        try:
            if any(hasattr(parameter, "ds_id") for parameter in self._model.parameters()):
                raise CaptureError("its parameters are sharded, and gathered by its modules")
            name = f"{structure.digest} train {names}"
            digest = hashlib.sha256(name.encode()).hexdigest()
            plan = None if fresh else find_plan(self._cache, digest, self._stats)
            if plan is None:
                plan = self._build(digest, call)
                structure.built.add(names)
            table = causal_lm(self._model).get_input_embeddings()
            return TrainingRunner(plan, self._model, dtype=table.weight.dtype)
        except _NO_MEMORY:
            raise
        except Exception as error:  # a model that does not compile trains all the same
            reason = f"not captured: {said(error)}"
            logger.warning("%s trains as its module: %s", type(self._model).__name__, reason)
            return reason

    def _build(self, digest: str, call: TrainingCall) -> Plan:
        """Capture the model, and keep the plan."""
        timeout = self._config.capture_timeout
        with without_checkpointing(self._model):
            captured = capture_once(
                self._cache,
                digest,
                lambda: capture_call(self._model, call.given, timeout=timeout),
            )
        self._stats.count("captures")
        causal: Any = causal_lm(self._model)
        plan = build_training_plan(
            captured.graph,
            model=type(causal).__name__,
            vocab_size=int(causal.get_input_embeddings().weight.shape[0]),
            guards=assumptions(),
        )
        self._cache.put(digest, plan)
        return plan
