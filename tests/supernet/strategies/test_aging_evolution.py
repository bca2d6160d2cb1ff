from __future__ import annotations

from typing import Any

import pytest
import torch

from supernet.choice import Architecture
from supernet.spaces.nasbench201 import NasBench201
from supernet.strategies.aging_evolution import AgingEvolution
from supernet.strategies.evolution import Evolution
from supernet.strategies.trials import Trial

SPACE = NasBench201(in_chans=1, img_size=8, widths=[2, 4], num_cells=1)


def distance(one: Architecture, other: Architecture) -> int:
    return len(set(one) - set(other))


def run(strategy: Any, problem: Any, reward: Any, rounds: int) -> list[list[Architecture]]:
    """What it proposes, round after round."""
    proposals = strategy.propose(problem, torch.Generator().manual_seed(0))
    asked = [list(next(proposals))]
    for _ in range(rounds):
        trials = [Trial(a, reward(a), reward(a)) for a in asked[-1]]
        asked.append(list(proposals.send(trials)))
    return asked


def test_the_best_of_a_sample_has_a_child_and_the_oldest_dies(make_tried: Any) -> None:
    """With samples that hold all of the population, the parent is the best that is alive: once the
    best of all is too old, the children are those of others."""
    population = 4
    strategy = AgingEvolution(population=population, sample_size=200)
    rewards: dict[Architecture, float] = {}

    def reward(architecture: Architecture) -> float:
        number = len(rewards)  # the very first one is the best ever
        return rewards.setdefault(architecture, 100.0 if number == 0 else number * 7 % 29)

    asked = run(strategy, make_tried(space=SPACE, share=1.0), reward, 12)
    assert len(asked[0]) == population and all(len(batch) == 1 for batch in asked[1:])
    history = [architecture for batch in asked for architecture in batch]
    for index in range(population, len(history)):
        alive = history[index - population : index]
        parent = max(alive, key=reward)
        assert distance(history[index], parent) == 1
    assert distance(history[population], history[0]) == 1


def test_a_generation_is_of_mutations_crossovers_and_draws(make_tried: Any) -> None:
    strategy = Evolution(
        population=10, num_parents=2, num_mutations=4, num_crossovers=3, mutation_prob=0.2
    )

    def reward(architecture: Architecture) -> float:
        return float(sum(option == "nor_conv_3x3" for _, option in architecture))

    asked = run(strategy, make_tried(space=SPACE, share=1.0), reward, 6)
    assert all(len(batch) == 10 for batch in asked)
    seen: list[Architecture] = []
    for before, batch in zip(asked, asked[1:], strict=False):
        seen += before
        parents = sorted(dict.fromkeys(seen), key=reward, reverse=True)[:2]
        for child in batch[4:7]:
            assert all(pair in {*parents[0], *parents[1]} for pair in child) or child in batch[7:]
        near = [min(distance(child, parent) for parent in parents) for child in batch]
        assert sum(near[:4]) < sum(near[7:]) * 4 / 3
    means = [sum(map(reward, batch)) / 10 for batch in asked]
    assert means[-1] > means[0] + 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"population": 0}, "strategy.population must be 1 or more; got 0"),
        ({"num_mutations": 9}, "together at most strategy.population=10"),
        ({"mutation_prob": 0.0}, "strategy.mutation_prob must be above 0 and at most 1; got 0.0"),
    ],
)
def test_an_evolution_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {
        "population": 10, "num_parents": 2, "num_mutations": 4, "num_crossovers": 3,
        "mutation_prob": 0.2,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        Evolution(**{**settings, **changes})


def test_an_aging_evolution_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="strategy.sample_size must be 1 or more; got 0"):
        AgingEvolution(population=3, sample_size=0)
