"""Bursts in rounds: every operation once a round, so that a slow phase of the machine hits all."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm import tqdm

from latency.backends.base import Backend, Timer
from latency.table import Measurement, Target, check_ms
from supernet.choice import canonical_json
from supernet.files import read_json, write_json

log = logging.getLogger(__name__)

FORMAT = "supernet.latency_progress"
VERSION = 1
MAX_CALLS = 10_000
MAX_GROWTH = 10.0  # of a burst at a time: short bursts overestimate a call

Operation = tuple[nn.Module, tuple[tuple[int, ...], ...]]  # module, input shapes
Rounds = list[list[float]]  # ms, shape (rounds, num_operations)


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        rounds: bursts an operation.
        warmup: calls before an operation's first burst.
        burst_ms: about how long a burst lasts; at least one call.
        seed: of the order within the rounds.
    """

    rounds: int
    warmup: int
    burst_ms: float
    seed: int

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.warmup < 1 or not 0 < self.burst_ms < float("inf"):
            raise ValueError(
                "rounds and warmup must be at least 1 and burst_ms above 0, not "
                f"rounds={self.rounds}, warmup={self.warmup}, burst_ms={self.burst_ms}"
            )


class Progress:
    """Finished rounds in a file, for the same operations on the same target, device and versions.

    Args:
        path: None keeps nothing.
        names: one an operation.
    """

    def __init__(
        self, path: Path | None, names: Sequence[str], backend: Backend, target: Target
    ) -> None:
        self.path = path
        self._num_operations = len(names)
        self._header = {
            "format": FORMAT,
            "version": VERSION,
            "unit": "ms",
            "target": asdict(target),
            "backend": backend.describe(),
            "operations": list(names),
        }

    def load(self) -> Rounds:
        """Rounds to go on from; a file that is corrupt or of other operations counts as none."""
        if self.path is None or not self.path.exists():
            return []
        try:
            return self._read(read_json(self.path, "measuring progress"))
        except ValueError as error:
            log.warning("measuring starts anew, its progress cannot be used: %s", error)
            return []

    def _read(self, value: Any) -> Rounds:
        if not isinstance(value, dict) or set(value) != {*self._header, "rounds"}:
            raise ValueError(f"{self.path} holds something else")
        for name, wanted in self._header.items():
            if canonical_json(value[name]) != canonical_json(wanted):
                raise ValueError(f"{self.path} is of another {name}")
        rounds = value["rounds"]
        if not isinstance(rounds, list) or not all(
            isinstance(row, list) and len(row) == self._num_operations for row in rounds
        ):
            raise ValueError(f"{self.path} does not list one time an operation and round")
        for row in rounds:
            for ms in row:
                check_ms(f"{self.path}: a time", ms)
        return rounds

    def save(self, rounds: Rounds) -> None:
        if self.path is not None:
            write_json(self.path, {**self._header, "rounds": rounds})

    def delete(self) -> None:
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def sample(
    operations: Sequence[Operation],
    backend: Backend,
    target: Target,
    plan: Plan,
    progress: Progress,
    show: bool,
) -> list[Measurement]:
    """Time every operation once a round, going on from the rounds already in `progress`.

    Args:
        show: a progress bar, where the output is a terminal.
    """
    finished = progress.load()[: plan.rounds]
    log.info(
        "measuring %d operations on %s in %d rounds%s",
        len(operations),
        target.device,
        plan.rounds,
        f", {len(finished)} of them done before" if finished else "",
    )
    if len(finished) < plan.rounds:
        timers = [backend.prepare(*operation, target) for operation in operations]
        calls = [calls_per_burst(timer, plan) for timer in timers]
        with tqdm(
            total=plan.rounds * len(operations),
            initial=len(finished) * len(operations),
            desc="measuring",
            unit="burst",
            disable=None if show else True,  # None: silent where the output is no terminal
        ) as bar:
            for index in range(len(finished), plan.rounds):
                times = [0.0] * len(operations)
                for which in round_order(len(operations), plan.seed, index):
                    times[which] = timers[which](calls[which])
                    bar.update()
                finished.append(times)
                progress.save(finished)
    return [summarize(column) for column in np.array(finished).T]


def calls_per_burst(timer: Timer, plan: Plan) -> int:
    """Warm up, then see how many calls make a burst of about `burst_ms`."""
    timer(plan.warmup)
    calls = 1
    while calls < MAX_CALLS:
        burst_ms = calls * min(timer(calls) for _ in range(3))  # one may have been interrupted
        if burst_ms >= plan.burst_ms / 2:
            break
        growth = plan.burst_ms / burst_ms if burst_ms > 0 else MAX_GROWTH
        calls = min(MAX_CALLS, max(calls + 1, round(calls * min(growth, MAX_GROWTH))))
    return calls


def round_order(num_operations: int, seed: int, index: int) -> list[int]:
    """A new order every round, the same one when a round is repeated after an interruption."""
    order = list(range(num_operations))
    random.Random(f"{seed} {index}").shuffle(order)
    return order


def summarize(times: np.ndarray) -> Measurement:
    """Median and interquartile range of the rounds' times, shape (rounds,), in ms."""
    low, median, high = np.percentile(times, (25, 50, 75))
    return Measurement(float(median), float(high - low), len(times))
