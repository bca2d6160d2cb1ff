"""Small operations for the backends that hand ONNX files to others."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from latency.backends.bundle import Bundle
from latency.runner import Plan
from latency.samples import Elsewhere, Operation
from latency.table import Target

PLAN = Plan(rounds=4, min_rounds=2, warmup=1, burst_ms=0.1, precision=0.5)


class Unexportable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.fft() if hasattr(x, "fft") else x.bogus()  # no tensor has either


@pytest.fixture
def target() -> Target:
    return Target(device="pi", runtime="onnxruntime", resolution=8)


@pytest.fixture
def plan() -> Plan:
    return PLAN


@pytest.fixture
def operations() -> dict[str, Operation]:
    """One with random weights, one without any, and one with two inputs."""

    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    conv = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU())
    image = (1, 3, 8, 8)
    return {
        "conv": Operation(conv, (image,), "stage1_0=k3, stage1_1=k3"),
        "relu": Operation(nn.ReLU(), (image,), "a fixed layer"),
        "sum": Operation(Sum(), (image, (1, 3, 1, 1)), "stage1_0=skip"),
    }


@pytest.fixture
def unexportable() -> Operation:
    return Operation(Unexportable(), ((1, 3, 8, 8),), "stage2_1=k5")


@pytest.fixture
def unpacked(
    operations: dict[str, Operation], target: Target, tmp_path: Path
) -> Callable[..., Path]:
    """Writes a bundle and unpacks it in a folder that takes the device's place."""

    def unpack(name: str = "device", plan: Plan = PLAN, **others: Operation) -> Path:
        archive = tmp_path / "bundle.zip"
        with pytest.raises(Elsewhere):
            Bundle(str(archive)).sample({**operations, **others}, target, plan)
        zipfile.ZipFile(archive).extractall(tmp_path / name)
        return tmp_path / name

    return unpack


@pytest.fixture
def run_device() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs the runner as a user does, where nothing of this project can be imported."""

    def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-I", str(folder / "runner.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)

    return run


@pytest.fixture
def edit_manifest() -> Callable[..., None]:
    """Changes a bundle with an id that fits."""
    from latency.runner import digest

    def edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
        path = folder / "manifest.json"
        manifest = json.loads(path.read_text())
        change(manifest)
        del manifest["id"]
        manifest["id"] = digest(manifest)
        path.write_text(json.dumps(manifest))

    return edit
