"""Local search by short trainings, from the largest architecture that is allowed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latency.model import macs_cost
from latency.sites import trace
from supernet.answer import Answer, BestTried
from supernet.derive import derive
from supernet.mixed_ops.base import MixedOp
from supernet.strategies.base import Problem, Run, Strategy
from supernet.strategies.refinement import Refinement


class LocalSearch(Strategy):
    """Starts from the architecture of the most multiply-accumulates within budget and limits, and
    changes what keeps it from learning, one choice at a time. The supernet is not trained.

    Two things make a network good: that it can hold much, and that it can be trained (Chen et al.
    2021, TE-NAS, section 3). The first is known before the search; `Refinement` finds the second.
    """

    mixes = False

    def __init__(self, *, refinement: Refinement) -> None:
        self.refinement = refinement

    def search(self, problem: Problem, run: Run) -> Answer:
        ranked = list((run.load() or {"ranked": []})["ranked"])
        space, img_size = problem.space, problem.space.img_size
        network = space.build(MixedOp, problem.data.info.num_classes, search=False)
        sites = trace(network, space.choices, (1, space.in_chans, img_size, img_size))
        macs = macs_cost(space.choices, sites).per_option
        most = max(1.0, *(float(vector.max()) for vector in macs.values()))
        scores = {name: vector / most for name, vector in macs.items()}
        budget = problem.objective.budget
        start = derive(space, scores, problem.cost, budget, problem.limits)
        place = {"step": 0, "epoch": 0}
        for _ in self.refinement.refine(problem, run, start, scores, ranked, place):
            run.save({"ranked": ranked})
        return self.answer(problem, {"ranked": ranked})

    def answer(self, problem: Problem, state: Mapping[str, Any]) -> Answer:
        leaders = self.refinement.leaders(state["ranked"])
        return BestTried(problem.space, leaders, problem.limits)
