from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from latency.memory import PeakMemory
from latency.model import macs_cost, params_cost
from latency.sites import Site, trace
from supernet.answer import Answer
from supernet.choice import Architecture
from supernet.data.digits import Digits
from supernet.derive import reachable
from supernet.engine import make_accelerator
from supernet.estimators.base import Estimator
from supernet.estimators.from_scratch import FromScratch
from supernet.estimators.short_training import ShortTraining, Trained
from supernet.limits import Limit
from supernet.mixed_ops.base import MixedOp, Relaxation
from supernet.mixed_ops.softmax import Softmax
from supernet.objective import Budget
from supernet.recipe import Recipe
from supernet.space import SearchSpace
from supernet.spaces.mbconv import MBConv
from supernet.strategies import base
from supernet.strategies.base import Problem, Run
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.ranking import Ranking
from supernet.strategies.refinement import Refinement
from supernet.tracking import NoTracker

SPACE = {
    "in_chans": 1, "img_size": 8, "stem_chs": 8, "stem_stride": 1, "first_chs": 8,
    "stages": [[8, 2, 2]], "kernels": [3, 5], "expansions": [2], "head_chs": 16,
}  # fmt: skip


@pytest.fixture(scope="session")
def digits() -> Digits:
    return Digits(img_size=8, pad=1, train_limit=120)


SITES: dict[tuple[type[SearchSpace], str], list[Site]] = {}


def trace_space(space: SearchSpace) -> list[Site]:
    """Those of an equal space where there was one; random numbers are drawn for it all the same."""
    supernet, key = space.build(MixedOp, 10, search=False), (type(space), space.settings)
    if key not in SITES:
        SITES[key] = trace(supernet, space.choices, (1, 1, 8, 8))
    return SITES[key]


@pytest.fixture
def make_problem(digits: Digits) -> Callable[..., Problem]:
    def make(
        relaxation: Relaxation,
        share: float = 0.8,
        seed: int = 0,
        uppers: Mapping[str, float] | None = None,
        space: SearchSpace | None = None,
    ) -> Problem:
        torch.manual_seed(seed)
        space = space or MBConv(**SPACE)
        sites = trace_space(space)
        cost = macs_cost(space.choices, sites)
        others = {
            "params": lambda: params_cost(space.choices, sites),
            "peak_memory": lambda: PeakMemory(space, 10, (1, 1, 8, 8)),
        }
        uppers = uppers or {}
        limits = tuple(Limit(others[name](), uppers[name]) for name in others if name in uppers)
        objective = Budget(cost="macs", budget_share=share, limits=uppers)
        objective.prepare(reachable(space, cost), cost.unit)
        return Problem(
            space=space,
            supernet=space.build_supernet(10, relaxation.build),
            relaxation=relaxation,
            objective=objective,
            cost=cost,
            data=digits,
            accelerator=make_accelerator("no", "cpu"),
            seed=seed,
            limits=limits,
        )

    return make


@pytest.fixture
def make_strategy() -> Callable[..., FirstOrder]:
    def make(cls: type[FirstOrder] = FirstOrder, **changes: Any) -> FirstOrder:
        settings: dict[str, Any] = {
            "epochs": 3,
            "warmup_epochs": 1,
            "arch_every": 1,
            "batch_size": 12,
            "weight_optimizer": {"opt": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
            "arch_optimizer": {
                "opt": "adam", "lr": 0.05, "betas": (0.0, 0.999), "weight_decay": 0.0,
            },
            "scheduler": {"sched": "cosine", "min_lr": 1e-3},
            "clip_grad": 5.0,
            "init_std": 1e-3,
            "channels_last": False,
            "ranking": Ranking(num_candidates=4, bn_batches=2, batch_size=30),
        }  # fmt: skip
        return cls(**{**settings, **changes})

    return make


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Run]:
    def make(name: str = "run", resume: bool = False, checkpoint_every: int = 500) -> Run:
        return Run(tmp_path / name, True, NoTracker(), resume, checkpoint_every)

    return make


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    """Of short trainings."""
    return Recipe(
        epochs=1, batch_size=10, optimizer={"opt": "sgd", "lr": 0.1, "momentum": 0.9},
        scheduler={"sched": "cosine", "step_on_epochs": False, "min_lr": 0.0},
    )  # fmt: skip


@pytest.fixture
def make_tried(make_problem: Callable[..., Problem], recipe: Recipe) -> Callable[..., Problem]:
    """A problem with an estimator, by default one that trains for three steps."""

    def make(
        relaxation: Relaxation | None = None, estimator: Estimator | None = None, **changes: Any
    ) -> Problem:
        estimator = estimator or FromScratch(recipe=recipe, steps=3, num_images=30)
        problem = make_problem(relaxation or Softmax(), **changes)
        return replace(problem, estimator=estimator, costs=(problem.cost,))

    return make


@pytest.fixture
def make_refinement(recipe: Recipe) -> Callable[..., Refinement]:
    def make(**changes: Any) -> Refinement:
        settings: dict[str, Any] = {
            "moves": 3, "num_neighbours": 100, "steps": 3, "num_finalists": 1, "final_steps": 9,
            "repeats": 1, "margin": 0.15, "num_images": 30, "recipe": recipe,
        }  # fmt: skip
        return Refinement(**{**settings, **changes})

    return make


class Judge:
    """Stands for `ShortTraining`.

    Args:
        loss, accuracy: functions of architecture and steps.

    Attributes:
        asked: the trainings there were, as (architecture, steps).
        repeats: of each.
    """

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        loss: Callable[[Architecture, int], float] = lambda *_: 1.0,
        accuracy: Callable[[Architecture, int], float] = lambda *_: 50.0,
    ) -> None:
        self.asked: list[tuple[Architecture, int]] = []
        self.repeats: list[int] = []
        self.fail_at: int | None = None

        def judge(_: Any, architecture: Architecture, steps: int, repeat: int = 0) -> Trained:
            if len(self.asked) == self.fail_at:
                raise KeyboardInterrupt
            self.asked.append((architecture, steps))
            self.repeats.append(repeat)
            return Trained(accuracy(architecture, steps), loss(architecture, steps))

        monkeypatch.setattr(ShortTraining, "judge", judge)

    @property
    def architectures(self) -> list[Architecture]:
        return [architecture for architecture, _ in self.asked]


@pytest.fixture
def make_judge(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Judge]:
    return partial(Judge, monkeypatch)


@pytest.fixture
def check_resumes(
    make_run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., None]:
    """That a search which is interrupted in a training ends as the one that is not."""

    monkeypatch.setattr(base, "SAVING_SHARE", math.inf)  # save after each, however quick it is

    def check(judge: Judge, fail_at: int, search: Callable[[Run], Answer]) -> None:
        def found(run: Run) -> tuple[Architecture, str]:
            return search(run).best(None), (run.folder / "metrics.jsonl").read_text()

        whole, asked = found(make_run("whole")), list(judge.asked)
        judge.asked.clear()
        judge.fail_at = min(fail_at, len(asked) - 1)
        with pytest.raises(KeyboardInterrupt):
            search(make_run("cut"))
        judge.fail_at = None
        for _ in range(2):
            assert found(make_run("cut", resume=True)) == whole
            assert judge.asked == asked

    return check
