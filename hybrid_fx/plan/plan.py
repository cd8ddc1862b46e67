"""A plan: the three generated sources of one model structure, and the manifest that explains them.

Nothing here holds a weight. The manifest names them; the sources take them as arguments.
Shapes are those of the tensors named (legend: K key-value heads, D head size, V vocabulary).
"""

from __future__ import annotations

import builtins
import hashlib
import json
import linecache
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from ..errors import CacheError
from .plain import (
    JSON,
    need_bool,
    need_positive,
    need_text,
    odd,
    plain,
    record_fields,
    set_tuple,
)
from .records import KVLayer, Prepared, Streamed, Weight
from .source_check import PARSING, TORCH_CONSTANTS, check_source

FORMAT = 6
"""Version of the manifest's fields. Raise it with every change to them."""
SOURCES = ("prepare", "prefill", "decode")
"""The sources of a plan that generates, in the order in which they run."""
TRAINING = ("train",)
"""The sources of a plan that trains."""

_RECORDS = {"weights": Weight, "prepared": Prepared, "kv": KVLayer, "streamed": Streamed}


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a person, and a second process, must know to use the sources.

    JSON values are kept plain: tuples inside them become lists, so that a manifest equals the one
    read back from its own JSON.

    Attributes:
        format: :data:`FORMAT` of the writer.
        model: free text, for a person; it never reaches a source.
        vocab_size: V.
        weights: arguments of the prepare graph, in order.
        prepared: what prepare returns and prefill and decode take, in order.
        kv: one entry an attention layer, in the order of the workspace's tensors.
        guards: what the capture assumed and the cache key does not hold, name to value.
        notes: remarks for the report.
        layers: one report a decoder layer: path, policy, fused, missed.
        lora: the adapted modules that are folded, in the order in which ``measure`` reports them.
        embeds: whether prefill takes embeddings in place of token ids.
        passes: what each pass did when the plan was built; no part of equality, as it holds times.
        streamed: the weights that prefill and decode take beside these, layer by layer in order.
        ranks: how many ranks compute the model together; beyond one the graphs take their group.

    Raises:
        CacheError: for a field of another type, an unknown dtype, a value JSON cannot hold.
    """

    format: int = FORMAT
    model: str
    vocab_size: int
    weights: tuple[Weight, ...]
    prepared: tuple[Prepared, ...]
    kv: tuple[KVLayer, ...]
    guards: Mapping[str, JSON]
    notes: tuple[JSON, ...] = ()
    layers: tuple[JSON, ...] = ()
    lora: tuple[JSON, ...] = ()
    embeds: bool = False
    passes: tuple[JSON, ...] = field(default=(), compare=False)
    streamed: tuple[Streamed, ...] = ()
    ranks: int = 1

    def __post_init__(self) -> None:
        if type(self.format) is not int or self.format != FORMAT:
            odd(self, "format", f"{FORMAT}; capture the model again")
        need_text(self, "model")
        need_positive(self, "vocab_size", "ranks")
        need_bool(self, "embeds")
        for name, kind in _RECORDS.items():
            set_tuple(self, name, kind)
        for name in ("notes", "layers", "lora", "passes"):
            entries = set_tuple(self, name)
            value = tuple(plain(entry, f"Manifest.{name}") for entry in entries)
            object.__setattr__(self, name, value)
        if not isinstance(self.guards, Mapping):
            odd(self, "guards", "a mapping of names to JSON values")
        object.__setattr__(self, "guards", plain(dict(self.guards), "Manifest.guards"))

    def to_json(self) -> dict[str, JSON]:
        """Return plain JSON values; :meth:`from_json` gives an equal manifest back."""
        value = plain(asdict(self), "Manifest")
        assert isinstance(value, dict)
        return value

    @classmethod
    def from_json(cls, value: object) -> Manifest:
        """Read what :meth:`to_json` wrote.

        Raises:
            CacheError: for a missing or unknown field, or a value of another type.
        """
        given = record_fields(cls, value)
        for name, kind in _RECORDS.items():
            if type(entries := given[name]) is not list:
                raise CacheError(f"Manifest.{name}={entries!r:.80} must be a list")
            given[name] = [kind(**record_fields(kind, entry)) for entry in entries]
        return cls(**given)

    def broken_guards(self, current: Mapping[str, JSON]) -> tuple[str, ...]:
        """Return one line for each guard whose ``current`` value differs or is missing."""
        found = {name: plain(value, f"guard {name!r}") for name, value in current.items()}
        return tuple(
            f"{name}: the plan assumes {planned!r}, the model has {found.get(name, 'no value')!r}"
            for name, planned in self.guards.items()
            if name not in found or _spelled(found[name]) != _spelled(planned)
        )


def _spelled(value: JSON) -> str:
    """JSON text: unlike ``==``, it tells True from 1 and 1 from 1.0."""
    return json.dumps(value, sort_keys=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The graphs of one model structure.

    Attributes:
        manifest: what the sources take and return.
        sources: generated Python text under ``"prepare"``, ``"prefill"`` and ``"decode"``, or
            under ``"train"`` alone.

    Raises:
        CacheError: when a source is missing, unknown or not text.
    """

    manifest: Manifest
    sources: Mapping[str, str]

    def __post_init__(self) -> None:
        if type(self.manifest) is not Manifest:
            odd(self, "manifest", "a Manifest")
        names = set(self.sources) if isinstance(self.sources, Mapping) else set()
        order = next((kind for kind in (SOURCES, TRAINING) if names == set(kind)), None)
        if order is None:
            wanted = f"{', '.join(SOURCES)}, or {', '.join(TRAINING)}"
            odd(self, "sources", f"a mapping with exactly the keys {wanted}")
        if not all(type(source) is str for source in self.sources.values()):
            odd(self, "sources", "a mapping of names to text")
        object.__setattr__(self, "sources", {name: self.sources[name] for name in order})

    def to_json(self) -> dict[str, JSON]:
        """Return plain JSON values, the sources line by line so that a person can diff them."""
        lines: dict[str, JSON] = {name: [*text.split("\n")] for name, text in self.sources.items()}
        return {"manifest": self.manifest.to_json(), "sources": lines}

    @classmethod
    def from_json(cls, value: object) -> Plan:
        """Read what :meth:`to_json` wrote. The sources are text here; nothing of them runs.

        Raises:
            CacheError: for a missing or unknown field, or a value of another type.
        """
        given = record_fields(cls, value)
        if type(sources := given["sources"]) is not dict:
            raise CacheError(f"Plan.sources={sources!r:.80} must be an object of lines")
        for name, lines in sources.items():
            if type(lines) is not list or not all(type(line) is str for line in lines):
                raise CacheError(f"Plan.sources[{name!r:.80}] must be a list of lines")
        texts = {name: "\n".join(lines) for name, lines in sources.items()}
        return cls(manifest=Manifest.from_json(given["manifest"]), sources=texts)


