"""What a search found: the best architecture under any budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from latency.model import AdditiveCost
from supernet.choice import Architecture
from supernet.derive import Infeasible, derive
from supernet.limits import Limit, Membership
from supernet.space import SearchSpace


class Answer(ABC):
    """One search answers for every budget."""

    @abstractmethod
    def best(self, budget: float | None, but: Collection[Architecture] = ()) -> Architecture:
        """The best valid architecture whose predicted cost is at most `budget` (None: any).

        Args:
            but: architectures that are out of the question.

        Raises:
            Infeasible: there is none.
        """


class MostProbable(Answer):
    """Of a search with logits: the largest total score.

    Args:
        scores: by choice, as `Relaxation.scores` gives them.
        cost: that the budget is of.
        limits: on further costs.
    """

    def __init__(
        self,
        space: SearchSpace,
        scores: Mapping[str, Tensor],
        cost: AdditiveCost,
        limits: Sequence[Limit] = (),
    ) -> None:
        self.space, self.scores, self.cost, self.limits = space, scores, cost, limits

    def best(self, budget: float | None, but: Collection[Architecture] = ()) -> Architecture:
        limits = [*self.limits, *([Limit(Membership(but), 0)] if but else [])]
        return derive(self.space, self.scores, self.cost, budget, limits)


class BestRanked(Answer):
    """Of a search without logits: the first of the architectures that it ranked.

    Args:
        ranked: records with `architecture`, `cost`, `rank_value`, `loss` and `candidate`.
        limits: on further costs.
    """

    def __init__(
        self,
        space: SearchSpace,
        ranked: Sequence[Mapping[str, Any]],
        limits: Sequence[Limit] = (),
    ) -> None:
        self.space, self.ranked, self.limits = space, ranked, limits

    def best(self, budget: float | None, but: Collection[Architecture] = ()) -> Architecture:
        within = [
            r
            for r in self.ranked
            if (budget is None or r["cost"] <= budget)
            and self._holds(r["architecture"], but)
        ]
        if not within:
            meets = " and ".join(["", *map(str, self.limits)])
            raise Infeasible(
                f"none of the {len(self.ranked)} ranked architectures costs at most {budget}"
                f"{meets}; the cheapest costs {min(r['cost'] for r in self.ranked):.6g}"
            )
        best = min(within, key=lambda r: (r["rank_value"], r["loss"], r["candidate"]))
        return self.space.architecture(best["architecture"])

    def _holds(self, options: Mapping[str, str], but: Collection[Architecture]) -> bool:
        architecture = self.space.architecture(options)
        return architecture not in but and all(limit.holds(architecture) for limit in self.limits)
