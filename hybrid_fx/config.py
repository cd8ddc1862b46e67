"""The configuration of one engine: frozen, keyword-only, unknown keys refused by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from .errors import ConfigError

if TYPE_CHECKING:
    from .passes.contract import Pass
    from .passes.roles import Policy

LoraMode = Literal["auto", "fold", "side"]
FusionMode = Literal["measured", "all"]
GraphMode = Literal["eager", "inductor", "cudagraphs"]
SamplingMode = Literal["hf", "per_sequence"]
VerifyMode = Literal["off", "checksum"]
PackMode = Literal["auto", "same"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "lora": ("auto", "fold", "side"),
    "fusions": ("measured", "all"),
    "graph": ("eager", "inductor", "cudagraphs"),
    "sampling": ("hf", "per_sequence"),
    "verify_weights": ("off", "checksum"),
    "pack_dtype": ("auto", "same"),
}
_FLAGS = ("release_inference_cache", "strict", "disk_cache", "train_graph", "share_storage")


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridConfig:
    """Options of :func:`hybrid_fx.hybridize`.

    Attributes:
        max_out_tokens: Positions (prompt and new tokens) to reserve per row in the KV workspace
            before the first generate. ``None`` reserves what each call needs. Never a cap.
        release_inference_cache: Free the KV workspace and the prepared tensors after every
            generate; the next one builds them again. ``False`` keeps and reuses the memory.
        lora: ``"fold"`` merges LoRA deltas into the prepared weights, ``"side"`` keeps them as
            low-rank branches, ``"auto"`` folds where the measured relative error of the adapter's
            output stays under 5 %.
        verify_weights: ``"checksum"`` also compares a checksum of every parameter before each
            generate, which finds writes through ``.data`` or numpy (about 60 ms per GB).
        strict: Raise where a layer cannot be rewritten or a call leaves the rewritten graphs.
        graph: How the graphs run: ``"eager"`` as generated; ``"inductor"`` lowers each layer
            function, and takes no packed weights; ``"cudagraphs"`` records the decode step on a
            GPU, once for each number of rows and each doubling of their columns from 256 on, and
            replays it at every position and for every weight version that lies in the same
            memory. Rows take a multiple of 256 positions then. What cannot be recorded runs as
            generated, and ``explain()`` says why. With ``release_inference_cache`` each generate
            records anew.
        sampling: Which random numbers a sampling ``generate`` draws. ``"hf"``: those that
            transformers draws under the same seed, one for each token of the vocabulary, in each
            row and step. ``"per_sequence"``: each sequence has a stream of its own, made from its
            number in the call and one number of torch's global generator (so
            ``torch.manual_seed`` counts); its draws depend on no other row. The distribution is
            the same, the tokens under a seed are not, and it costs far less. Greedy search draws
            nothing. Beam sampling, and every other way through transformers' own loops, draws as
            transformers does.
        disk_cache: Keep plans on the disk, and why a structure has none, so that a second process
            does not trace again.
        cache_dir: Where; ``None`` is ``$XDG_CACHE_HOME/hybrid_fx`` or ``~/.cache/hybrid_fx``.
        capture_timeout: Seconds of tracing, of the training graph too, after which the model runs
            as its module; ``None`` is no limit. It is looked at between the lines of the forward.
            Where several ranks generate together, only the training graph has a limit: one rank
            that gave up alone would leave the others waiting.
        fusions: Fused MLP and residual-norm where a recorded benchmark showed a gain of 3 % or
            more on the model's family (``"measured"``), or wherever they fit (``"all"``).
        pack_dtype: What packed weights on a CPU are kept in. ``"auto"``: what measures fastest on
            this machine, once, in under a second; for bfloat16 weights that is float32 where the
            processor has no instructions for bfloat16, which takes 4 bytes a weight and stays
            nearer to the exact result. ``"same"``: never another dtype than the weights'; what
            cannot be packed in that is read as it is.
        disable_passes: Names of optional passes to leave out, e.g. ``("concat_qkv",)``.
        train_graph: While the model is in training, ``engine(**batch)`` runs a graph captured
            under its training flags: the same loss, gradients and random numbers. Its result
            holds loss and logits, and never a KV cache; ``graph`` does not lower it. The first
            call of each kind proves it, and holds two more sets of gradients meanwhile.
        share_storage: Let parameters whose rows are stacked to generate (query, key and value; gate
            and up) lie in one buffer, so that the stack needs no copy. At the first generate they
            are given other memory by ``param.data``; values, objects, gradients and optimizer
            states stay, training is the same bit by bit, and files are as large as before. Do it
            before you capture CUDA graphs of your own, or keep a tensor on a parameter's memory.
            What cannot be laid out (tied or shared memory, views such as DeepSpeed's, sharded or
            quantized weights, folded adapters) is copied, and ``explain()`` says what and why.
            On a CPU, packed weights are copies all the same, and not laid out: with
            ``disable_passes=("pack_weights",)``, generating holds the KV alone.
        passes: Passes of your own, :class:`hybrid_fx.passes.Pass`; each runs as late as its
            contract allows, in the graphs that generate. They may add any operator of the table.
        policies: Decoder families of your own, :class:`hybrid_fx.passes.Policy`; tried before
            those of the library.

    Raises:
        ConfigError: for a value outside the allowed set.
    """

    max_out_tokens: int | None = None
    release_inference_cache: bool = False
    lora: LoraMode = "auto"
    verify_weights: VerifyMode = "off"
    strict: bool = False
    graph: GraphMode = "eager"
    sampling: SamplingMode = "hf"
    disk_cache: bool = True
    cache_dir: str | None = None
    capture_timeout: float | None = 120.0
    fusions: FusionMode = "measured"
    pack_dtype: PackMode = "auto"
    disable_passes: tuple[str, ...] = ()
    train_graph: bool = False
    share_storage: bool = False
    passes: tuple[Pass, ...] = ()
    policies: tuple[Policy, ...] = ()

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ConfigError(f"{name}={value!r} is not known; use one of {', '.join(allowed)}")
        for name in _FLAGS:
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name}={value!r} must be True or False")
        tokens = self.max_out_tokens
        if tokens is not None and (not isinstance(tokens, int) or tokens < 1):
            raise ConfigError(f"max_out_tokens={tokens!r} must be a positive int or None")
        if self.cache_dir is not None and not isinstance(self.cache_dir, str):
            raise ConfigError(f"cache_dir={self.cache_dir!r} must be a path as str, or None")
        seconds = self.capture_timeout
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if seconds is not None and not (number and 0 < seconds < float("inf")):
            raise ConfigError(
                f"capture_timeout={seconds!r} must be a positive number of seconds, or None"
            )
        if isinstance(self.disable_passes, str):
            raise ConfigError(
                f"disable_passes={self.disable_passes!r} must be a tuple of pass names, "
                f"e.g. ({self.disable_passes!r},)"
            )
        object.__setattr__(self, "disable_passes", tuple(self.disable_passes))
        for name, kind in (("passes", "Pass"), ("policies", "Policy")):
            entries = getattr(self, name)
            given = entries if isinstance(entries, tuple | list) else (entries,)
            # By name: who gives none shall not wait for torch to load.
            if odd := next((entry for entry in given if not _is_a(entry, kind)), None):
                raise ConfigError(
                    f"{name} holds a {type(odd).__name__}; give a tuple of hybrid_fx.passes.{kind}"
                )
            object.__setattr__(self, name, tuple(given))

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            raise AttributeError(
                f"HybridConfig has no {name!r}: it holds the options of generating, and the "
                "model's own config is engine.module.config; pass engine.module where a model is "
                "asked for"
            )


def _refuse(config: HybridConfig, name: str, value: object = None) -> NoReturn:
    raise FrozenInstanceError(
        f"HybridConfig.{name} cannot be set, for the engine has begun with it: close() the engine "
        f"and call hybridize again. The model's own config is engine.module.config"
    )


# What a dataclass with slots makes of its own cannot name a field that it does not have.
HybridConfig.__setattr__ = _refuse  # type: ignore[method-assign, assignment]
HybridConfig.__delattr__ = _refuse  # type: ignore[method-assign, assignment]


def _is_a(value: object, kind: str) -> bool:
    return kind in (base.__name__ for base in type(value).__mro__)


def make_config(
    config: HybridConfig | Mapping[str, Any] | None, overrides: Mapping[str, Any]
) -> HybridConfig:
    """Return ``config`` with ``overrides`` applied.

    Raises:
        ConfigError: for an unknown key (the nearest known one is named) or a bad value.
    """
    if config is not None and not isinstance(config, HybridConfig | Mapping):
        raise ConfigError(
            f"config is a {type(config).__name__}; pass a HybridConfig, a dict of fields or None"
        )
    known = [field.name for field in fields(HybridConfig)]
    given = {**(config if isinstance(config, Mapping) else {}), **overrides}
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"unknown option {key!r}; did you mean {near!r}? Known: {', '.join(known)}"
            )
    base = config if isinstance(config, HybridConfig) else HybridConfig()
    return replace(base, **given)
