"""What a backend is given to measure, and what it brings back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import nn

from latency.runner import EMPTY, Row, Statistics, halves, summarize
from latency.table import Measurement, Target


@dataclass(frozen=True)
class Operation:
    """A module and how it is called.

    Attributes:
        module: called with one tensor an input shape.
        input_shapes: batch included.
        where: for messages: the candidates it stands for ("stage1_0=k3_e6, ..."), or a network's
            name.
    """

    module: nn.Module
    input_shapes: tuple[tuple[int, ...], ...]
    where: str


class Unmeasurable(ValueError):
    """An operation that cannot be exported to the device or does not run on it."""

    def __init__(self, where: str, name: str, reason: object) -> None:
        words = str(reason).strip().splitlines() or [type(reason).__name__]
        text = f"{where} cannot be measured ({name}): {words[0]}"
        if "=" in where:
            text += (
                "; to search without a candidate: exclude=['CHOICE=OPTION'], or '*=OPTION' for all "
                "choices"
            )
        super().__init__(text)


class Elsewhere(Exception):
    """Nothing was measured yet: files were written that the user takes to the device."""


@dataclass
class Samples:
    """Raw times of some operations, an empty call among them, from one device and session.

    Attributes:
        names: of the operations in the order of their positions in the rows; `EMPTY` is one.
        rows: rounds of bursts (`latency.runner`).
        ended: "precise", "rounds" or "time limit".
        device: what the times depend on: `device_name`, versions.
        plan: how it was measured.
    """

    names: Sequence[str]
    rows: Sequence[Row]
    ended: str
    device: Mapping[str, str]
    plan: Mapping[str, Any]

    def __post_init__(self) -> None:
        *operations, self._reference = summarize(self.rows, len(self.names))
        self._statistics = dict(zip(self.names, operations, strict=True))

    @property
    def reference_ms(self) -> float:
        """What the reference took: how fast the device was."""
        return self._reference.median_ms

    @property
    def overhead_ms(self) -> float:
        """What a call takes that computes nothing."""
        return self._statistics[EMPTY].median_ms

    def measurement(self, name: str) -> Measurement:
        return _measurement(self._statistics[name])

    def halves(self, name: str) -> tuple[float, float]:
        """Medians of the even and of the odd rounds, in ms: noise alone makes them differ."""
        even, odd = self._halves[list(self.names).index(name)].tolist()
        return even, odd

    @cached_property
    def _halves(self) -> np.ndarray:
        return halves(self.rows, len(self.names))


def _measurement(found: Statistics) -> Measurement:
    precision = found.ci_ms / found.median_ms if found.median_ms else 0.0
    return Measurement(**asdict(found), precision=precision)


def header(names: Sequence[str], target: Target, device: Mapping[str, str]) -> dict[str, Any]:
    """What a journal of rounds must agree on to be gone on from."""
    return {
        "format": "supernet.latency_rounds",
        "version": 2,
        "target": asdict(target),
        "device": dict(device),
        "operations": list(names),
    }
