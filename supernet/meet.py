"""Meet a latency budget as measured: derive, measure the whole network, correct, derive again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from latency.table import Measurement
from supernet.answer import Answer
from supernet.choice import Architecture
from supernet.derive import Infeasible
from supernet.limits import Cost

log = logging.getLogger(__name__)

MAX_TRIES = 6
TOLERANCE = 0.02  # below the budget: more was to be had
MARGIN = 0.003  # below the budget that is aimed at, for the noise of measuring


@dataclass(frozen=True)
class Attempt:
    """A derived network and what it turned out to need.

    Attributes:
        allowed: largest cost that it was derived under; None without a budget.
        predicted: its predicted latency.
        measured: of the whole network.
    """

    architecture: Architecture
    allowed: float | None
    predicted: float
    measured: Measurement

    def to_dict(self) -> dict[str, Any]:
        return {
            "allowed": self.allowed,
            "predicted": self.predicted,
            "measured_ms": asdict(self.measured),
            "architecture": dict(self.architecture),
        }


@dataclass(frozen=True)
class Met:
    """The outcome.

    Attributes:
        attempts: in order.
        best: the attempt that is taken.
    """

    attempts: list[Attempt]
    best: Attempt


def meet(
    answer: Answer,
    budget: float | None,
    cost: Cost,
    predict: Callable[[Architecture], float],
    measure: Callable[[Architecture], Measurement],
) -> Met:
    """Find the best architecture whose measured latency is within the budget, and close to it.

    Where a network misses the budget, or stays more than `TOLERANCE` below it though the budget
    binds, the prediction is corrected by what was measured, and the next network is derived.

    Args:
        budget: in ms; None measures the unconstrained answer.
        cost: what the answer's budget is of.
        predict: latency of the whole network, in ms; at most its cost.
        measure: the whole network, in ms.

    Raises:
        Infeasible: not even the prediction allows an architecture.
    """
    wanted = answer.best(None)
    if budget is None:
        attempt = Attempt(wanted, None, predict(wanted), measure(wanted))
        return Met([attempt], attempt)
    binds = answer.binds(budget)
    attempts: list[Attempt] = []
    allowed = budget
    for _ in range(MAX_TRIES):
        try:
            found = answer.best(allowed, but=[a.architecture for a in attempts])
        except Infeasible:
            if not attempts:
                raise
            break
        met = [cost.of(a.architecture) for a in attempts if a.measured.median_ms <= budget]
        if met and cost.of(found) <= max(met):
            break  # nothing more of the budget is to be had
        attempt = Attempt(found, allowed, predict(found), measure(found))
        attempts.append(attempt)
        used = attempt.measured.median_ms / budget
        log.info(
            "derived for %.4g ms: predicted %.4g, measured %.4g ms (%.1f%% of the budget)",
            allowed, attempt.predicted, attempt.measured.median_ms, 100 * used,
        )  # fmt: skip
        if used <= 1 and (used >= 1 - TOLERANCE or (found == wanted and not binds)):
            break
        costs = sum(cost.of(a.architecture) for a in attempts)
        allowed = (1 - MARGIN) * budget * costs / sum(a.measured.median_ms for a in attempts)
    within = [a for a in attempts if a.measured.median_ms <= budget]
    if within:
        best = max(within, key=lambda a: a.measured.median_ms)
    else:
        best = min(attempts, key=lambda a: a.measured.median_ms)
        log.warning(
            "no derived network was measured within %.4g ms: the fastest of %d takes %.4g ms",
            budget, len(attempts), best.measured.median_ms,
        )  # fmt: skip
    return Met(attempts, best)
