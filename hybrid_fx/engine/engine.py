"""The engine: one model that trains as it is, and generates from rewritten graphs.

It holds the only mutable state of the package: mode, weight version, workspace, statistics.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ..compat.placement import device_of
from ..config import HybridConfig
from ..errors import EngineBusyError, EngineClosedError
from ..generate import causal_lm, generate
from .explain import Explanation
from .graphs import ModelGraphs
from .report import build_explanation
from .source import Source
from .stand_in import StandIn
from .stats import Stats
from .switch import GenerateSwitch
from .training_graphs import TrainingGraphs
from .versions import WeightTracker


def _synchronize(model: nn.Module) -> Callable[[], None] | None:
    device = device_of(model)
    if device.type == "cpu":
        return None
    return torch.get_device_module(device).synchronize


class HybridEngine(StandIn):
    """A model with two ways to run: its own forward to train, rewritten graphs to generate.

    Made by :func:`hybrid_fx.hybridize`. Attributes it does not have are the model's, to read, to
    set and to delete; its own public ones cannot be set.

    Attributes:
        module: The model.
        config: The options it was made with.
        stats: Latencies, counters and fallbacks, see :class:`~hybrid_fx.engine.stats.Stats`.
    """

    def __init__(self, model: nn.Module, config: HybridConfig) -> None:
        self.module = model
        self.config = config
        self._begin(Source(model), config)
        self._stand()

    def _begin(self, source: Source, options: HybridConfig) -> None:
        """Take over the generating of a model; the rest of the engine may be another's."""
        model = source.model
        self._options = options
        self._source = source
        self.stats = Stats(synchronize=_synchronize(model))
        self._tracker = WeightTracker(model, verify=options.verify_weights, view=source.view)
        self._tracker.on_step = self._after_step
        self._graphs = ModelGraphs(source, options, self.stats, self._tracker)
        self._lock = threading.RLock()
        self._training_graphs = (
            TrainingGraphs(model, options, self.stats, self._lock) if options.train_graph else None
        )
        self._warned: set[str] = set()
        self._training = model.training
        self._closed = False
        self._running = 0
        self._plain_generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
        vars(model)["generate"] = GenerateSwitch(self, model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, to train on; with gradients it counts as a weight change.

        Runs the module itself, or with ``train_graph=True`` the training graph while the model
        is in training.

        Raises:
            StrictError: under ``strict=True`` and ``train_graph=True``, for a call in training
                that the graph does not serve.
        """
        if self._closed:
            return self.module(*args, **kwargs)
        if torch.is_grad_enabled():
            self._tracker.mark("a forward with gradients")
        if self._training_graphs is not None and self.module.training:
            return self._training_graphs(*args, **kwargs)
        return self.module(*args, **kwargs)

    forward = __call__

    def train(self, mode: bool = True) -> HybridEngine:
        """Set the model to training (or, with ``mode=False``, as :meth:`eval`)."""
        if not mode:
            return self.eval()
        self.module.train()
        self._begin_training()
        return self

    def eval(self) -> HybridEngine:
        """Set the model to generating, and log the latencies of the iteration that ends here."""
        self.module.eval()
        self._begin_generating()
        return self

    def _begin_training(self) -> None:
        if not self._training:
            self._training = True
            if self._options.release_inference_cache:
                self._release()
        self.stats.mark("train")

    def _begin_generating(self) -> None:
        self._training = False
        self.stats.next_iteration()

    def _after_step(self) -> None:
        self._training = True  # also where nobody called train(): the next generate is a switch
        self.stats.lap("train")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What ``model.generate(*args, **kwargs)`` returns, from rewritten graphs where they apply.

        Takes the whole API of transformers; ``max_new_tokens`` may also be a list, one length for
        each row of the prompt: what is shorter is padded, and a ``max_length`` beside it does not
        count. Runs without gradients, dropout and gradient checkpointing; a call on a model in
        training leaves its flags as they were. An engine as ``assistant_model`` is its model.

        Raises:
            InputError: for ids, masks or lengths that do not fit the model.
            StrictError: under ``strict=True``, where the call would leave the rewritten graphs.
            EngineBusyError: from inside another generate of this engine (a processor, a streamer)
                that runs from its graphs.
            EngineClosedError: after :meth:`close`.
        """
        if self._closed:
            raise EngineClosedError("this engine is closed; call hybrid_fx.hybridize(model) again")
        with self._lock:
            if self._training:
                self._begin_generating()
            self.stats.count("generate_calls")
            if self._running and self._source.collective:
                raise EngineBusyError(
                    "another generate is running on this engine, in which ranks wait for each "
                    "other; from a processor, criterion or streamer, generate by another model"
                )
            self._running += 1
            self._graphs.begin()
            # Memory made in inference mode could never be refilled outside of it.
            with self.stats.timer("generate"), torch.inference_mode(False):
                try:
                    given = {name: _model_of(value) for name, value in kwargs.items()}
                    result = self._counted(self._generate(tuple(map(_model_of, args)), given))
                    self._graphs.finish()
                    return result
                except Exception:
                    self._graphs.abandon()
                    raise
                finally:
                    self._after_generate()

    def _generate(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        model = self._source.runnable()
        plain: Any = self._plain_generate if model is self.module else model.generate
        return generate(
            model,
            self._graphs.ready,
            args,
            kwargs,
            on_fallback=self._note_fallback,
            strict=self._options.strict,
            plain_generate=functools.partial(self._generate_by_module, model, plain),
            warned=self._warned,
            on_settings=self._source.say if self._source.collective else None,
            sampling=self._options.sampling,
            on_waiting=self._note_waiting,
        )

    def _note_fallback(self, reason: str) -> None:
        self.stats.fallback(f"{reason}: {self._graphs.failure}" if self._graphs.failure else reason)

    def _note_waiting(self, reason: str, tokens: int) -> None:
        self.stats.waited[reason] += tokens

    def _counted(self, result: Any) -> Any:
        rows = getattr(result, "sequences", result)
        self.stats.add_samples(int(rows.shape[0]))
        return result

    def _after_generate(self) -> None:
        self._running -= 1
        self._graphs.end()
        runner = self._graphs.runner
        if runner is not None:
            self.stats.record_kv_bytes(runner.workspace.nbytes)
            self.stats.prepared_bytes = runner.prepared.nbytes
            self.stats.recorded_bytes = runner.recorded_bytes
        # A call from inside another one (a processor that generates) frees nothing of the outer.
        if self._options.release_inference_cache and not self._running:
            self._release()

    def _release(self) -> None:
        self._graphs.release()
        self.stats.record_kv_bytes(0)
        self.stats.prepared_bytes = self.stats.recorded_bytes = 0

    def _generate_by_module(
        self, model: nn.Module, plain: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' generate on the module itself, its forwards counted."""
        if self._source.joint and not self._graphs.agreed:
            self._graphs.ready(whole=True)
        if self._source.sharded:
            if not self._graphs.weights:
                self._graphs.ready(whole=True)
            self._source.fill(model, self._graphs.weights)
        causal = causal_lm(model)
        handle = causal.register_forward_pre_hook(lambda *_: self.stats.count("hf_forwards"))
        try:
            return plain(*args, **kwargs)
        finally:
            handle.remove()

    @property
    def weight_version(self) -> int:
        """Counts the changes of any parameter, buffer or adapter state."""
        return self._tracker.refresh()

    def weights_changed(self) -> None:
        """Say that weights were written in a way nothing can see, e.g. through ``.data``."""
        self._tracker.mark("weights_changed()")

    def explain(self, *, passes: bool = False) -> Explanation:
        """What was rewritten in each layer, what was not and why; memory; generated sources.

        With ``passes``, also what each pass did: places, nodes added and removed, time.

        Captures and prepares the model if that did not happen yet; where several ranks generate
        together, it only captures, and needs no other rank. ``print()`` shows a table,
        ``.render(sources=True)`` the sources too, ``.as_dict()`` gives the same as data.
        """
        if not self._closed:
            with self._lock:
                self._graphs.read() if self._source.collective else self._graphs.ready()
        report = build_explanation(
            self.module,
            self._options,
            self._graphs,
            self.stats,
            self._training_graphs,
            view=self._source.view,
            passes=passes,
        )
        if self._training and self._options.release_inference_cache and not self._running:
            self._release()
        return report

    def close(self) -> None:
        """Put everything back: the model's generate, torch's hooks, all inference memory."""
        if self._closed:
            return
        self._closed = True
        self._tracker.close()
        self._graphs.close()
        self._training_graphs = None
        attributes = vars(self.module)
        switch = attributes.get("generate")
        if isinstance(switch, GenerateSwitch):
            del attributes["generate"]
            if switch.shadowed is not None:
                attributes["generate"] = switch.shadowed

    def __enter__(self) -> HybridEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> HybridEngine:
        return HybridEngine(copy.deepcopy(self.module, memo), self.config)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "training" if self.module.training else "generating"
        return f"HybridEngine({type(self.module).__name__}, {state})"


def _model_of(given: Any) -> Any:
    """An argument of generate; an engine that drafts is its model."""
    return given.module if isinstance(given, HybridEngine) else given