class OperatorTable(types.SimpleNamespace):
    """What a generated source calls ``op``: the operators and torch's constants, read only."""

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"op.{name} cannot be set; the operator table is read only")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"op.{name} cannot be deleted; the operator table is read only")


def load_functions(
    plan_source: str, operators: Mapping[str, Callable[..., Any]], *, name: str = "plan"
) -> Mapping[str, Callable[..., Any]]:
    """Check ``plan_source``, then run it, and return its functions by name, in order.

    The functions can name nothing but the operators, a few constants and one another. Their
    text is in :mod:`linecache` under ``<hybrid_fx NAME DIGEST>``: a debugger steps through it.

    Args:
        plan_source: one source of a plan.
        operators: the table behind ``op``.
        name: for the file name that tracebacks show, e.g. ``"decode"``.

    Raises:
        CacheError: for a source outside the grammar of :mod:`.source_check`; nothing has run.
        ValueError: for an operator whose name is not usable or belongs to a torch constant.
    """
    for operator in operators:
        if not operator.isidentifier() or operator.startswith("__"):
            raise ValueError(f"operator {operator!r} is not a plain identifier; rename it")
        if operator in TORCH_CONSTANTS:
            raise ValueError(f"operator {operator!r} has the name of a torch constant; rename it")
    tree = check_source(plan_source, operators)
    digest = hashlib.sha256(plan_source.encode()).hexdigest()[:12]
    filename = f"<hybrid_fx {name} {digest}>"
    namespace: dict[str, Any] = {
        # torch's C code imports lazily through the builtins of the frame that called it. The
        # grammar has neither an import nor a name with two underscores: a source cannot reach it.
        "__builtins__": {"__import__": builtins.__import__},
        "__name__": f"hybrid_fx generated {name}",
        "op": OperatorTable(**operators, **TORCH_CONSTANTS),
        "slice": slice,
        "inf": math.inf,
        "nan": math.nan,
        "Ellipsis": ...,
    }
    given = set(namespace)
    linecache.cache[filename] = (
        len(plan_source),
        None,
        [line + "\n" for line in plan_source.split("\n")],
        filename,
    )
    with PARSING:
        code = compile(tree, filename, "exec", dont_inherit=True)
    exec(code, namespace)
    return {key: value for key, value in namespace.items() if key not in given | {"__doc__"}}
