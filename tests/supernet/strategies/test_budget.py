"""The cost term of a search under a budget, in every space with every mixed op that it allows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

import supernet_conf
from supernet.choice import ArchitectureParameters
from supernet.mixed_ops.base import Relaxation
from supernet.mixed_ops.binary_gate import BinaryGate
from supernet.mixed_ops.sigmoid import Sigmoid
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.enas_macro import ENASMacro
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201
from supernet.spaces.spos import Spos
from supernet.strategies.base import Problem
from supernet.strategies.state import SearchState

MIXED_OPS = {
    path.stem: path
    for path in sorted(Path(supernet_conf.__file__).parent.joinpath("mixed_op").glob("*.yaml"))
}
REFUSED = {(space, "partial_channels") for space in ("mbconv", "spos", "enas_macro")}
NAMES = ("nasbench201", "mbconv", "darts", "spos", "enas_macro")
EVERY = [pair for pair in itertools.product(NAMES, MIXED_OPS) if pair not in REFUSED]
SHARES = {  # below an even mixture
    "nasbench201": 0.25, "mbconv": 0.75, "darts": 0.35, "spos": 0.62, "enas_macro": 0.3,
}  # fmt: skip
WITH_LOGITS = [pair for pair in EVERY if pair[1] not in ("one_shot", "single_path")]


def quick(pairs: Sequence[tuple[str, str]]) -> list[Any]:
    """Building the supernet of darts takes seconds."""
    return [pytest.param(*pair, marks=[pytest.mark.slow] * (pair[0] == "darts")) for pair in pairs]


@cache
def make_space(name: str) -> SearchSpace:
    small: dict[str, Any] = {"in_chans": 1, "img_size": 8}
    if name == "mbconv":
        return MBConv(
            stem_chs=8, stem_stride=1, first_chs=8, stages=[(8, 2, 2)], kernels=(3, 5),
            expansions=(2,), head_chs=16, **small,
        )  # fmt: skip
    if name == "darts":
        return Darts(width=4, num_cells=3, **small)
    if name == "spos":
        return Spos(stem_chs=4, stem_stride=1, stages=[(8, 2, 2)], head_chs=16, **small)
    if name == "enas_macro":
        return ENASMacro(width=4, num_layers=3, **small)
    return NasBench201(widths=(4, 8), num_cells=1, **small)


def make_relaxation(name: str) -> Relaxation:
    relaxation: Relaxation = instantiate(OmegaConf.load(MIXED_OPS[name]))
    return relaxation


# ---- the expectation, architecture by architecture


def groups(space: SearchSpace) -> list[list[dict[str, int]]]:
    """What is chosen independently of the rest, each as {choice: index of what it keeps}."""
    if not isinstance(space, Darts):
        return [[{c.name: index} for index in range(len(c.options))] for c in space.choices]
    return [
        [
            {f"{kind}_{source}_{node}": op for source, op in zip(pair, kept, strict=True)}
            for pair in itertools.combinations(range(node), 2)
            for kept in itertools.product(range(1, 8), repeat=2)
        ]
        for kind in ("normal", "reduce")
        for node in range(2, 6)
    ]


def enumerated(problem: Problem, p: Mapping[str, Tensor]) -> float:
    """Mean cost of the architectures, each in proportion to the product of what it keeps."""
    rows = {name: vector.tolist() for name, vector in p.items()}
    costs = {name: vector.tolist() for name, vector in problem.cost.per_option.items()}
    total = problem.cost.fixed
    for ways in groups(problem.space):
        masses = [math.prod(rows[name][index] for name, index in way.items()) for way in ways]
        values = [sum(costs[name][index] for name, index in way.items()) for way in ways]
        total += sum(m * v for m, v in zip(masses, values, strict=True)) / sum(masses)
    return total


def moved(
    relaxation: Relaxation, logits: Mapping[str, Tensor], steps: Mapping[str, Tensor], sample: Any
) -> dict[str, Tensor]:
    """Probabilities after a step of the logits; with gates, that of the pair alone, mass kept."""
    if isinstance(relaxation, Sigmoid):
        gates = {name: 1 / (1 + (-vector - steps[name]).exp()) for name, vector in logits.items()}
        return {name: gate / gate.sum() for name, gate in gates.items()}
    if not isinstance(relaxation, BinaryGate):
        odds = {name: (vector + steps[name]).exp() for name, vector in logits.items()}
        return {name: odd / odd.sum() for name, odd in odds.items()}
    found = {}
    for name, vector in logits.items():
        p = vector.exp() / vector.exp().sum()
        pair = list(sample.weights[name].active)
        odds = (vector + steps[name])[pair].exp()
        found[name] = p.index_put((torch.tensor(pair),), p[pair].sum() * odds / odds.sum())
    return found


@pytest.mark.parametrize(("space", "mixed_op"), quick(WITH_LOGITS))
def test_the_expected_cost_and_its_gradient_are_those_of_all_architectures(
    space: str, mixed_op: str, make_problem: Any
) -> None:
    problem = make_problem(make_relaxation(mixed_op), space=make_space(space))
    generator = torch.Generator().manual_seed(2)
    parameters = ArchitectureParameters(problem.space.choices, 1.5, generator, torch.float64)
    logits, relaxation = parameters(), problem.relaxation
    sample = relaxation.for_architecture_step(logits, generator, 0.5)
    cost = problem.cost.expected(problem.space.shares(sample.cost_weights))
    plain = {name: vector.detach() for name, vector in logits.items()}

    def after(direction: Mapping[str, Tensor], size: float) -> float:
        steps = {name: size * vector for name, vector in direction.items()}
        return enumerated(problem, moved(relaxation, plain, steps, sample))

    gradients = dict(zip(logits, torch.autograd.grad(cost, [*logits.values()]), strict=True))
    for _ in range(3):
        direction = {
            name: torch.randn(len(vector), generator=generator, dtype=torch.float64)
            for name, vector in plain.items()
        }
        slope = sum(float(gradients[name] @ direction[name]) for name in logits)
        difference = (after(direction, 1e-4) - after(direction, -1e-4)) / 2e-4
        assert slope == pytest.approx(difference, rel=1e-5)
    assert cost.item() == pytest.approx(after(plain, 0.0), rel=1e-12)


# ---- searches


@pytest.mark.parametrize(("space", "mixed_op"), quick(WITH_LOGITS))
def test_a_budget_alone_brings_the_expected_cost_down_to_it(
    space: str, mixed_op: str, make_problem: Any, make_strategy: Any
) -> None:
    """With a task loss of zero; nothing is run."""
    problem = make_problem(make_relaxation(mixed_op), SHARES[space], space=make_space(space))
    optimizer = {"opt": "adam", "lr": 0.3, "betas": (0.0, 0.999), "weight_decay": 0.0}
    strategy = make_strategy(arch_optimizer=optimizer)
    state = SearchState(
        problem, 12, strategy.weight_optimizer, optimizer, 1e-3, torch.contiguous_format
    )
    strategy.task_loss = lambda state, sample, images, labels: (
        torch.zeros(()), torch.zeros(len(images), 10)
    )  # fmt: skip

    @torch.no_grad()
    def expected() -> float:
        p = problem.relaxation.probabilities(state.parameters())
        return float(problem.cost.expected(problem.shares(p)))

    before, budget = expected(), problem.objective.budget
    assert before > 1.05 * budget
    for _ in range(60):
        strategy.architecture_step(state, 0.0)
        if expected() <= budget:
            break
    assert expected() <= budget


@pytest.mark.parametrize(("space", "mixed_op"), quick(EVERY))
def test_a_search_ends_within_the_budget(
    space: str, mixed_op: str, make_problem: Any, make_strategy: Any, make_run: Any
) -> None:
    problem = make_problem(make_relaxation(mixed_op), SHARES[space], space=make_space(space))
    strategy = make_strategy(epochs=2, batch_size=30)
    architecture = strategy.search(problem, make_run()).best(problem.objective.budget)
    assert problem.space.is_valid(architecture)
    assert problem.cost.of(architecture) <= problem.objective.budget


@pytest.mark.parametrize(("space", "mixed_op"), sorted(REFUSED))
def test_what_a_space_does_not_allow_is_refused(space: str, mixed_op: str) -> None:
    with pytest.raises(ValueError, match=f"mixed_op={mixed_op} needs"):
        make_space(space).build_supernet(10, make_relaxation(mixed_op).build)
