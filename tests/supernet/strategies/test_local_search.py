"""Local search from the largest architecture: where it starts, what it answers, how it resumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from supernet.answer import Answer
from supernet.choice import Architecture
from supernet.derive import Infeasible
from supernet.estimators.short_training import ShortTraining, Trained
from supernet.mixed_ops.softmax import Softmax
from supernet.recipe import Recipe
from supernet.strategies.local_search import LocalSearch
from supernet.strategies.refinement import Refinement
from supernet.tracking import read_journal

RECIPE = Recipe(
    epochs=1, batch_size=10, optimizer={"opt": "sgd", "lr": 0.1, "momentum": 0.9},
    scheduler={"sched": "cosine", "step_on_epochs": False, "min_lr": 0.0},
)  # fmt: skip


def make(**changes: Any) -> LocalSearch:
    settings: dict[str, Any] = {
        "moves": 3, "num_neighbours": 100, "steps": 4, "num_finalists": 1, "final_steps": 6,
        "repeats": 1, "margin": 0.0, "num_images": 30, "recipe": RECIPE,
    }  # fmt: skip
    return LocalSearch(refinement=Refinement(**{**settings, **changes}))


Loss = Callable[[Architecture], float]


class Judge:
    """Stands for `ShortTraining`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, loss: Loss) -> None:
        self.asked: list[Architecture] = []
        self.fail_at: int | None = None

        def judge(_: Any, architecture: Architecture, steps: int, repeat: int) -> Trained:
            if len(self.asked) == self.fail_at:
                raise KeyboardInterrupt
            self.asked.append(architecture)
            return Trained(60.0, loss(architecture))

        monkeypatch.setattr(ShortTraining, "judge", judge)


@pytest.mark.parametrize("share", [1.0, 0.99, 0.8])
def test_it_starts_from_the_largest_that_is_allowed(
    share: float, make_problem: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge(monkeypatch, lambda _: 2.0)
    problem = make_problem(Softmax(), share=share)
    budget, space = problem.objective.budget, problem.space
    found = make().search(problem, make_run()).best(budget)
    costs = [
        problem.cost.of(space.architecture({space.choices[0].name: a, space.choices[1].name: b}))
        for a in space.choices[0].options for b in space.choices[1].options
    ]  # fmt: skip
    assert found == judge.asked[0]  # nothing learns faster than it
    assert problem.cost.of(found) == max(cost for cost in costs if cost <= budget)


def test_the_answer_is_the_last_leader_as_it_was_judged(
    make_problem: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss is the cost, so that the cheapest wins."""
    problem, run = make_problem(Softmax(), share=1.0), make_run()
    Judge(monkeypatch, problem.cost.of)
    answer = make().search(problem, run)
    found, records = answer.best(None), read_journal(run.folder / "metrics.jsonl")
    assert problem.cost.of(found) == min(record["cost"] for record in records)
    assert answer.judged(found) == (60.0, problem.cost.of(found))
    leaders = make().refinement.leaders(records)
    assert len(leaders) == 3 and [r["move"] for r in leaders] == [2, 1, 0]
    with pytest.raises(Infeasible):
        answer.best(min(record["cost"] for record in records) - 1)


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_an_interrupted_search_goes_on(
    fail_at: int, make_problem: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(Softmax(), share=1.0)
    judge = Judge(monkeypatch, problem.cost.of)

    def search(run: Any) -> tuple[Answer, str]:
        answer = make().search(problem, run)
        return answer.best(None), (run.folder / "metrics.jsonl").read_text()

    whole, asked = search(make_run("whole")), list(judge.asked)
    judge.asked.clear()
    judge.fail_at = fail_at
    with pytest.raises(KeyboardInterrupt):
        search(make_run("cut"))
    judge.fail_at = None
    for _ in range(2):
        assert search(make_run("cut", resume=True)) == whole
        assert judge.asked == asked


def test_networks_are_really_trained(make_problem: Any, make_run: Any) -> None:
    problem = make_problem(Softmax(), share=1.0)
    answer = make(moves=1, num_neighbours=1).search(problem, make_run())
    best = answer.best(None)
    judged = ShortTraining(problem, RECIPE, 30).judge(best, 6)
    assert answer.judged(best) == judged
