from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from supernet.choice import Architecture
from supernet.data import Loader
from supernet.engine import Diverged
from supernet.estimators.short_training import ShortTraining
from supernet.mixed_ops.softmax import Softmax
from supernet.recipe import Recipe
from supernet.strategies.finals import Finals, standings
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.state import SearchState
from supernet.tracking import read_journal

RECIPE = Recipe(
    epochs=1, batch_size=10, optimizer={"opt": "sgd", "lr": 0.1, "momentum": 0.9},
    scheduler={"sched": "cosine", "step_on_epochs": False, "min_lr": 0.0},
)  # fmt: skip


def make_finals(**changes: Any) -> Finals:
    settings: dict[str, Any] = {
        "look_every": 2, "num_finalists": 5, "steps": 3, "rounds": 4, "recipe": RECIPE,
        "num_images": 30,
    }  # fmt: skip
    return Finals(**{**settings, **changes})


class Judge:
    """Stands for `ShortTraining`: the accuracy is a function of architecture and steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, quality: Any) -> None:
        self.asked: list[tuple[Architecture, int]] = []
        self.fail_at: int | None = None

        def accuracy(_: Any, architecture: Architecture, steps: int) -> tuple[float, float]:
            if len(self.asked) == self.fail_at:
                raise KeyboardInterrupt
            self.asked.append((architecture, steps))
            return quality(architecture, steps), 1.0

        monkeypatch.setattr(ShortTraining, "accuracy", accuracy)


def make_state(problem: Any, visits: list[int]) -> tuple[SearchState, list[Architecture]]:
    sgd = {"opt": "sgd", "lr": 0.1}
    state = SearchState(problem, 10, sgd, {"opt": "adam", "lr": 0.1}, 0.0, torch.contiguous_format)
    generator = torch.Generator().manual_seed(0)
    distinct: dict[Architecture, None] = {}
    while len(distinct) < len(visits):
        distinct[problem.space.sample(generator)] = None
    state.visited = dict(zip(distinct, visits, strict=True))
    return state, list(distinct)


def test_each_round_keeps_the_better_half_and_trains_it_twice_as_long(
    make_problem, make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six the five that were derived for longest play; the best of short trainings is not the
    best of long ones."""
    state, visited = make_state(make_problem(Softmax()), [9, 1, 8, 7, 6, 5])
    a, _, b, c, d, e = visited
    early, late = {a: 5, b: 4, c: 3, d: 2, e: 1}, {a: 10, b: 30, c: 20}
    judge = Judge(monkeypatch, lambda found, steps: (early if steps == 3 else late)[found])
    run = make_run()
    make_finals().hold(state, run)
    assert judge.asked == [
        *((found, 3) for found in (a, b, c, d, e)), *((found, 6) for found in (a, b, c)),
        (b, 12), (c, 12), (b, 24),
    ]  # fmt: skip
    assert [r["round"] for r in state.ranked] == [1] * 5 + [2] * 3 + [3] * 2 + [4]
    space = state.problem.space
    order = [space.architecture(r["architecture"]) for r in standings(state.ranked)]
    assert order == [b, c, a, d, e]
    assert [r["rank_value"] for r in standings(state.ranked)] == [0, 1, 2, 3, 4]
    assert read_journal(run.folder / "metrics.jsonl") == state.ranked
    assert [r["visits"] for r in state.ranked[:5]] == [9, 8, 7, 6, 5]


