"""A backend whose clock is a script, and sites for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from latency.backends.base import Backend, Timer
from latency.sites import Site
from latency.table import OpKey, Target

CALIBRATION = 4  # with bursts of one call: a warm-up and three looks at its duration


class Operation(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Killed(BaseException):
    """What no handler of errors catches."""


class ScriptedBackend(Backend):
    """Every call takes what `clock(name, burst)` says; `bursts` lists what was timed, in order.

    Args:
        clock: (operation, how many bursts of it there were before) -> ms.
        kill_after: bursts until the process dies.
    """

    runtime = "torch"
    dtypes = ("float32",)
    devices = "cpu"

    def __init__(
        self, clock: Callable[[str, int], float] = lambda *_: 1.0, kill_after: int = 10**9
    ) -> None:
        self.clock, self.kill_after = clock, kill_after
        self.bursts: list[str] = []
        self.warmups: list[tuple[str, int]] = []

    def accepts_device(self, device: str) -> bool:
        return device == "cpu"

    def describe(self) -> dict[str, str]:
        return {"device_name": "script", "torch": "0"}

    def prepare(
        self, module: nn.Module, input_shapes: tuple[tuple[int, ...], ...], target: Target
    ) -> Timer:
        assert isinstance(module, Operation)
        calibrating = iter(range(CALIBRATION))

        def timer(num_calls: int) -> float:
            if next(calibrating, None) is not None:
                self.warmups.append((module.name, num_calls))
                return 1.0
            if len(self.bursts) == self.kill_after:
                raise Killed
            ms = self.clock(module.name, self.bursts.count(module.name))
            self.bursts.append(module.name)
            return ms

        return timer


@pytest.fixture
def killed() -> type[Killed]:
    return Killed


@pytest.fixture
def scripted() -> type[ScriptedBackend]:
    return ScriptedBackend


@pytest.fixture
def operation() -> type[Operation]:
    return Operation


@pytest.fixture
def target() -> Target:
    return Target(resolution=8)


@pytest.fixture
def make_sites() -> Callable[[str], list[Site]]:
    """A fixed site for every letter."""
    modules = {letter: Operation(letter) for letter in "abcdefgh"}

    def make(letters: str) -> list[Site]:
        return [
            Site(OpKey(x, 1, 1, 1, 1), None, None, modules[x], ((1, 1),), 0, 0) for x in letters
        ]

    return make
