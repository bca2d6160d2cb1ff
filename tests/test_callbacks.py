from __future__ import annotations

import pytest

from supernet_scripts.callbacks import with_baseline


@pytest.mark.parametrize(
    "overrides",
    [["seed=0,1,2,3"], ["space=nasbench201", "seed=range(0,4)", "objective.budget_share=0.6"]],
)
def test_a_sweep_over_seeds_alone_has_its_baseline(overrides: list[str]) -> None:
    assert with_baseline(overrides) == [*overrides, "search_baseline=random"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["seed=3"],
        ["seed=0,1", "mixed_op=softmax,one_shot"],
        ["mixed_op=softmax,one_shot"],
        ["seed=0,1", "search_baseline=none"],
        ["seed=0,1", "strategy=random", "num_evaluations=4"],
        ["strategy.arch_optimizer.lr=tag(log,interval(0.001,0.1))", "seed=1"],
    ],
)
def test_other_sweeps_are_left_alone(overrides: list[str]) -> None:
    assert with_baseline(overrides) == overrides
