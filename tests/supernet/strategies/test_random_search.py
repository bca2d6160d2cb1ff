from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from supernet.answer import Answer
from supernet.checkpoint import load_checkpoint
from supernet.choice import Architecture
from supernet.engine import Diverged
from supernet.estimators.base import Estimate, Estimator
from supernet.estimators.short_training import ShortTraining
from supernet.mixed_ops.one_shot import OneShot
from supernet.mixed_ops.softmax import Softmax
from supernet.recipe import Recipe
from supernet.strategies.base import Run
from supernet.strategies.random_search import RandomSearch
from supernet.strategies.ranking import Ranking
from supernet.tracking import read_journal


@pytest.fixture
def make_search() -> Callable[..., RandomSearch]:
    def make(**changes: Any) -> RandomSearch:
        return RandomSearch(**{"num_evaluations": 6, **changes})

    return make


def quality(architecture: Architecture, _: Any = None) -> float:
    """An accuracy."""
    return float(sum(map(ord, str(architecture))) % 89)


def test_the_best_of_the_trained_is_the_answer_and_was_judged(
    make_search, make_tried, make_run, make_judge
) -> None:
    problem, run = make_tried(Softmax(), share=1.0), make_run()
    judge = make_judge(accuracy=quality)
    answer = make_search().search(problem, run)
    best, tried = max(judge.architectures, key=quality), judge.architectures
    budget = problem.objective.budget
    assert answer.best(budget) == best and answer.judged(best) == (quality(best), 1.0)
    assert len(set(tried)) == len(tried) == 6
    assert all(problem.space.is_valid(a) and problem.cost.of(a) <= budget for a in tried)
    records = read_journal(run.folder / "metrics.jsonl")
    assert [r["architecture"] for r in records] == [dict(a) for a in tried]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    again = make_search().answer(problem, load_checkpoint(run.checkpoint)["search"])
    assert again.best(budget) == best


def test_it_draws_others_than_the_ranking_of_a_supernet(
    make_search, make_tried, make_run, make_judge
) -> None:
    """Of one seed, in the order of their draws."""
    problem, judge = make_tried(OneShot(), share=1.0), make_judge(accuracy=quality)
    make_search(num_evaluations=6).search(problem, make_run())
    ranked = Ranking(num_candidates=6, bn_batches=1, batch_size=10)._sample(problem)
    assert len(judge.architectures) == 6 and judge.architectures != ranked


class Score(Estimator):
    judge = "letters"

    def __init__(self) -> None:
        self.asked: list[Architecture] = []

    def prepare(self, problem: Any, run: Run, saved: Any) -> None:
        pass

    def estimate(self, architecture: Architecture) -> Estimate:
        self.asked.append(architecture)
        return Estimate(quality(architecture), 0.0)


def test_a_prefilter_proposes_the_one_that_it_likes_best_of_those_drawn(
    make_search, make_tried
) -> None:
    search = make_search(prefilter=(score := Score()), num_drawn=3)
    proposals = search.propose(make_tried(share=1.0), torch.Generator())
    for count in range(1, 5):
        assert next(proposals) == [max(score.asked[-3:], key=quality)]
        assert len(score.asked) == 3 * count


@pytest.mark.parametrize(("share", "uppers"), [(0.9, {}), (1.0, {"params": 1900.0})])
def test_it_is_uniform_over_what_is_within_budget_and_limits(
    share: float, uppers: dict[str, float], make_search, make_tried, make_run, make_judge
) -> None:
    """Asked for more than there is, it trains all of it once."""
    problem = make_tried(Softmax(), share=share, uppers=uppers)
    judge = make_judge(accuracy=quality)
    make_search(num_evaluations=10**6).search(problem, make_run())
    space, generator = problem.space, torch.Generator().manual_seed(5)
    within = {space.sample(generator) for _ in range(2000)}
    within = {a for a in within if problem.cost.of(a) <= problem.objective.budget}
    within = {a for a in within if all(limit.holds(a) for limit in problem.limits)}
    assert 1 < len(within) < space.size
    assert len(judge.asked) == len(within) and set(judge.architectures) == within


@pytest.mark.parametrize(
    ("bounds", "trained"),
    [
        ({"num_evaluations": 4}, 4),
        ({"num_evaluations": 2, "seconds": 25}, 2),
        ({"seconds": 25}, 3),
        ({"seconds": 0.001}, 1),
    ],
)
def test_it_ends_with_the_first_bound_that_is_reached(
    bounds: dict[str, Any], trained: int,
    make_search, make_tried, make_run, make_judge, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each training takes ten seconds here."""
    judge = make_judge(accuracy=quality)
    monkeypatch.setattr(Run, "seconds", property(lambda _: 10.0 * len(judge.asked)))
    make_search(**{"num_evaluations": None, **bounds}).search(
        make_tried(Softmax(), share=1.0), make_run()
    )
    assert len(judge.asked) == trained


@pytest.mark.parametrize("fail_at", [0, 1, 4])
def test_an_interrupted_one_goes_on(
    fail_at: int, make_search, make_tried, make_judge, check_resumes
) -> None:
    def search(run: Run) -> Answer:
        return make_search().search(make_tried(Softmax(), share=1.0), run)

    check_resumes(make_judge(accuracy=quality), fail_at, search)


def test_time_spent_before_an_interruption_counts(make_run) -> None:
    run = make_run("time")
    run.load()
    run.started -= 100.0
    run.save({"a": 1})
    again = make_run("time", resume=True)
    assert again.seconds < 50
    assert again.load() == {"a": 1} and 100 <= again.seconds < 150


def test_one_that_diverges_is_not_chosen(
    make_search, make_tried, make_run, make_judge, caplog: pytest.LogCaptureFixture
) -> None:
    out: list[Architecture] = []

    def loss(architecture: Architecture, _: int) -> float:
        if not out:
            out.append(architecture)
            raise Diverged("the training loss is nan")
        return 5.0

    make_judge(loss)
    answer = make_search(num_evaluations=2).search(make_tried(Softmax()), make_run())
    assert answer.best(None) != out[0] and "is out" in caplog.text


def test_networks_are_really_trained(make_search, make_tried, make_run, recipe: Recipe) -> None:
    problem, run = make_tried(Softmax()), make_run()
    answer = make_search(num_evaluations=2).search(problem, run)
    best = answer.best(problem.objective.budget)
    assert ShortTraining(problem, recipe, 30).judge(best, 3) == answer.judged(best)


@pytest.mark.parametrize("name", ["num_evaluations", "seconds"])
def test_bounds_of_zero_are_refused(name: str, make_search) -> None:
    with pytest.raises(ValueError, match=f"strategy.{name} must be a .* above 0; got 0"):
        make_search(**{name: 0})


def test_a_search_without_end_or_without_estimator_is_refused(
    make_search, make_tried, make_problem, make_run
) -> None:
    with pytest.raises(ValueError, match="set num_evaluations or max_seconds"):
        make_search(num_evaluations=None).search(make_tried(), make_run())
    with pytest.raises(ValueError, match="needs an estimator .*: estimator=from_scratch"):
        make_search().search(make_problem(Softmax()), make_run())
