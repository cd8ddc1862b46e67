"""The options of ``torch.compile(..., backend="hybrid_fx", options={...})``."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..passes.contract import Pass, Pipeline
from ..passes.pipeline import OPTIONAL
from ..passes.policies import POLICIES
from ..passes.roles import Policy

if TYPE_CHECKING:
    from .report import GraphReport

#: What may run the rewritten graph, by its name in torch.
INNER = ("eager", "aot_eager", "inductor")

#: Passes that gain without prepared weights. What stacks or folds weights would do so at each
#: call, for weights are inputs of the graph: it runs where it is asked for.
DEFAULT = ("fuse_rms_norm", "fuse_mlp", "fuse_add_norm")


@dataclass(frozen=True, kw_only=True, slots=True)
class BackendOptions:
    """Options of the backend; each may stand in ``options={...}`` of ``torch.compile``.

    Attributes:
        inner: What runs the rewritten graph: ``"eager"`` as it stands, ``"aot_eager"``,
            ``"inductor"``, or a backend of your own: ``(graph_module, example_inputs)`` to a
            function.
        passes: Names of the passes that run, or passes of your own, see
            :class:`hybrid_fx.passes.contract.Pass`. Those that are not sound in training are
            left out of graphs that autograd records.
        policies: Policies that are tried before those of the library.
        strict: Raise where a layer that holds attention is not rewritten in full.
        report: Called with the :class:`GraphReport` of each graph.

    Raises:
        ConfigError: for a value outside the allowed set; unknown passes and options are answered
            with the nearest known one.
    """

    inner: str | Callable[..., Any] = "eager"
    passes: tuple[str | Pass, ...] = DEFAULT
    policies: tuple[Policy, ...] = ()
    strict: bool = False
    report: Callable[[GraphReport], object] | None = None
    pipeline: Pipeline = field(init=False, repr=False, compare=False, default=Pipeline())

    def __post_init__(self) -> None:
        if not callable(self.inner) and self.inner not in INNER:
            raise ConfigError(
                f"inner={self.inner!r} is not known; use one of {', '.join(INNER)}, or a backend"
            )
        if not isinstance(self.strict, bool):
            raise ConfigError(f"strict={self.strict!r} must be True or False")
        if self.report is not None and not callable(self.report):
            raise ConfigError(f"report={self.report!r} must be a function of one GraphReport")
        if isinstance(self.passes, str | Pass):
            raise ConfigError(f"passes={self.passes!r} must be a tuple of passes")
        for policy in self.policies:
            if not isinstance(policy, Policy):
                raise ConfigError(f"policies: {policy!r} is no Policy")
        object.__setattr__(self, "passes", tuple(self.passes))
        object.__setattr__(self, "policies", (*self.policies, *POLICIES))
        object.__setattr__(self, "pipeline", _pipeline(self.passes))


def _pipeline(passes: tuple[str | Pass, ...]) -> Pipeline:
    """The named passes in the library's order, and those of the caller where they fit."""
    known = OPTIONAL.names
    own = [one for one in passes if isinstance(one, Pass)]
    names = [one for one in passes if not isinstance(one, Pass)]
    for name in names:
        if name not in known:
            raise ConfigError(f"no pass is called {name!r}; {_nearest(name, known)}")
    for one in own:
        if one.inputs:
            raise ConfigError(
                f"pass {one.name} adds the inputs {', '.join(sorted(one.inputs))}; "
                "who calls a compiled graph would not pass them"
            )
    pipeline = OPTIONAL.without([name for name in known if name not in names])
    for one in own:
        pipeline = pipeline.insert(one)
    return pipeline


def _nearest(name: object, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
    return f"did you mean {near!r}? Known: {', '.join(known)}"


def make_options(given: Mapping[str, Any] | None) -> BackendOptions:
    """Read the ``options`` of ``torch.compile``.

    Raises:
        ConfigError: for an unknown key (the nearest known one is named) or a bad value.
    """
    if given is not None and not isinstance(given, Mapping):
        raise ConfigError(f"options is a {type(given).__name__}; pass a dict")
    known = tuple(entry.name for entry in fields(BackendOptions) if entry.init)
    for key in given or {}:
        if key not in known:
            raise ConfigError(f"unknown option {key!r}; {_nearest(key, known)}")
    return BackendOptions(**(given or {}))
