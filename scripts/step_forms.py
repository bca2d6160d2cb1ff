"""The forms in which a search step is measured: what `benchmark_step` compares."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from accelerate.utils import set_seed
from hydra.utils import instantiate
from omegaconf import DictConfig
from torch import Tensor

from latency.model import AdditiveCost
from supernet.data import Data
from supernet.derive import derive
from supernet.engine import make_accelerator
from supernet.joint import separate
from supernet.mixed_ops.base import PathWeights, Relaxation, Sample
from supernet.strategies.base import Problem
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.state import SearchState
from supernet_scripts.common import make_objective, make_space, merged
from supernet_scripts.measuring import measure_space

FORMS = ("plain", "grouped", "network")


class Unfrozen(FirstOrder):
    """Architecture steps that make gradients of the weights as well, which nobody reads."""

    def task_loss(
        self, state: SearchState, sample: Sample, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        state.problem.supernet.requires_grad_(True)
        return super().task_loss(state, sample, images, labels)


class InTurn(Relaxation):
    """Weight steps that take the options of every choice in turn."""

    has_logits = False
    turn = 0

    def for_weight_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> dict[str, PathWeights]:
        self.turn += 1
        return {name: PathWeights((self.turn % len(v),)) for name, v in logits.items()}

    def for_architecture_step(
        self, logits: Mapping[str, Tensor], generator: torch.Generator, progress: float
    ) -> Sample:
        raise AssertionError("for weight steps only")


class Stepper:
    """One form of the configured search; a call is a step.

    Attributes:
        seconds: of every step so far.
        cpu_seconds: the same by this process's CPU time, which other load disturbs less.
    """

    def __init__(self, cfg: DictConfig, data: Data, form: str) -> None:
        set_seed(cfg.seed)
        self.strategy = make_strategy(cfg, form)
        space, relaxation = make_space(cfg, data), instantiate(cfg.mixed_op)
        self.strategy.check_space(space)
        cost = measure_space(cfg, data, space, with_table=False).cost(space, "params")
        assert isinstance(cost, AdditiveCost)
        num_classes = data.info.num_classes
        if form == "network":
            supernet = space.build_network(derive(space, cost.per_option), num_classes)
        else:
            supernet = space.build_supernet(num_classes, relaxation.build)
        if form == "plain":
            separate(supernet)
        accelerator = make_accelerator("no" if form == "plain" else cfg.precision, cfg.device)
        objective = make_objective(cfg)
        problem = Problem(space, supernet, relaxation, objective, cost, data, accelerator, cfg.seed)
        self.state = SearchState(
            problem,
            self.strategy.batch_size,
            self.strategy.weight_optimizer,
            self.strategy.arch_optimizer,
            self.strategy.init_std,
            self.strategy.memory_format,
        )
        self.device = accelerator.device
        supernet.train()
        searches = cfg.step == "both" and form != "network"
        self.with_logits = searches and self.state.logits_optimizer is not None
        self._warm_up()
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def _warm_up(self) -> None:
        """Every candidate runs once: all weights have their momentum then."""
        problem = self.state.problem
        relaxation, problem.relaxation = problem.relaxation, InTurn()
        for _ in range(max(len(choice.options) for choice in problem.space.choices)):
            self.strategy.weight_step(self.state, 0.0)
        problem.relaxation = relaxation

    def __call__(self) -> None:
        start, cpu_start = time.perf_counter(), time.process_time()
        self.strategy.weight_step(self.state, 0.0)
        if self.with_logits:
            self.strategy.architecture_step(self.state, 0.0)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)
        self.cpu_seconds.append(time.process_time() - cpu_start)

    def waited(self) -> float:
        """Seconds spent waiting for data so far."""
        return self.state.weight_stream.wait_seconds + self.state.arch_stream.wait_seconds


def make_strategy(cfg: DictConfig, form: str) -> FirstOrder:
    changes = {}
    if form == "plain":
        name = f"{Unfrozen.__module__}.{Unfrozen.__qualname__}"
        changes = {"_target_": name, "channels_last": False}
    found: FirstOrder = instantiate(merged(cfg.strategy, changes), _convert_="all")
    return found
