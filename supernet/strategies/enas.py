"""Shared weights and a controller, trained in turn (ENAS: Pham et al. 2018, section 2.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from supernet.choice import Architecture
from supernet.derive import Infeasible
from supernet.engine import at_least_float
from supernet.mixed_ops.base import Weights, one_hot
from supernet.mixed_ops.single_path import SinglePath
from supernet.strategies.base import Problem, Run
from supernet.strategies.controller import Drawn
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.reinforce import Policy, Reinforce
from supernet.strategies.state import SearchState
from supernet.strategies.trials import make_generator

PART = "policy"
MAX_DRAWS = 1000  # in a row that are infeasible


class ENAS(FirstOrder):
    """An epoch trains the weights, each step those of one architecture that the controller draws;
    then the controller, whose rewards are accuracies on one batch each of the architecture half,
    with the weights, and the batches' own statistics, as in training. In the end architectures that
    the controller draws are ranked on the whole half.

    In the warm-up paths are uniform and the controller rests. Draws outside the space's
    constraints, budget or limits are rewarded as `Reinforce` says, and train no weights.

    Args:
        controller: its settings, and how it learns.
        controller_steps: its updates after an epoch, each by as many draws as its `batch`.
        settings: as `FirstOrder`.
    """

    sums_costs = mixes = False

    def __init__(self, *, controller: Reinforce, controller_steps: int, **settings: Any) -> None:
        super().__init__(**settings)
        if self.ranking is None:
            raise ValueError(
                "strategy=enas ranks what its controller draws in the end: strategy.ranking "
                "cannot be null"
            )
        if controller_steps < 1:
            raise ValueError(
                f"strategy.controller_steps must be 1 or more; got {controller_steps}"
            )
        self.controller, self.controller_steps = controller, controller_steps

    def start(self, problem: Problem) -> SearchState:
        if not isinstance(problem.relaxation, SinglePath):
            raise ValueError(
                "strategy=enas trains the path that its controller draws: choose "
                f"mixed_op=single_path, not {type(problem.relaxation).__name__}"
            )
        state = super().start(problem)
        generator = make_generator(problem.seed)
        state.parts[PART] = self.controller.policy(problem.space, generator)
        return state

    def weights(self, state: SearchState, progress: float) -> Weights:
        if state.step < self.warmup_epochs * len(state.weight_stream.loader):
            return super().weights(state, progress)
        return one_hot(self._feasible(state), state.problem.space.choices)

    def after_epoch(self, state: SearchState, run: Run) -> dict[str, Any]:
        """Train the controller; the weights stay as they are."""
        policy, rewards, entropy = _policy(state), list[float](), 0.0
        with run.progress(self.controller_steps, 0, "controller") as bar:
            for _ in range(self.controller_steps):
                drawn = [policy.draw() for _ in range(self.controller.batch)]
                worth = [self._reward(state, one) for one in drawn]
                rewards += policy.update(drawn, worth)
                entropy = float(sum(one.entropy.detach() for one in drawn)) / len(drawn)
                bar.update()
        return {
            "reward": sum(rewards) / len(rewards),
            "baseline": policy.baseline,
            "controller_entropy": entropy,
        }

    def rank(self, state: SearchState, run: Run) -> None:
        assert self.ranking is not None
        # of a generator of its own: a search that is resumed here draws the same
        generator = torch.Generator().manual_seed(state.problem.seed)
        distinct: dict[Architecture, None] = {}
        for _ in range(20 * self.ranking.num_candidates):
            distinct[self._feasible(state, generator)] = None
            if len(distinct) == self.ranking.num_candidates:
                break
        self.ranking.rank(state, run, list(distinct))

    def _feasible(
        self, state: SearchState, generator: torch.Generator | None = None
    ) -> Architecture:
        """What the controller draws."""
        problem = state.problem
        for _ in range(MAX_DRAWS):
            drawn = _policy(state).draw(generator)
            if problem.is_feasible(found := problem.space.decode(drawn.genes)):
                return found
        raise Infeasible(
            f"none of {MAX_DRAWS} architectures that the controller drew is within the space's "
            "constraints, budget and limits: raise the budget, or use strategy=evolution, which "
            "samples within them"
        )

    def _reward(self, state: SearchState, drawn: Drawn) -> float | None:
        """None of what is outside constraints, budget or limits."""
        problem = state.problem
        architecture = problem.space.decode(drawn.genes)
        if not problem.is_feasible(architecture):
            return None
        images, labels = state.arch_stream.next()
        weights = one_hot(architecture, problem.space.choices)
        with torch.no_grad(), problem.accelerator.autocast():
            outputs = problem.supernet(images.to(memory_format=self.memory_format), weights)
        loss = cross_entropy(at_least_float(outputs), labels)
        accuracy = 100 * (outputs.argmax(dim=1) == labels).float().mean()
        mean = problem.accelerator.reduce(torch.stack([accuracy, loss]), reduction="mean")
        cost = problem.cost.of(architecture)
        return self.controller.reward(-problem.objective.rank(float(mean[0]), float(mean[1]), cost))


def _policy(state: SearchState) -> Policy:
    policy = state.parts[PART]
    assert isinstance(policy, Policy)
    return policy
