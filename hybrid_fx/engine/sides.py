"""Which adapters are folded and which stay branches beside their weights; the runner for that."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ..config import HybridConfig
from ..plan.plan import Plan
from ..runtime import PlanRunner
from ..runtime.shared_rows import SharedRows
from .plans import Plans
from .runners import make_runner
from .source import Source
from .stats import Stats

#: Fold an adapter only where rounding takes less than this share of it.
FOLD_LIMIT = 0.05


def side_of(errors: Mapping[str, float]) -> frozenset[str]:
    """The adapted places, of those with their errors, that are not to be folded."""
    return frozenset(site for site, error in errors.items() if error >= FOLD_LIMIT)


class Sides:
    """The runners of one model: the one that folds all adapters, and the one in use.

    Args:
        plans: Where the plans of the model come from.
        source: The model.
        rows: Where weights that are stacked lie in one buffer.

    Attributes:
        runner: In use; ``None`` where nothing is loaded.
        folding: That folds all; the one in use where no adapter stays a branch.
        errors: Measured relative error of folding, by adapted place; empty where not measured.
    """

    def __init__(
        self,
        plans: Plans,
        source: Source,
        config: HybridConfig,
        stats: Stats,
        rows: SharedRows | None,
    ) -> None:
        self._plans = plans
        self._source = source
        self._config = config
        self._stats = stats
        self._rows = rows
        self._auto = config.lora == "auto"
        self._side: frozenset[str] = frozenset()
        self.runner: PlanRunner | None = None
        self.folding: PlanRunner | None = None
        self.errors: dict[str, float] = {}

    def load(self) -> Plan:
        """Use the runner that folds all, and return its plan."""
        plan = self._plans.plan()
        self.folding = self.runner = self._make(plan, measures=self._auto)
        return plan

    def choose(self, tensors: dict[str, Tensor]) -> None:
        """Measure what folding takes of each adapter in ``tensors``; use the runner for that."""
        assert self.folding is not None
        assert self.runner is not None
        if not self._auto or not self.folding.plan.manifest.lora:
            return
        errors = self.folding.measure(tensors)
        side = side_of(errors)
        if side != self._side:
            old = self.runner
            new = self._make(self._plans.plan(side), measures=False) if side else self.folding
            old.release()
            self.runner, self._side = new, side
        self.errors = errors

    def _make(self, plan: Plan, *, measures: bool) -> PlanRunner:
        return make_runner(
            plan, self._source, self._config, self._stats, rows=self._rows, measures=measures
        )

    @property
    def all_folded(self) -> bool:
        """Whether all adapters were measured and folded: then a prepare measures them anew."""
        return bool(self.errors) and not self._side

    def still_fold(self) -> bool:
        """Take what a prepare measured; whether all are folded still. If not, choose again."""
        assert self.runner is not None
        measured = self.runner.errors
        stays = not side_of(measured)
        self.errors = measured if stays else {}
        return stays

    @property
    def prepare_peak_bytes(self) -> int:
        """An upper bound of the bytes a prepare holds at once, the choice included."""
        if self.runner is None or self.folding is None:
            return 0
        measuring = self.runner.prepared.nbytes + self.folding.measure_peak_bytes
        return max(self.runner.prepare_peak_bytes, measuring if self.errors else 0)

    def release(self) -> None:
        """Give the inference memory of both back."""
        for runner in (self.runner, self.folding):
            if runner is not None:
                runner.release()

    def drop(self) -> None:
        """Give both up, and what was chosen."""
        self.release()
        self.runner = self.folding = None
        self._side, self.errors = frozenset(), {}
