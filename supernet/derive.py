"""From scores and a budget to the best valid architecture, exactly, as an integer program."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from scipy.optimize import Bounds, milp
from scipy.optimize import LinearConstraint as Rows
from torch import Tensor

from latency.model import AdditiveCost
from supernet.choice import Architecture
from supernet.space import LinearConstraint, SearchSpace

# HiGHS stops at an absolute gap of 1e-6: scaled up, scores that differ by more than 1e-10 are told
# apart.
_SCALE = 1e4


class Infeasible(ValueError):
    """No valid architecture meets the constraints."""


def derive(
    space: SearchSpace,
    scores: Mapping[str, Tensor],
    cost: AdditiveCost | None = None,
    budget: float | None = None,
) -> Architecture:
    """The valid architecture of the largest total score whose cost is at most `budget`.

    Args:
        scores: by choice, shape (num_options,); log-probabilities give the most probable one.
        cost: additive cost, in its own unit.
        budget: largest cost allowed; None for no limit.

    Raises:
        Infeasible: no valid architecture meets the budget; the message has the reachable range.
    """
    limits = list(space.constraints)
    if budget is not None:
        assert cost is not None, "a budget needs a cost"
        limits.append(LinearConstraint(_terms(space, cost.per_option), upper=budget - cost.fixed))
    scores = space.scores(scores)
    while True:
        found = _solve(space, scores, limits)
        if found is None:
            low, high = reachable(space, cost) if cost is not None else (math.nan, math.nan)
            raise Infeasible(
                f"no valid architecture meets {budget:.6g} {cost.unit if cost else ''}: "
                f"the reachable range is {low:.6g} to {high:.6g}"
            )
        if budget is None or cost is None or cost.of(found) <= budget:
            return found
        # The solver's tolerance let it through by a hair: exclude it and look again.
        limits.append(LinearConstraint(dict.fromkeys(found, 1.0), upper=len(space.choices) - 1))


def reachable(space: SearchSpace, cost: AdditiveCost) -> tuple[float, float]:
    """Cost of the cheapest and of the dearest valid architecture."""
    ends = []
    for sign in (-1.0, 1.0):
        found = _solve(space, {n: sign * v for n, v in cost.per_option.items()}, space.constraints)
        assert found is not None, "the space has no valid architecture"
        ends.append(cost.of(found))
    return ends[0], ends[1]


def _terms(space: SearchSpace, values: Mapping[str, Tensor]) -> dict[tuple[str, str], float]:
    return {
        (choice.name, option): float(value)
        for choice in space.choices
        for option, value in zip(choice.options, values[choice.name].tolist(), strict=True)
    }


def _solve(
    space: SearchSpace,
    scores: Mapping[str, Tensor],
    constraints: tuple[LinearConstraint, ...] | list[LinearConstraint],
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
    rows += constraints
    matrix = np.zeros((len(rows), len(columns)))
    for row, constraint in zip(matrix, rows, strict=True):
        for pair, value in constraint.terms.items():
            row[columns[pair]] = value
    result = milp(
        -objective / spread * _SCALE,
        constraints=Rows(matrix, [r.lower for r in rows], [r.upper for r in rows]),
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    if result.status == 2:
        return None
    assert result.x is not None, result.message
    chosen = [pair for pair, index in columns.items() if result.x[index] > 0.5]
    return space.architecture(dict(chosen))
