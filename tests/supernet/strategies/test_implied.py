"""Searches in a space with implied choices: these have no logits, but costs that count."""

from __future__ import annotations

from typing import Any

import pytest

from latency.sites import trace_architecture
from supernet.mixed_ops.base import Relaxation
from supernet.mixed_ops.binary_gate import BinaryGate
from supernet.mixed_ops.one_shot import OneShot
from supernet.mixed_ops.sigmoid import Sigmoid
from supernet.mixed_ops.softmax import Softmax
from supernet.space import SearchSpace
from supernet.spaces.nasnet import NASNet
from supernet.strategies.refinement import one_change
from supernet.strategies.state import SearchState


class Few(NASNet):
    operations = ("sep_conv_3x3", "identity")


def make_space() -> SearchSpace:
    return Few(in_chans=1, width=2, num_cells=3, num_blocks=2, img_size=8)


@pytest.mark.parametrize(
    "relaxation",
    [
        pytest.param(Softmax(), marks=pytest.mark.slow),
        pytest.param(Sigmoid(), marks=pytest.mark.slow),
        BinaryGate(),
        OneShot(),
    ],
)
def test_a_search_ends_within_the_budget(
    relaxation: Relaxation, make_problem: Any, make_strategy: Any, make_run: Any
) -> None:
    problem = make_problem(relaxation, 0.7, space=make_space())
    strategy = make_strategy(epochs=2, batch_size=30)
    architecture = strategy.search(problem, make_run()).best(problem.objective.budget)
    assert problem.space.is_valid(architecture)
    assert problem.cost.of(architecture) <= problem.objective.budget
    own = trace_architecture(problem.space, architecture, 10, (1, 1, 8, 8))
    assert problem.cost.of(architecture) == sum(site.macs for site in own)


def test_logits_are_of_what_is_decided(make_problem: Any, make_strategy: Any) -> None:
    problem, strategy = make_problem(Softmax(), space=make_space()), make_strategy()
    optimizers = strategy.weight_optimizer, strategy.arch_optimizer
    state = SearchState(problem, 12, *optimizers, 1e-3, strategy.memory_format)
    assert set(state.parameters()) == {choice.name for choice in problem.space.decided}
    assert any(choice.implied for choice in problem.space.choices)


def test_a_change_of_one_side_takes_what_it_implies_along(make_problem: Any) -> None:
    space = make_space()
    decided = [choice.name for choice in space.decided]
    options = {choice.name: choice.options[0] for choice in space.decided}
    start = space.architecture(options)
    changed = list(one_change(space, start))
    assert len(changed) == sum(len(choice.options) - 1 for choice in space.decided)
    assert all(space.is_valid(one) for one in changed)
    assert all(sum(one[name] != start[name] for name in decided) == 1 for one in changed)
    assert any(one["normal_2_end"] != start["normal_2_end"] for one in changed)
