"""From scores and a budget to the best valid architecture, exactly, as an integer program."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import Bounds, milp
from scipy.optimize import LinearConstraint as Rows
from torch import Tensor

from latency.model import AdditiveCost
from supernet.choice import Architecture
from supernet.limits import Cost, Limit, figure
from supernet.sampling import make_sampler
from supernet.space import LinearConstraint, SearchSpace

# HiGHS stops at an absolute gap of 1e-6: scaled up, scores that differ by more than 1e-10 are told
# apart.
_SCALE = 1e4


class Infeasible(ValueError):
    """No valid architecture meets the constraints."""


def derive(
    space: SearchSpace,
    scores: Mapping[str, Tensor],
    cost: Cost | None = None,
    budget: float | None = None,
    limits: Sequence[Limit] = (),
    gap: float = 0.0,
) -> Architecture:
    """The valid architecture of the largest total score within a budget and all limits.

    Args:
        scores: by choice, shape (num_options,); log-probabilities give the most probable one.
        cost: what the budget is for, in its own unit.
        budget: largest cost allowed; None for no limit.
        limits: on further costs.
        gap: share of the largest score that the answer's may fall short by. Zero is exact, but
            takes minutes where the scores are all but the cost and that is bounded from below too.

    Raises:
        Infeasible: no valid architecture is within them; the message has the reachable range.
    """
    bounds = list(limits)
    if budget is not None:
        assert cost is not None, "a budget needs a cost"
        bounds.insert(0, Limit(cost, budget))
    found = _best(space, space.scores(scores), bounds, gap)
    if found is None:
        raise Infeasible(_refusal(space, bounds))
    return found


def reachable(
    space: SearchSpace, cost: Cost, limits: Sequence[Limit] = ()
) -> tuple[float, float]:
    """Cost of the cheapest and of the dearest valid architecture within the limits; where costs are
    not additive, bounds of these (`SearchSpace.ends`).

    Raises:
        Infeasible: there is none.
    """
    if not isinstance(cost, AdditiveCost):
        costs = [cost.of(architecture) for architecture in space.ends()]
        return min(costs), max(costs)
    ends = []
    for sign in (-1.0, 1.0):
        found = _best(space, {n: sign * v for n, v in cost.per_option.items()}, limits)
        if found is None:
            raise Infeasible(_refusal(space, limits))
        ends.append(cost.of(found))
    return ends[0], ends[1]


def check_limits(
    space: SearchSpace, cost: Cost, budget: float | None, limits: Sequence[Limit]
) -> None:
    """Make sure before training that budget and limits can be met, all at once.

    Raises:
        Infeasible: names what cannot be met, and what can be reached.
        ValueError: costs are not additive, and none of many architectures is within them.
    """
    if not isinstance(cost, AdditiveCost):
        high = math.inf if budget is None else budget
        make_sampler(space, cost, 0.0, high, limits).sample(torch.Generator().manual_seed(0))
        return
    derive(space, _nothing(space), cost, budget, limits)


def check_space(space: SearchSpace) -> Architecture:
    """Make sure that the space has a valid architecture: sampling would never find one.

    Returns:
        One.

    Raises:
        Infeasible: there is none.
    """
    return derive(space, _nothing(space))


def is_feasible(space: SearchSpace, bounds: Sequence[Limit]) -> bool:
    """Whether any valid architecture is within all bounds."""
    return _best(space, _nothing(space), bounds) is not None


def _nothing(space: SearchSpace) -> dict[str, Tensor]:
    """Scores by which all architectures are equal."""
    return {c.name: torch.zeros(len(c.options), dtype=torch.float64) for c in space.choices}


def _best(
    space: SearchSpace, scores: Mapping[str, Tensor], bounds: Sequence[Limit], gap: float = 0.0
) -> Architecture | None:
    """Solve, and as long as the answer is above a bound, add the row that forbids it."""
    rows = [*space.constraints, *(row for b in bounds for row in b.cost.rows(b.upper))]
    while True:
        found = _solve(space, scores, rows, gap)
        if found is None:
            return None
        broken = [bound for bound in bounds if not bound.holds(found)]
        if not broken:
            return found
        rows += [bound.cost.cut(found, bound.upper) for bound in broken]


def _refusal(space: SearchSpace, bounds: Sequence[Limit]) -> str:
    """Why nothing is within the bounds: the first that cannot be met alone, else all of them."""
    ranges = []
    for bound in bounds:
        low, reach = _reach(space, bound.cost)
        if bound.upper < low:
            return f"no valid architecture meets {bound}: the reachable range is {reach}"
        ranges.append(f"{bound.cost.name} {reach}")
    if not bounds:
        return (
            "the space has no valid architecture; exclude fewer candidates, or allow more of them "
            "by at_most"
        )
    return (
        f"no valid architecture meets {' and '.join(map(str, bounds))} together; alone, they "
        f"reach: {', '.join(ranges)}"
    )


def _reach(space: SearchSpace, cost: Cost) -> tuple[float, str]:
    """The lowest cost of all valid architectures, and the range in words."""
    if isinstance(cost, AdditiveCost):
        low, high = reachable(space, cost)
        return low, f"{figure(low)} to {figure(high)} {cost.unit}"
    nothing, low = _nothing(space), math.inf
    while low > 0:
        found = _best(space, nothing, [Limit(cost, math.nextafter(low, 0.0))])
        if found is None:
            break
        low = cost.of(found)
    return low, f"{figure(low)} {cost.unit} and more"


def _terms(space: SearchSpace, values: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    return {
        (choice.name, option): float(value)
        for choice in space.choices
        for option, value in zip(choice.options, values[choice.name].tolist(), strict=True)
    }


def _solve(
    space: SearchSpace,
    scores: Mapping[str, Tensor],
    constraints: Sequence[LinearConstraint],
    gap: float,
) -> Architecture | None:
    """Maximise sum of scores over binary x[choice, option], one option a choice."""
    terms = _terms(space, scores)
    columns = {pair: index for index, pair in enumerate(terms)}
    objective = np.array(list(terms.values()))
    if not np.isfinite(objective).all():
        raise ValueError("scores must be finite numbers: the search diverged")
    spread = np.ptp(objective) or 1.0
    rows = [
        LinearConstraint({(c.name, o): 1.0 for o in c.options}, 1.0, 1.0) for c in space.choices
    ]
    rows += [LinearConstraint(dict.fromkeys(space.excluded, 1.0), upper=0.0), *constraints]
    matrix = np.zeros((len(rows), len(columns)))
    for row, constraint in zip(matrix, rows, strict=True):
        for pair, value in constraint.terms.items():
            row[columns[pair]] = value
    result = milp(
        -objective / spread * _SCALE,
        constraints=Rows(matrix, [r.lower for r in rows], [r.upper for r in rows]),
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": gap},
    )
    if result.status == 2:
        return None
    assert result.x is not None, result.message
    chosen = [pair for pair, index in columns.items() if result.x[index] > 0.5]
    return space.architecture(dict(chosen))
