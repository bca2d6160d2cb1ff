from __future__ import annotations

from typing import Any

import pytest
import torch

from supernet.checkpoint import load_checkpoint
from supernet.choice import Architecture
from supernet.engine import Diverged
from supernet.estimators.short_training import ShortTraining, Trained
from supernet.mixed_ops.softmax import Softmax
from supernet.recipe import Recipe
from supernet.strategies.base import Run
from supernet.strategies.random_search import RandomSearch
from supernet.tracking import read_journal

RECIPE = Recipe(
    epochs=1, batch_size=10, optimizer={"opt": "sgd", "lr": 0.1, "momentum": 0.9},
    scheduler={"sched": "cosine", "step_on_epochs": False, "min_lr": 0.0},
)  # fmt: skip


def make_search(**changes: Any) -> RandomSearch:
    settings: dict[str, Any] = {"steps": 3, "recipe": RECIPE, "num_images": 30, "num_samples": 6}
    return RandomSearch(**{**settings, **changes})


class Judge:
    """Stands for `ShortTraining`: the accuracy is a function of the architecture."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None) -> None:
        self.asked: list[Architecture] = []
        self.fail_at = fail_at

        def judge(_: Any, architecture: Architecture, steps: int) -> Trained:
            if len(self.asked) == self.fail_at:
                raise KeyboardInterrupt
            self.asked.append(architecture)
            return Trained(self.quality(architecture), 1.0)

        monkeypatch.setattr(ShortTraining, "judge", judge)

    @staticmethod
    def quality(architecture: Architecture) -> float:
        return float(sum(map(ord, str(architecture))) % 89)


def test_the_best_of_the_trained_is_the_answer_and_was_judged(
    make_problem, make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, judge, run = make_problem(Softmax(), share=1.0), Judge(monkeypatch), make_run()
    answer = make_search().search(problem, run)
    best = max(judge.asked, key=judge.quality)
    budget = problem.objective.budget
    assert answer.best(budget) == best and answer.judged(best) == (judge.quality(best), 1.0)
    assert len(set(judge.asked)) == len(judge.asked) == 6
    assert all(problem.space.is_valid(a) and problem.cost.of(a) <= budget for a in judge.asked)
    records = read_journal(run.folder / "metrics.jsonl")
    assert [r["architecture"] for r in records] == [dict(a) for a in judge.asked]
    assert [r["step"] for r in records] == [3, 6, 9, 12, 15, 18]
    again = make_search().answer(problem, load_checkpoint(run.checkpoint)["search"])
    assert again.best(budget) == best


def test_it_is_uniform_over_what_is_within_the_budget(
    make_problem, make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked for more than there is, it trains all of it once."""
    problem, judge = make_problem(Softmax(), share=0.9), Judge(monkeypatch)
    make_search(num_samples=10**6).search(problem, make_run())
    space, generator = problem.space, torch.Generator().manual_seed(5)
    within = {space.sample(generator) for _ in range(2000)}
    within = {a for a in within if problem.cost.of(a) <= problem.objective.budget}
    assert 1 < len(within) < space.size
    assert len(judge.asked) == len(within) and set(judge.asked) == within


@pytest.mark.parametrize(
    ("bounds", "trained"),
    [
        ({"total_steps": 12}, 4),
        ({"total_steps": 14}, 4),
        ({"total_steps": 1}, 1),
        ({"total_steps": 12, "num_samples": 2}, 2),
        ({"seconds": 25}, 3),
        ({"seconds": 0.001}, 1),
    ],
)
def test_it_ends_with_the_first_bound_that_is_reached(
    bounds: dict[str, Any], trained: int, make_problem, make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each training takes ten seconds here."""
    judge = Judge(monkeypatch)
    monkeypatch.setattr(Run, "seconds", property(lambda _: 10.0 * len(judge.asked)))
    make_search(**{"num_samples": None, **bounds}).search(
        make_problem(Softmax(), share=1.0), make_run()
    )
    assert len(judge.asked) == trained


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_an_interrupted_one_goes_on(
    fail_at: int, make_problem, make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def search(run: Any) -> tuple[Any, str]:
        answer = make_search().search(make_problem(Softmax(), share=1.0), run)
        return answer.best(None), (run.folder / "metrics.jsonl").read_text()

    judge = Judge(monkeypatch)
    whole, asked = search(make_run("whole")), list(judge.asked)
    judge.asked.clear()
    judge.fail_at = fail_at
    with pytest.raises(KeyboardInterrupt):
        search(make_run("cut"))
    judge.fail_at = None
    assert search(make_run("cut", resume=True)) == whole and judge.asked == asked
    assert search(make_run("cut", resume=True)) == whole and judge.asked == asked


def test_time_spent_before_an_interruption_counts(make_run) -> None:
    run = make_run("time")
    run.load()
    run.started -= 100.0
    run.save({"a": 1})
    again = make_run("time", resume=True)
    assert again.seconds < 50
    assert again.load() == {"a": 1} and 100 <= again.seconds < 150


def test_one_that_diverges_is_not_chosen(
    make_problem, make_run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    out: list[Architecture] = []

    def judge(_: Any, architecture: Architecture, steps: int) -> Trained:
        if not out:
            out.append(architecture)
            raise Diverged("the training loss is nan")
        return Trained(1.0, 5.0)

    monkeypatch.setattr(ShortTraining, "judge", judge)
    answer = make_search(num_samples=2).search(make_problem(Softmax()), make_run())
    assert answer.best(None) != out[0] and "is out" in caplog.text


def test_networks_are_really_trained(make_problem, make_run) -> None:
    problem, run = make_problem(Softmax()), make_run()
    answer = make_search(num_samples=2, steps=4).search(problem, run)
    best = answer.best(problem.objective.budget)
    assert ShortTraining(problem, RECIPE, 30).judge(best, 4) == answer.judged(best)


@pytest.mark.parametrize("name", ["steps", "num_images", "num_samples", "total_steps", "seconds"])
def test_bounds_of_zero_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"strategy.{name} must be above 0; got 0"):
        make_search(**{name: 0})


def test_a_search_without_end_is_refused() -> None:
    with pytest.raises(ValueError, match="set one or more of strategy.num_samples"):
        make_search(num_samples=None)
