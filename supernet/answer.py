"""What a search found: the best architecture under any budget."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from copy import copy
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import Tensor

from latency.model import AdditiveCost
from supernet.choice import Architecture
from supernet.derive import Infeasible, derive
from supernet.limits import Limit, Membership
from supernet.space import SearchSpace

LEAST_USE = 0.985  # share of a priced budget
GAP = 1e-4  # of the integer program that looks between the two


class Judge(NamedTuple):
    """Where an accuracy comes from.

    Attributes:
        name: for people.
        unit: none where a score stands in its place.
        oracle: whether it is the truth that searches are judged by.
    """

    name: str
    unit: str = "%"
    oracle: bool = False


class Answer(ABC):
    """One search answers for every budget.

    Attributes:
        inputs: by node, what its inputs weigh in the supernet where the search learned that.
    """

    inputs: Mapping[str, Tensor] = MappingProxyType({})

    @abstractmethod
    def best(self, budget: float | None, but: Collection[Architecture] = ()) -> Architecture:
        """The best valid architecture whose predicted cost is at most `budget` (None: any).

        Args:
            but: architectures that are out of the question.

        Raises:
            Infeasible: there is none.
        """

    def binds(self, budget: float | None) -> bool | None:
        """Whether the budget keeps from what would be best without one; None where nobody knows.

        Raises:
            Infeasible: nothing costs so little.
        """
        return self.best(budget) != self.best(None)

    def judged(self, architecture: Architecture) -> tuple[float, float] | None:
        """(accuracy in percent, loss) that the search itself found for one of its answers, or None
        where the shared weights are to judge it."""
        return None

    def judge(self, architecture: Architecture) -> Judge:
        """Of the accuracy in `judged`."""
        return Judge("short training")

    @property
    def num_judged(self) -> int | None:
        """How many architectures the search judged one by one, where it did nothing else."""
        return None


class MostProbable(Answer):
    """Of a search with logits: the largest total score.

    Scores that were learned under the price of a budget undersell what is dear, so that the most
    probable architecture can lie far below the cost that the search expected. Of a priced budget
    at least `LEAST_USE` is used, therefore, wherever an architecture does.

    Args:
        scores: by choice, as `Problem.scores` gives them.
        cost: that the budget is of.
        limits: on further costs.
        priced: the scores were learned under a budget that was still active at the end: its
            multiplier was above zero, or the expected cost was at it.
        guarded: keep options that compute nothing from winning (`SearchSpace.safeguards`) where
            an architecture within budget and limits does.
        inputs: of nodes, as `Problem.inputs` gives them.
    """

    def __init__(
        self,
        space: SearchSpace,
        scores: Mapping[str, Tensor],
        cost: AdditiveCost,
        limits: Sequence[Limit] = (),
        priced: bool = False,
        guarded: bool = False,
        inputs: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.space, self.scores, self.cost, self.limits = space, scores, cost, limits
        self.priced, self.inputs = priced, inputs
        self.guarded = copy(space)
        self.guarded.at_most(space.safeguards if guarded else ())

    def best(self, budget: float | None, but: Collection[Architecture] = ()) -> Architecture:
        limits = [*self.limits, *([Limit(Membership(but), 0)] if but else [])]
        with suppress(Infeasible):
            return self._best(self.guarded, budget, limits)
        return self._best(self.space, budget, limits)

    def _best(
        self, space: SearchSpace, budget: float | None, limits: Sequence[Limit]
    ) -> Architecture:
        if budget is not None and self.priced:
            least = Limit(self.cost.negative(), -LEAST_USE * budget)
            with suppress(Infeasible):
                return derive(space, self.scores, self.cost, budget, [*limits, least], GAP)
        return derive(space, self.scores, self.cost, budget, limits)

    def binds(self, budget: float | None) -> bool:
        if budget is None:
            return False
        return self.priced or self.cost.of(self.best(None)) > budget


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

    def binds(self, budget: float | None) -> bool | None:
        if budget is not None and all(record["cost"] <= budget for record in self.ranked):
            return None  # nothing dearer was tried
        return super().binds(budget)

    def _holds(self, options: Mapping[str, str], but: Collection[Architecture]) -> bool:
        architecture = self.space.architecture(options)
        # a space may be restricted further once the search is done
        allowed = architecture not in but and self.space.is_valid(architecture)
        return allowed and all(limit.holds(architecture) for limit in self.limits)


class BestTried(BestRanked):
    """Of a search that judged each architecture by itself.

    Args:
        ranked: as for `BestRanked`; parts, which have another `phase`, count as judged alone.
    """

    def __init__(
        self,
        space: SearchSpace,
        ranked: Sequence[Mapping[str, Any]],
        limits: Sequence[Limit] = (),
    ) -> None:
        super().__init__(space, [r for r in ranked if r["phase"] == "rank"], limits)
        self._num_judged = len(ranked)

    def judged(self, architecture: Architecture) -> tuple[float, float] | None:
        record = self._record(architecture)
        return record["accuracy"], record["loss"]

    def judge(self, architecture: Architecture) -> Judge:
        record = self._record(architecture)
        if "judge" not in record:
            return super().judge(architecture)
        return Judge(record["judge"], record["unit"], record["oracle"])

    @property
    def num_judged(self) -> int:
        return self._num_judged

    def _record(self, architecture: Architecture) -> Mapping[str, Any]:
        return next(r for r in self.ranked if r["architecture"] == dict(architecture))


class Refined(Answer):
    """Of a search with logits whose most probable architecture was refined for one budget: the
    best refined one, or the most probable one where none is within another budget."""

    def __init__(self, refined: BestRanked, probable: Answer) -> None:
        self.refined, self.probable = refined, probable
        self.inputs = probable.inputs

    def best(self, budget: float | None, but: Collection[Architecture] = ()) -> Architecture:
        with suppress(Infeasible):
            return self.refined.best(budget, but)
        return self.probable.best(budget, but)

    def binds(self, budget: float | None) -> bool | None:
        return self.probable.binds(budget)
