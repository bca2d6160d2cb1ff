from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from latency.memory import PeakMemory
from latency.model import macs_cost, params_cost
from latency.sites import Site, trace
from supernet.data.digits import Digits
from supernet.derive import reachable
from supernet.engine import make_accelerator
from supernet.limits import Limit
from supernet.mixed_ops.base import MixedOp, Relaxation
from supernet.objective import Budget
from supernet.space import SearchSpace
from supernet.spaces.mbconv import MBConv
from supernet.strategies.base import Problem, Run
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.ranking import Ranking
from supernet.tracking import NoTracker

SPACE = {
    "in_chans": 1, "img_size": 8, "stem_chs": 8, "stem_stride": 1, "first_chs": 8,
    "stages": [[8, 2, 2]], "kernels": [3, 5], "expansions": [2], "head_chs": 16,
}  # fmt: skip


@pytest.fixture(scope="session")
def digits() -> Digits:
    return Digits(img_size=8, pad=1, train_limit=120)


@cache
def trace_space(space: SearchSpace) -> list[Site]:
    return trace(space.build(MixedOp, 10, search=False), space.choices, (1, 1, 8, 8))


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
        others = (params_cost(space.choices, sites), PeakMemory(space, 10, (1, 1, 8, 8)))
        uppers = uppers or {}
        limits = tuple(Limit(c, uppers[c.name]) for c in others if c.name in uppers)
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
