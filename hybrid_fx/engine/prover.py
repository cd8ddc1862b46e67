"""Hold a plan against the forward it came from, on weights that show mistakes."""

from __future__ import annotations

from torch import Tensor

from ..cache.roots import own_roots
from ..runtime import PlanRunner
from ..runtime.probe import Verdict, probe
from ..runtime.session import Timer
from .plans import Plans
from .proof import Reference, by_graph, by_module, by_walk, telling, told_apart
from .source import Source
from .step_proof import differs_in_steps, may_ask_for_sizes
from .together import Together


class Prover:
    """Proves the plans of one model.

    Args:
        source: The model.
        plans: Where its plans come from.
        team: The ranks that compute it together.
        timer: Opens the spans in which weights are gathered.
    """

    def __init__(self, source: Source, plans: Plans, team: Together, timer: Timer) -> None:
        self._source = source
        self._plans = plans
        self._team = team
        self._timer = timer

    def compare(self, runner: PlanRunner, tensors: dict[str, Tensor], limit: int | None) -> Verdict:
        """Prepare ``runner`` on weights like ``tensors``, and compare what it says.

        Args:
            runner: Of the plan; what it has prepared is of no use afterwards.
            tensors: The weights by their names: all of them whole, or as the source holds them
                where no rank is to have all.
            limit: The model's maximum positions.
        """
        source = self._source
        if source.collective and may_ask_for_sizes(source.model, source.view):
            why = "a hook or patch in it asks for sizes, which ranks do not try step by step"
            return Verdict(True, why)
        try:
            if self._source.in_part:
                with self._source.disguise(told_apart):
                    return probe(runner, self._in_part(runner, tensors), limit)
            changed = telling(tensors, [weight.name for weight in runner.plan.manifest.weights])
            weights = tensors | changed
            self._team.all(lambda: runner.prepare(weights))
            verdict = probe(runner, self._whole(weights, changed), limit)
            if not verdict.difference and self._runs_own_code():
                model = self._source.runnable()
                padded = verdict.rows_apart
                if difference := differs_in_steps(runner, model, changed, limit, padded=padded):
                    return Verdict(True, difference)
            return verdict
        finally:
            runner.workspace.release()

    def _runs_own_code(self) -> bool:
        """Whether code of a user's takes part, and this process has the weights to try it."""
        source = self._source
        return not source.collective and bool(own_roots(source.model, source.view))

    def _whole(self, weights: dict[str, Tensor], changed: dict[str, Tensor]) -> Reference:
        """The forward on ``weights``, of which ``changed`` are not the model's own."""
        if self._plans.canonical is None:
            # A sharded parameter holds nothing itself: all of them are given.
            given = weights if self._source.sharded else changed
            return by_module(self._source.runnable(), given)
        return by_graph(self._plans.canonical, weights)

    def _in_part(self, runner: PlanRunner, tensors: dict[str, Tensor]) -> Reference:
        """The forward on few weights at a time; ``runner`` is prepared when they are gone."""
        gather = self._source.gather
        assert gather is not None
        return by_walk(
            self._plans.captured(),
            tensors,
            gather,
            self._timer,
            then=lambda: self._team.all(lambda: runner.prepare(tensors)),
        )
