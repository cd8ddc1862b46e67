"""The engine: one model that trains as it is, and generates from rewritten graphs.

It holds the only mutable state of the package: mode, weight version, workspace, statistics.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import nn

from ..config import HybridConfig
from ..errors import EngineClosedError
from ..generate import causal_lm, generate
from .explain import Explanation
from .graphs import ModelGraphs
from .report import build_explanation
from .stats import Stats
from .switch import GenerateSwitch
from .training_graphs import TrainingGraphs
from .versions import WeightTracker


def _synchronize(model: nn.Module) -> Callable[[], None] | None:
    device = next(iter(model.parameters())).device
    if device.type == "cpu":
        return None
    return torch.get_device_module(device).synchronize


class HybridEngine:
    """A model with two ways to run: its own forward to train, rewritten graphs to generate.

    Made by :func:`hybrid_fx.hybridize`. Attributes it does not have are the model's.

    Attributes:
        module: The model.
        config: The options it was made with.
        stats: Latencies, counters and fallbacks, see :class:`~hybrid_fx.engine.stats.Stats`.
    """

    def __init__(self, model: nn.Module, config: HybridConfig) -> None:
        self.module = model
        self.config = config
        self.stats = Stats(synchronize=_synchronize(model))
        self._tracker = WeightTracker(model, verify=config.verify_weights)
        self._tracker.on_step = self._after_step
        self._graphs = ModelGraphs(model, config, self.stats, self._tracker)
        self._lock = threading.RLock()
        self._training_graphs = (
            TrainingGraphs(model, config, self.stats, self._lock) if config.train_graph else None
        )
        self._warned: set[str] = set()
        self._training = model.training
        self._closed = False
        self._running = 0
        self._plain_generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
        self._had_own = vars(model).get("generate")
        vars(model)["generate"] = GenerateSwitch(self, model)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "module" not in vars(self):
            raise AttributeError(name)
        return getattr(self.module, name)

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
        if not self._training:
            self._training = True
            if self.config.release_inference_cache:
                self._release()
        self.stats.mark("train")
        return self

    def eval(self) -> HybridEngine:
        """Set the model to generating, and log the latencies of the iteration that ends here."""
        self.module.eval()
        self._begin_generating()
        return self

    def _begin_generating(self) -> None:
        self._training = False
        self.stats.next_iteration()

    def _after_step(self) -> None:
        self._training = True  # also where nobody called train(): the next generate is a switch
        self.stats.lap("train")

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """What ``model.generate(*args, **kwargs)`` returns, from rewritten graphs where they apply.

        Takes the whole API of transformers. Runs without gradients, dropout and gradient
        checkpointing; a call on a model in training leaves its flags as they were.

        Raises:
            InputError: for ids, masks or lengths that do not fit the model.
            StrictError: under ``strict=True``, where the call would leave the rewritten graphs.
            EngineClosedError: after :meth:`close`.
        """
        if self._closed:
            raise EngineClosedError("this engine is closed; call hybrid_fx.hybridize(model) again")
        with self._lock:
            if self._training:
                self._begin_generating()
            self.stats.count("generate_calls")
            self._running += 1
            # Memory made in inference mode could never be refilled outside of it.
            with self.stats.timer("generate"), torch.inference_mode(False):
                try:
                    return self._counted(
                        generate(
                            self.module,
                            self._graphs.ready,
                            args,
                            kwargs,
                            on_fallback=self._note_fallback,
                            strict=self.config.strict,
                            plain_generate=self._generate_by_module,
                            warned=self._warned,
                        )
                    )
                finally:
                    self._after_generate()

    def _note_fallback(self, reason: str) -> None:
        self.stats.fallback(f"{reason}: {self._graphs.failure}" if self._graphs.failure else reason)

    def _counted(self, result: Any) -> Any:
        rows = getattr(result, "sequences", result)
        self.stats.add_samples(int(rows.shape[0]))
        return result

    def _after_generate(self) -> None:
        self._running -= 1
        runner = self._graphs.runner
        if runner is not None:
            self.stats.record_kv_bytes(runner.workspace.nbytes)
        # A call from inside another one (a processor that generates) frees nothing of the outer.
        if self.config.release_inference_cache and not self._running:
            self._release()

    def _release(self) -> None:
        self._graphs.release()
        self.stats.record_kv_bytes(0)

    def _generate_by_module(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' generate on the module itself, its forwards counted."""
        causal = causal_lm(self.module)
        handle = causal.register_forward_pre_hook(lambda *_: self.stats.count("hf_forwards"))
        try:
            return self._plain_generate(*args, **kwargs)
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

        Captures and prepares the model if that did not happen yet. ``print()`` shows a table,
        ``.render(sources=True)`` the sources too, ``.as_dict()`` gives the same as data.
        """
        if not self._closed:
            with self._lock:
                self._graphs.ready()
        return build_explanation(
            self.module,
            self.config,
            self._graphs,
            self.stats,
            self._training_graphs,
            passes=passes,
        )

    def close(self) -> None:
        """Put everything back: the model's generate, torch's hooks, all inference memory."""
        if self._closed:
            return
        self._closed = True
        self._tracker.close()
        self._graphs.release()
        self._training_graphs = None
        attributes = vars(self.module)
        if isinstance(attributes.get("generate"), GenerateSwitch):
            del attributes["generate"]
            if self._had_own is not None:
                attributes["generate"] = self._had_own

    def __enter__(self) -> HybridEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> HybridEngine:
        return HybridEngine(copy.deepcopy(self.module, memo), self.config)

    def __reduce__(self) -> NoReturn:
        raise TypeError("an engine cannot be pickled; pickle engine.module and hybridize the copy")

    def __repr__(self) -> str:
        state = "closed" if self._closed else "training" if self.module.training else "generating"
        return f"HybridEngine({type(self.module).__name__}, {state})"