def test_rounds_are_limited_and_one_finalist_plays_once(
    make_problem, make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, visited = make_state(make_problem(Softmax()), [3, 2, 1])
    judge = Judge(monkeypatch, lambda found, _: visited.index(found))
    make_finals(rounds=1).hold(state, make_run("three"))
    assert len(judge.asked) == 3
    assert standings(state.ranked)[0]["architecture"] == dict(visited[2])
    state, visited = make_state(make_problem(Softmax()), [3])
    judge.asked.clear()
    make_finals().hold(state, make_run("one"))
    assert judge.asked == [(visited[0], 3)]


def test_a_finalist_that_diverges_is_out(
    make_problem, make_run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    state, visited = make_state(make_problem(Softmax()), [2, 1])

    def accuracy(_: Any, architecture: Architecture, steps: int) -> tuple[float, float]:
        if architecture == visited[0]:
            raise Diverged("the training loss is nan")
        return 1.0, 5.0

    monkeypatch.setattr(ShortTraining, "accuracy", accuracy)
    make_finals().hold(state, make_run())
    assert standings(state.ranked)[0]["architecture"] == dict(visited[1])
    assert math.isfinite(state.ranked[0]["loss"]) and "a finalist is out" in caplog.text


@pytest.mark.parametrize("fail_at", [0, 2, 5])
def test_interrupted_finals_go_on(
    fail_at: int, make_problem, make_run, make_strategy, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge(monkeypatch, lambda found, steps: hash(found) % 89 / steps)

    class Wandering(FirstOrder):
        def train(self, state: SearchState, run: Any) -> None:
            super().train(state, run)
            state.visited = dict(make_state(make_problem(Softmax()), [5, 4, 3, 2, 1])[0].visited)

    def search(run: Any) -> tuple[Any, str]:
        strategy = make_strategy(cls=Wandering, finals=make_finals())
        answer = strategy.search(make_problem(Softmax()), run)
        return answer.best(None), (run.folder / "metrics.jsonl").read_text()

    whole = search(make_run("whole"))
    asked = list(judge.asked)
    assert len(asked) > 5
    judge.asked.clear()
    judge.fail_at = fail_at
    with pytest.raises(KeyboardInterrupt):
        search(make_run("cut"))
    judge.fail_at = None
    assert search(make_run("cut", resume=True)) == whole
    assert judge.asked == asked
    assert search(make_run("cut", resume=True)) == whole
    assert judge.asked == asked


@pytest.mark.parametrize(
    "look_every,looked_after", [(2, [6, 8, 10, 12, 14, 15]), (7, [7, 14, 15])]
)
def test_what_is_derived_on_the_way_is_visited(
    look_every: int, looked_after: list[int], make_problem, make_run, make_strategy
) -> None:
    """Steps 6 to 15 move the logits; the last one always counts."""
    problem, derived = make_problem(Softmax()), dict[int, Architecture]()
    states = list[SearchState]()

    class Watching(FirstOrder):
        def architecture_step(self, state: SearchState, progress: float) -> None:
            super().architecture_step(state, progress)
            scores = problem.relaxation.scores(state.parameters())
            derived[state.step] = problem.derive(scores)
            states[:] = [state]

    finals = make_finals(look_every=look_every, steps=1, rounds=1)
    lively = {"opt": "adam", "lr": 0.5, "betas": (0.0, 0.999)}
    make_strategy(cls=Watching, finals=finals, arch_optimizer=lively).search(problem, make_run())
    assert list(derived) == list(range(6, 16)) and len(set(derived.values())) > 1
    looked = [derived[step] for step in looked_after]
    assert states[0].visited == {found: looked.count(found) for found in looked}


@pytest.mark.parametrize("name", ["look_every", "num_finalists", "steps", "rounds", "num_images"])
def test_numbers_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"finals.{name} must be 1 or more; got 0"):
        make_finals(**{name: 0})


# ---- the short training itself


def test_short_trainings_are_repeatable_and_longer_ones_are_better(make_problem) -> None:
    problem = make_problem(Softmax())
    architecture = problem.space.sample(torch.Generator().manual_seed(1))
    judge = ShortTraining(problem, RECIPE, num_images=60)
    assert sum(len(labels) for _, labels in judge.judges) == 60
    first = judge.accuracy(architecture, 2)
    torch.manual_seed(77)
    assert ShortTraining(problem, RECIPE, num_images=60).accuracy(architecture, 2) == first
    assert judge.accuracy(architecture, 60)[1] < 0.9 * first[1]


def test_a_short_training_sees_the_weight_half_and_is_judged_on_the_other(
    make_problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(Softmax())
    weight_half, arch_half = problem.data.search_splits(problem.seed)
    judge = ShortTraining(problem, RECIPE, num_images=10**6)
    assert sum(len(labels) for _, labels in judge.judges) == len(arch_half)
    assert judge.train_half.indices.tolist() == weight_half.indices.tolist()
    shown = torch.cat([images for images, _ in judge.judges])
    plain = torch.cat([x for x, _ in Loader(arch_half, batch_size=10, seed=0, train=False)])
    assert torch.equal(shown.sum((1, 2, 3)).sort().values, plain.sum((1, 2, 3)).sort().values)
