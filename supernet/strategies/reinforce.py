"""REINFORCE with a recurrent controller (Zoph & Le 2017; Zoph et al. 2018)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from torch import Tensor

from supernet.choice import Architecture
from supernet.space import SearchSpace
from supernet.strategies.base import Problem
from supernet.strategies.controller import Controller, Drawn, Squash
from supernet.strategies.trials import MAX_REPEATS, Proposals, Trials


class Reinforce(Trials):
    """A controller draws architectures and is trained by what they are worth:
    the gradient is the mean of (R - b) grad log p, with b a moving average of the rewards
    (Williams 1992; Zoph & Le 2017, section 3.2).

    An architecture outside the space's constraints, budget or limits is not judged; its reward is
    0, or the least of all so far where objectives give negative ones.

    Args:
        batch: architectures for each update of the controller.
        optimizer: arguments of timm's `create_optimizer_v2`.
        hidden, num_layers, shared: of the controller.
        temperature, tanh_constant: of its logits.
        baseline_decay: of the moving average.
        power: the reward is the accuracy, as a share, to this power (3 in NAS-RL), where the
            objective ranks by accuracy; what another objective makes of it stays as it is.
        entropy_weight: of the controller's entropy, which is maximised too.
        skip_weight, skip_rate: of the KL divergence of skips from their rate (Pham et al. 2018,
            section 3.2), in spaces that have such.
        num_evaluations, seconds: as for all `Trials`.
    """

    def __init__(
        self,
        *,
        batch: int,
        optimizer: Mapping[str, Any],
        hidden: int,
        num_layers: int,
        shared: bool,
        temperature: float,
        tanh_constant: float | None,
        baseline_decay: float,
        power: float,
        entropy_weight: float,
        skip_weight: float,
        skip_rate: float,
        num_evaluations: int | None = None,
        seconds: float | None = None,
    ) -> None:
        super().__init__(num_evaluations=num_evaluations, seconds=seconds)
        for name, value in (("batch", batch), ("hidden", hidden), ("num_layers", num_layers)):
            if value < 1:
                raise ValueError(f"strategy.{name} must be 1 or more; got {value}")
        for name, rate in (("baseline_decay", baseline_decay), ("skip_rate", skip_rate)):
            if not 0 < rate < 1:
                raise ValueError(f"strategy.{name} must be between 0 and 1; got {rate}")
        for name, scale in {
            "temperature": temperature, "power": power,
            "tanh_constant": 1.0 if tanh_constant is None else tanh_constant,
        }.items():  # fmt: skip
            if scale <= 0:
                raise ValueError(f"strategy.{name} must be above 0; got {scale}")
        for name, weight in {"entropy_weight": entropy_weight, "skip_weight": skip_weight}.items():
            if weight < 0:
                raise ValueError(f"strategy.{name} must be 0 or more; got {weight}")
        self.batch, self.optimizer, self.power = batch, dict(optimizer), power
        self.hidden, self.num_layers, self.shared = hidden, num_layers, shared
        self.squash = Squash(temperature, tanh_constant)
        self.baseline_decay, self.entropy_weight = baseline_decay, entropy_weight
        self.skip_weight, self.skip_rate = skip_weight, skip_rate

    def policy(self, space: SearchSpace, generator: torch.Generator) -> Policy:
        """A controller at its beginning.

        Args:
            generator: of its parameters and of all that it draws.
        """
        controller = Controller(
            space.genes,
            space.anchors,
            hidden=self.hidden,
            num_layers=self.num_layers,
            shared=self.shared,
            squash=self.squash,
            skip_rate=self.skip_rate,
            generator=generator,
        )
        return Policy(self, controller, generator)

    def propose(self, problem: Problem, generator: torch.Generator) -> Proposals:
        policy, failures = self.policy(problem.space, generator), 0
        while failures < MAX_REPEATS:
            drawn = [policy.draw() for _ in range(self.batch)]
            found = [problem.space.decode(one.genes) for one in drawn]
            feasible = [a for a in found if problem.is_feasible(a)]
            worth: dict[Architecture, float] = {}
            if feasible:
                trials = yield feasible
                worth = {t.architecture: self.reward(t.reward) for t in trials}
            failures = 0 if feasible else failures + len(drawn)
            policy.update(drawn, [worth.get(a) for a in found])

    def reward(self, value: float) -> float:
        """Of a trial's, which is the accuracy in percent or less."""
        return (value / 100) ** self.power if value > 0 else value / 100

    def loss(self, drawn: list[Drawn], rewards: list[float], baseline: float) -> Tensor:
        """Its gradient is minus that of the expected reward, estimated from draws of the
        controller, less the entropy and plus the divergence by their weights."""
        terms = [
            (baseline - reward) * one.log_prob
            - self.entropy_weight * one.entropy
            + self.skip_weight * one.skip_kl
            for one, reward in zip(drawn, rewards, strict=True)
        ]
        return torch.stack(terms).mean()


class Policy:
    """A controller in training, and what rewards it expects.

    Attributes:
        baseline: moving average of the rewards; None before the first.
        least: of all rewards so far, 0 included.
    """

    def __init__(
        self, settings: Reinforce, controller: Controller, generator: torch.Generator
    ) -> None:
        self.settings, self.controller, self.generator = settings, controller, generator
        self.optimizer = create_optimizer_v2(list(controller.parameters()), **settings.optimizer)
        self.baseline: float | None = None
        self.least = 0.0

    def draw(self, generator: torch.Generator | None = None) -> Drawn:
        drawn: Drawn = self.controller(generator or self.generator)
        return drawn

    def update(self, drawn: list[Drawn], worth: Sequence[float | None]) -> list[float]:
        """One step, by what each draw was worth; None for what could not be judged.

        Returns:
            The reward of each.
        """
        self.least = min(self.least, *(reward for reward in worth if reward is not None), 0.0)
        rewards = [self.least if reward is None else reward for reward in worth]
        mean = sum(rewards) / len(rewards)
        baseline = mean if self.baseline is None else self.baseline
        self.optimizer.zero_grad()
        self.settings.loss(drawn, rewards, baseline).backward()
        self.optimizer.step()
        decay = self.settings.baseline_decay
        self.baseline = decay * baseline + (1 - decay) * mean
        return rewards

    def state_dict(self) -> dict[str, Any]:
        return {
            "controller": self.controller.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "baseline": self.baseline,
            "least": self.least,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.controller.load_state_dict(state["controller"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.baseline, self.least = state["baseline"], state["least"]
