"""What a gradient search says at the end of an epoch."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from supernet.choice import Architecture
from supernet.derive import derive
from supernet.engine import Diverged, average_buffers
from supernet.mixed_ops.base import MixedOp
from supernet.network import Network
from supernet.strategies.base import Run, limit_records
from supernet.strategies.state import SearchState

log = logging.getLogger(__name__)


class EpochLog:
    """Journal records, one readable line an epoch, and the title of the progress bar."""

    def __init__(self, state: SearchState, run: Run, epochs: int) -> None:
        self.state, self.run, self.epochs = state, run, epochs
        self.started, self.first_step, self.waited = time.perf_counter(), state.step, 0.0
        self.free = parameter_free(state.problem.supernet)

    def end_epoch(
        self, epoch: int, searching: bool, more: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Agree on running statistics, log, and empty the meters.

        Args:
            more: for the record.

        Returns:
            The record.

        Raises:
            Diverged: the mean loss is not finite.
        """
        state = self.state
        accelerator = state.problem.accelerator
        average_buffers(state.problem.supernet, accelerator)
        loss, accuracy = state.weight_meter.read(accelerator)
        if not math.isfinite(loss):
            raise Diverged(
                f"the training loss is {loss} in epoch {epoch + 1}; lower weight_optimizer.lr or "
                "set clip_grad"
            )
        record: dict[str, Any] = {
            "step": state.step,
            "epoch": epoch + 1,
            "phase": "search" if searching else "warmup",
            "train_loss": loss,
            "train_accuracy": accuracy,
            "learning_rate": state.weight_optimizer.param_groups[0]["lr"],
        }
        if state.logits_optimizer is not None:
            if searching:
                arch_loss, arch_accuracy = state.arch_meter.read(accelerator)
                record.update(arch_loss=arch_loss, arch_accuracy=arch_accuracy)
            record.update(self._logits())
        record.update(more or {})
        self.run.log(record, self._timing())
        if self.run.main:
            log.info(self._line(record))
        for meter in (state.weight_meter, state.arch_meter):
            meter.sums.zero_()
        return record

    def title(self, epoch: int, searching: bool) -> str:
        """Phase and epoch, and the best architecture so far with its cost."""
        title = f"{'search' if searching else 'warm-up'} {epoch + 1}/{self.epochs}"
        if self.state.logits_optimizer is None:
            return title
        best, cost = self._derived(), self.state.problem.cost
        return f"{title} {_short(dict(best))} {cost.of(best):.4g} {cost.unit}"

    def _derived(self) -> Architecture:
        problem = self.state.problem
        return problem.derive(problem.scores(self.state.parameters()))

    def _logits(self) -> dict[str, Any]:
        """Where the architecture parameters stand."""
        problem, logits = self.state.problem, self.state.parameters()
        probabilities = {
            name: p.detach().double().cpu()
            for name, p in problem.relaxation.probabilities(logits).items()
            if name in problem.space.by_name
        }
        shares = problem.space.shares(probabilities)
        argmax, derived = derive(problem.space, problem.scores(logits)), self._derived()
        inputs = {name: p.tolist() for name, p in problem.inputs(logits).items()}
        return {
            "expected_cost": float(problem.additive.expected(shares)),
            "uncalibrated_cost": float(problem.additive.uncalibrated.expected(shares)),
            "argmax_cost": problem.cost.of(argmax),
            "derived_cost": problem.cost.of(derived),
            "multiplier": problem.objective.multiplier,
            "limits": limit_records(problem, derived, problem.expected(shares)),
            "entropy": _entropy(probabilities),
            **self._shares(argmax, ""),
            **self._shares(derived, "derived_"),
            "probabilities": {name: p.tolist() for name, p in probabilities.items()},
            **({"inputs": inputs} if inputs else {}),
            "architecture": dict(derived),
        }

    def _shares(self, architecture: Architecture, prefix: str) -> dict[str, float]:
        """Of its choices that are there: those that compute nothing, carry nothing, have no
        parameters. An edge that every cell has to leave out says nothing of a collapse."""
        space = self.state.problem.space
        absent = {(choice.name, choice.absent) for choice in space.choices}
        decided = {choice.name for choice in space.decided}
        pairs = [pair for pair in architecture if pair not in absent and pair[0] in decided]
        counts = {
            "skip": sum(option in space.skip_options for _, option in pairs),
            "none": sum(option in space.none_options for _, option in pairs),
            "free": sum(pair in self.free for pair in pairs),
        }
        return {f"{prefix}{name}_share": n / max(1, len(pairs)) for name, n in counts.items()}

    def _timing(self) -> dict[str, Any]:
        """Wall-clock of the epoch, or of its part since a resume."""
        now, state = time.perf_counter(), self.state
        waited = state.weight_stream.wait_seconds + state.arch_stream.wait_seconds
        seconds, steps = now - self.started, state.step - self.first_step
        timing = {
            "seconds": seconds,
            "steps_per_second": steps / seconds,
            "wait_share": (waited - self.waited) / seconds,
        }
        self.started, self.first_step, self.waited = now, state.step, waited
        return timing

    def _line(self, record: dict[str, Any]) -> str:
        unit = self.state.problem.cost.unit
        line = (
            f"{record['phase']} {record['epoch']}/{self.epochs}: "
            f"loss {record['train_loss']:.3f}, accuracy {record['train_accuracy']:.1f}%"
        )
        if "arch_accuracy" in record:
            line += f" (architecture half {record['arch_accuracy']:.1f}%)"
        if "architecture" in record:
            line += f", expected {record['expected_cost']:.4g} {unit}"
            if record["uncalibrated_cost"] != record["expected_cost"]:
                line += f" (uncalibrated {record['uncalibrated_cost']:.4g})"
            line += f", most probable {record['argmax_cost']:.4g}"
            if record["multiplier"] is not None:
                line += f", multiplier {record['multiplier']:.3f}"
            line += "".join(_limit(*item) for item in record["limits"].items())
            line += f", best {record['derived_cost']:.4g} {unit}: {_short(record['architecture'])}"
        return line


def parameter_free(supernet: Network) -> set[tuple[str, str]]:
    """(choice, option) pairs whose candidates have no parameters anywhere."""
    free, trained = set[tuple[str, str]](), set[tuple[str, str]]()
    for module in supernet.modules():
        if isinstance(module, MixedOp):
            for option, candidate in module.candidates.items():
                any_parameter = next(candidate.parameters(), None) is not None
                (trained if any_parameter else free).add((module.choice.name, option))
    return free - trained


def _limit(name: str, record: dict[str, Any]) -> str:
    text = f", {name}"
    if record["expected"] is not None:
        text += f" expected {record['expected']:.4g},"
    if record["multiplier"] is not None:
        text += f" multiplier {record['multiplier']:.3f},"
    return text + f" best {record['derived']:.4g} of {record['limit']:.4g} {record['unit']}"


def _short(options: dict[str, str]) -> str:
    return " ".join(options.values())


def _entropy(probabilities: dict[str, Tensor]) -> float:
    """Mean over choices of the entropy divided by its largest value, in [0, 1]."""
    shares = [
        float(-(p * p.clamp(min=1e-300).log()).sum()) / math.log(len(p))
        for p in probabilities.values()
        if len(p) > 1
    ]
    return sum(shares) / len(shares) if shares else 0.0
