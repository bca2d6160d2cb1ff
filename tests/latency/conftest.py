"""A backend whose clock is a script, and sites for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from latency.backends.base import LocalBackend
from latency.framing import Frame
from latency.runner import Plan, Timer
from latency.samples import Operation
from latency.sites import Site
from latency.table import OpKey, Target


class Named(nn.Module):
    """An operation that the script knows by its name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Killed(BaseException):
    """What no handler of errors catches."""


def script_name(operation: Operation) -> str:
    """A letter, "framed" and a letter, "a frame", "an empty call" or "the reference"."""
    module = operation.module
    if isinstance(module, Frame):
        inner = module.operation
        return f"framed {inner.name}" if isinstance(inner, Named) else "a frame"
    return module.name if isinstance(module, Named) else operation.where


class ScriptedBackend(LocalBackend):
    """Every call takes what `clock(name, burst)` says; `bursts` lists what was timed, in order.

    Meant for plans with `burst_ms=0`, where nothing but the bursts themselves is called.

    Args:
        clock: (operation, how many bursts of it there were before) -> ms.
        kill_after: bursts of operations (letters) until the process dies.
        base: what an empty call and the reference take, in ms.
    """

    runtime = "torch"
    dtypes = ("float32",)
    device = devices = "cpu"

    def __init__(
        self,
        clock: Callable[[str, int], float] = lambda *_: 1.0,
        kill_after: int = 10**9,
        base: tuple[float, float] = (0.125, 2.0),
    ) -> None:
        self.clock, self.kill_after = clock, kill_after
        self.base = dict(zip(("an empty call", "the reference"), base, strict=True))
        self.bursts: list[str] = []  # of letters
        self.every: list[str] = []

    def accepts_device(self, device: str) -> bool:
        return device == "cpu"

    def describe(self) -> dict[str, str]:
        return {"device_name": "script", "torch": "0"}

    def prepare(self, operation: Operation, target: Target) -> Timer:
        name = script_name(operation)

        def timer(num_calls: int) -> float:
            self.every.append(name)
            if name in self.base:
                return self.base[name]
            if len(self.bursts) == self.kill_after:
                raise Killed
            ms = self.clock(name, self.bursts.count(name))
            self.bursts.append(name)
            return ms

        return timer


@pytest.fixture(autouse=True)
def _no_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests find the same on machines that count energy."""
    monkeypatch.setattr("latency.energy.RAPL", tmp_path / "no_rapl")


@pytest.fixture
def killed() -> type[Killed]:
    return Killed


@pytest.fixture
def scripted() -> type[ScriptedBackend]:
    return ScriptedBackend


@pytest.fixture
def named() -> type[Named]:
    return Named


@pytest.fixture
def target() -> Target:
    return Target(resolution=8)


@pytest.fixture
def plan() -> Plan:
    """Three rounds of single calls."""
    return Plan(rounds=3, min_rounds=3, burst_ms=0.0)


@pytest.fixture
def make_sites() -> Callable[[str], list[Site]]:
    """A fixed site for every letter; all get images."""
    modules = {letter: Named(letter) for letter in "abcdefgh"}
    shape = (1, 3, 8, 8)

    def make(letters: str) -> list[Site]:
        return [
            Site(OpKey(x, 3, 3, 1, 8), None, None, modules[x], (shape,), shape, 0, 0)
            for x in letters
        ]

    return make
