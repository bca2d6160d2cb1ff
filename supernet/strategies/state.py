"""The moving parts of a gradient search; `state_dict` is all there is to resume from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from timm.optim import create_optimizer_v2

from supernet.checkpoint import rng_state, set_rng_state
from supernet.choice import ArchitectureParameters
from supernet.data import Loader, Stream
from supernet.engine import Meter, check_optimizers
from supernet.strategies.base import Problem


@dataclass
class Watched:
    """What a monitor remembers.

    Attributes:
        curvatures: (epoch, eigenvalue), in order.
        good: the last epoch within all shares, where there is one.
        warned: rules that were broken.
        over: the search has ended early.
    """

    curvatures: list[tuple[int, float]] = field(default_factory=list)
    good: int | None = None
    warned: list[str] = field(default_factory=list)
    over: bool = False


class Part(Protocol):
    """What a strategy adds to the state of its search."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], /) -> Any: ...


class SearchState:
    """Logits, optimizers, streams, meters and random state of one search.

    Args:
        problem: its supernet is moved to the accelerator's device.
        batch_size: images a step and process.
        weight_optimizer, arch_optimizer: arguments of timm's `create_optimizer_v2`.
        init_std: of the logits.

    Attributes:
        wrapped: the supernet as the weight steps call it (DDP with several processes).
        logits_optimizer: None for a relaxation without logits.
        step: weight steps done.
        ranked: architectures ranked so far, for a relaxation without logits or in a refinement.
        monitor: what the monitor of collapse remembers.
        selected: option by choice, of those that selection by perturbation has settled.
        decided: how many choices and nodes it has settled.
        tuned: weight steps done since the last of them.
        parts: by name, what the strategy adds.
    """

    def __init__(
        self,
        problem: Problem,
        batch_size: int,
        weight_optimizer: Mapping[str, Any],
        arch_optimizer: Mapping[str, Any],
        init_std: float,
        memory_format: torch.memory_format,
    ) -> None:
        accelerator = problem.accelerator
        self.problem = problem
        self.generator = torch.Generator().manual_seed(problem.seed)
        choices = problem.space.decided
        problem.relaxation.begin(problem.space)
        self.parameters = ArchitectureParameters(
            (*choices, *problem.relaxation.nodes(choices)), init_std, self.generator
        ).to(accelerator.device)
        self.weight_stream, self.arch_stream = (
            Stream(
                Loader(
                    half,
                    batch_size=batch_size,
                    seed=problem.seed,
                    train=True,
                    device=accelerator.device,
                    rank=accelerator.process_index,
                    world_size=accelerator.num_processes,
                )
            )
            for half in problem.data.search_splits(problem.seed)
        )
        problem.supernet.to(accelerator.device).to(memory_format=memory_format)
        decay = problem.objective.weight_decay
        override = {} if decay is None else {"weight_decay": decay}
        weights = create_optimizer_v2(problem.supernet, **{**weight_optimizer, **override})
        logits = None
        if problem.relaxation.has_logits:
            logits = create_optimizer_v2(list(self.parameters.parameters()), **arch_optimizer)
            problem.relaxation.check_optimizer(logits)
        check_optimizers(weights, logits, problem.supernet, self.parameters)
        self.wrapped, self.weight_optimizer = accelerator.prepare(problem.supernet, weights)
        self.logits_optimizer = None if logits is None else accelerator.prepare(logits)
        self.weight_meter, self.arch_meter = Meter(accelerator.device), Meter(accelerator.device)
        self.step = 0
        self.ranked: list[dict[str, Any]] = []
        self.monitor = Watched()
        self.selected: dict[str, str] = {}
        self.decided = self.tuned = 0
        self.parts: dict[str, Part] = {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "supernet": self.problem.supernet.state_dict(),
            "logits": self.parameters.state_dict(),
            "weight_optimizer": self.weight_optimizer.state_dict(),
            "logits_optimizer": self.logits_optimizer and self.logits_optimizer.state_dict(),
            "objective": self.problem.objective.state_dict(),
            "weight_stream": self.weight_stream.state_dict(),
            "arch_stream": self.arch_stream.state_dict(),
            "weight_meter": self.weight_meter.state_dict(),
            "arch_meter": self.arch_meter.state_dict(),
            "generator": self.generator.get_state(),
            "rng": rng_state(),
            "ranked": self.ranked,
            "monitor": asdict(self.monitor),
            "selected": self.selected,
            "decided": self.decided,
            "tuned": self.tuned,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a `state_dict`.

        Raises:
            ValueError: it is of another space or another setting.
        """
        try:
            self.load_part(state)
            self.weight_optimizer.load_state_dict(state["weight_optimizer"])
            if self.logits_optimizer is not None:
                self.logits_optimizer.load_state_dict(state["logits_optimizer"])
            for name in ("weight_stream", "arch_stream", "weight_meter", "arch_meter"):
                getattr(self, name).load_state_dict(state[name])
            self.generator.set_state(state["generator"])
            self.ranked = list(state["ranked"])
            self.monitor = Watched(**state["monitor"])
            self.selected = dict(state["selected"])
            self.decided, self.tuned = state["decided"], state["tuned"]
            self.step = state["step"]
            for name, part in self.parts.items():
                part.load_state_dict(state["parts"][name])
            set_rng_state(state["rng"])
        except (AssertionError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"the checkpoint does not fit this search ({error}): resume with the configuration "
                "that made it, or choose another run_dir"
            ) from error

    def load_part(self, state: Mapping[str, Any]) -> None:
        """Take up what an answer is made of: weights, logits, multipliers."""
        self.problem.supernet.load_state_dict(state["supernet"])
        self.parameters.load_state_dict(state["logits"])
        self.problem.objective.load_state_dict(state["objective"])
