"""Passes and pipelines as data: what a pass needs, leaves behind, and where it is sound.

A *pass* is a function ``(graph, context) -> PassResult`` with a contract: facts about the graph
that must hold before it (``requires``), hold behind it (``provides``), or must not hold yet
(``conflicts``). A *pipeline* is an ordered tuple of passes whose contracts fit together, which is
checked when it is put together. No pass takes a fact away that held before it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

from torch import fx

from .pattern import NoMatch

#: The facts that the passes of this library speak of; README.md has the same table, with the
#: passes that provide them. A pass of your own may name others.
FACTS: Mapping[str, str] = MappingProxyType(
    {
        "canonical": "every call is of the operator table, in its one spelling",
        "rms_norms_fused": "an RMSNorm written out is one rms_norm, where a policy knows its form",
        "lora_folded": "adapters that may be folded are part of the weight they stand beside",
        "qkv_stacked": "query, key and value of a layer are slices of one linear",
        "gate_up_stacked": "gate and up of a layer are slices of one linear",
        "mlp_fused": "the MLP of a layer is one operator",
        "add_norms_fused": "a residual sum and the norm that reads it are one operator",
        "packed": "weights of linear layers are laid out for the kernel that multiplies with them",
        "gathered": "every weight reaches the graph through a gather",
        "streamed": "a layer's own weights are gathered where it runs, one layer ahead",
        "threaded": "attention reads and writes the KV workspace",
        "sharded": "each rank computes its share of heads, MLP and vocabulary",
        "takes_embeds": "embeddings may stand in for token ids",
        "masks_threaded": "attention takes its mask and its module's implementation as inputs",
        "last_tokens": "logits are computed for the last keep tokens only",
    }
)

#: Where a graph may run: without gradients, or under autograd.
MODES = frozenset({"inference", "training"})

#: In ``may_add``: counts of all operators may rise, as where calls get other names.
ANY = frozenset({"*"})


class PipelineError(ValueError):
    """Passes do not fit together; the message names both and the remedy."""


class PassError(RuntimeError):
    """A pass broke its contract while it ran; the message names it and the remedy."""


@dataclass(frozen=True)
class PassResult:
    """What one pass did: how many places it rewrote, and where it declined and why."""

    count: int
    misses: tuple[tuple[str, NoMatch], ...] = ()


@dataclass
class Context:
    """What passes are told beside the graph.

    Attributes:
        layers: Module path of each decoder layer and the policy that describes it.
        fusions: ``"all"`` of them, or those with a ``"measured"`` gain on the layer's family.
        side: Suffixes of module paths whose LoRA stays a branch, e.g. ``"self_attn.q_proj"``.
        training: Whether the graph is for autograd: then what only a backward pass sees counts.
        shard: Which rank of how many the graph is for.
    """

    layers: Mapping[str, Any] = field(default_factory=dict)
    side: frozenset[str] = frozenset()
    fusions: str = "all"
    training: bool = False
    shard: tuple[int, int] = (0, 1)

    def wants(self, fusion: str, layer: Any) -> bool:
        """Whether ``fusion`` is to be made in a layer that matched as ``layer`` says."""
        return self.fusions == "all" or fusion in layer.policy.gains


@dataclass(frozen=True)
class Pass:
    """A rewrite of a graph, and its contract.

    Attributes:
        name: What reports, errors and ``disable_passes`` call it.
        run: Rewrites the graph it is given, in place.
        requires: Facts that must hold before it, see :data:`FACTS`.
        provides: Facts that hold behind it.
        conflicts: Facts that must not hold yet, because it would no longer find its places.
        may_add: Operators whose count may rise; all others are as many as before, or fewer.
        exact: Whether outputs stay equal bit by bit; else rounding may differ.
        modes: Where the rewritten graph is sound, of :data:`MODES`. Not in training: what writes
            in place over values that a backward pass reads.
        inputs: Runtime inputs it adds. A graph with other inputs cannot be called in the old
            one's place. Where each attention has its own, the name without its number.

    Raises:
        PipelineError: for a name that is no identifier, a fact that is no text, an unknown mode.
    """

    name: str
    run: Callable[[fx.Graph, Context], PassResult]
    requires: frozenset[str] = frozenset({"canonical"})
    provides: frozenset[str] = frozenset()
    conflicts: frozenset[str] = frozenset()
    may_add: frozenset[str] = frozenset()
    exact: bool = False
    modes: frozenset[str] = frozenset({"inference"})
    inputs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.isidentifier():
            raise PipelineError(f"the name {self.name!r} of a pass must be an identifier")
        if not callable(self.run):
            raise PipelineError(f"pass {self.name}: run={self.run!r} must be a function")
        for name in ("requires", "provides", "conflicts", "may_add", "modes", "inputs"):
            object.__setattr__(self, name, self._texts(name))
        if odd := self.modes - MODES:
            raise PipelineError(
                f"pass {self.name}: mode {min(odd)!r} is not known; use {sorted(MODES)}"
            )

    def _texts(self, name: str) -> frozenset[str]:
        value: Any = getattr(self, name)
        if isinstance(value, str) or not all(isinstance(item, str) for item in value):
            raise PipelineError(f"pass {self.name}: {name}={value!r} must be a set of strings")
        return frozenset(value)

    def undeclared(self, added: Mapping[str, int]) -> tuple[str, ...]:
        """Of the kinds of nodes that became more, those the contract does not allow."""
        if self.may_add >= ANY:
            return ()
        allowed = self.may_add | ({"placeholder"} if self.inputs else set())
        return tuple(sorted(added.keys() - allowed))


@dataclass(frozen=True)
class Pipeline:
    """Passes in the order in which they run; refused where their contracts do not fit.

    ``a + b`` runs ``b`` behind ``a``; what ``b`` starts from and ``a`` does not leave is what
    both start from.

    Attributes:
        passes: In order.
        given: Facts that hold for the graphs it starts from, e.g. ``{"canonical"}``.

    Raises:
        PipelineError: where a pass needs a fact that none before it provides, or comes behind one
            that it conflicts with, or has the name of another one.
    """

    passes: tuple[Pass, ...] = ()
    given: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        object.__setattr__(self, "passes", tuple(self.passes))
        object.__setattr__(self, "given", frozenset(self.given))
        holds = dict.fromkeys(sorted(self.given), "")  # fact -> the pass that provided it
        known: dict[str, Pass] = {}
        for index, one in enumerate(self.passes):
            if known.setdefault(one.name, one) != one:
                raise PipelineError(
                    f"two different passes are called {one.name}; give one of them another name"
                )
            for fact in sorted(one.requires - holds.keys()):
                raise PipelineError(self._missing(one, fact, index))
            for fact in holds:  # the first that stands in the way
                if fact in one.conflicts:
                    raise PipelineError(_conflict(one, fact, holds[fact]))
            for fact in sorted(one.provides):
                holds.setdefault(fact, one.name)

    def _missing(self, one: Pass, fact: str, index: int) -> str:
        said = f"pass {one.name} requires {fact!r}, and no pass before it provides that"
        later = next((p.name for p in self.passes[index:] if fact in p.provides), None)
        if later == one.name:
            return f"{said} but itself; take {fact!r} from its requires"
        if later:
            return f"{said}; {later} does: move {later} before {one.name}"
        told = {*FACTS, *self.given, *(f for p in self.passes for f in p.provides)}
        near = get_close_matches(fact, told - {fact}, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near and fact not in FACTS else ""
        return (
            f"{said}{hint}; put a pass that provides it before {one.name}, leave {one.name} out, "
            f"or say given={{{fact!r}}} where it holds for every graph"
        )

    @property
    def facts(self) -> frozenset[str]:
        """What holds behind the last pass."""
        return self.given.union(*(one.provides for one in self.passes))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the passes, in order."""
        return tuple(one.name for one in self.passes)

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def __len__(self) -> int:
        return len(self.passes)

    def __add__(self, other: Pipeline) -> Pipeline:
        if not isinstance(other, Pipeline):
            return NotImplemented
        return Pipeline(self.passes + other.passes, self.given | (other.given - self.facts))

    def without(self, names: Collection[str]) -> Pipeline:
        """The pipeline less the passes of these names.

        Raises:
            PipelineError: for a name that no pass has, or where a pass that stays needs one of
                them.
        """
        names = (names,) if isinstance(names, str) else names
        for name in names:
            if name not in self.names:
                near = get_close_matches(name, self.names, n=1, cutoff=0.0)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise PipelineError(
                    f"no pass is called {name!r}{hint} There are: {', '.join(self.names)}"
                )
        return replace(self, passes=tuple(p for p in self.passes if p.name not in names))

    def sound_in(self, mode: str) -> Pipeline:
        """The passes that are sound in ``"inference"`` or in ``"training"``.

        Raises:
            PipelineError: for another mode, or where a pass that stays needs one that does not.
        """
        if mode not in MODES:
            raise PipelineError(f"mode {mode!r} is not known; use {sorted(MODES)}")
        return replace(self, passes=tuple(p for p in self.passes if mode in p.modes))

    def insert(self, new: Pass) -> Pipeline:
        """The pipeline with ``new`` at the last place where its contract fits.

        Raises:
            PipelineError: where it fits nowhere; the reason given is that of the end.
        """
        refused: PipelineError | None = None
        for index in range(len(self.passes), -1, -1):
            try:
                return replace(self, passes=(*self.passes[:index], new, *self.passes[index:]))
            except PipelineError as error:
                refused = refused or error
        assert refused is not None
        raise refused


def _conflict(one: Pass, fact: str, provider: str) -> str:
    if not provider:
        return (
            f"pass {one.name} conflicts with {fact!r}, which the pipeline is given; "
            f"run {one.name} on graphs without it"
        )
    if provider == one.name:
        return f"pass {one.name} runs twice, and conflicts with the {fact!r} it provides; run once"
    return (
        f"pass {one.name} conflicts with {fact!r}, which {provider} before it provides; "
        f"move {one.name} before {provider}, or leave one of them out"
    )
