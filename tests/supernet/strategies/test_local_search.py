"""Local search from the largest architecture: where it starts, what it answers, how it resumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from supernet.derive import Infeasible
from supernet.estimators.short_training import ShortTraining
from supernet.mixed_ops.softmax import Softmax
from supernet.recipe import Recipe
from supernet.strategies.local_search import LocalSearch
from supernet.strategies.refinement import Refinement
from supernet.tracking import read_journal


@pytest.fixture
def make(make_refinement: Callable[..., Refinement]) -> Callable[..., LocalSearch]:
    return lambda **changes: LocalSearch(refinement=make_refinement(margin=0.0, **changes))


@pytest.mark.parametrize("share", [1.0, 0.99, 0.8])
def test_it_starts_from_the_largest_that_is_allowed(
    share: float, make: Any, make_problem: Any, make_run: Any, make_judge: Any
) -> None:
    judge = make_judge()
    problem = make_problem(Softmax(), share=share)
    budget, space = problem.objective.budget, problem.space
    found = make().search(problem, make_run()).best(budget)
    costs = [
        problem.cost.of(space.architecture({space.choices[0].name: a, space.choices[1].name: b}))
        for a in space.choices[0].options for b in space.choices[1].options
    ]  # fmt: skip
    assert found == judge.architectures[0]  # nothing learns faster than it
    assert problem.cost.of(found) == max(cost for cost in costs if cost <= budget)


def test_the_answer_is_the_last_leader_as_it_was_judged(
    make: Any, make_problem: Any, make_run: Any, make_judge: Any
) -> None:
    """The loss is the cost, so that the cheapest wins."""
    problem, run = make_problem(Softmax(), share=1.0), make_run()
    make_judge(lambda found, _: problem.cost.of(found))
    answer = make().search(problem, run)
    found, records = answer.best(None), read_journal(run.folder / "metrics.jsonl")
    assert problem.cost.of(found) == min(record["cost"] for record in records)
    assert answer.judged(found) == (50.0, problem.cost.of(found))
    leaders = make().refinement.leaders(records)
    assert len(leaders) == 3 and [r["move"] for r in leaders] == [2, 1, 0]
    with pytest.raises(Infeasible):
        answer.best(min(record["cost"] for record in records) - 1)


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_an_interrupted_search_goes_on(
    fail_at: int, make: Any, make_problem: Any, make_judge: Any, check_resumes: Any
) -> None:
    problem = make_problem(Softmax(), share=1.0)
    judge = make_judge(lambda found, _: problem.cost.of(found))
    check_resumes(judge, fail_at, lambda run: make().search(problem, run))


def test_networks_are_really_trained(
    make: Any, make_problem: Any, make_run: Any, recipe: Recipe
) -> None:
    problem = make_problem(Softmax(), share=1.0)
    answer = make(moves=1, num_neighbours=1).search(problem, make_run())
    best = answer.best(None)
    judged = ShortTraining(problem, recipe, 30).judge(best, 9)
    assert answer.judged(best) == judged
