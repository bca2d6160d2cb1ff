from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from latency.backends.torch_cuda import SETTLING_CALLS, TorchCUDA, event_timer
from latency.measure import measure_network
from latency.table import Target


class Device:
    """A queue: calls are counted when issued and take time when the device is waited for.

    The first calls take long, as cuDNN's algorithm search does, unless the search is off: then
    every call does.
    """

    def __init__(self, call_ms: float) -> None:
        self.call_ms = call_ms
        self.clock = 0.0
        self.calls = 0
        self.log: list[str] = []

    def call(self) -> None:
        assert torch.is_inference_mode_enabled()
        settled = self.calls >= SETTLING_CALLS and torch.backends.cudnn.benchmark
        self.clock += self.call_ms if settled else 1000.0
        self.calls += 1
        self.log.append("call")

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def event(self) -> Any:
        return Event(self)


class Event:
    def __init__(self, device: Device) -> None:
        self.device = device

    def record(self) -> None:
        self.time = self.device.clock
        self.device.log.append("record")

    def synchronize(self) -> None:
        self.device.log.append("wait for event")

    def elapsed_time(self, end: Event) -> float:
        assert self.device.log[-1] == "wait for event", "read before it was reached"
        return end.time - self.time  # ms, as CUDA's


@pytest.mark.parametrize("benchmark", [False, True])
def test_no_algorithm_search_is_timed(monkeypatch: pytest.MonkeyPatch, benchmark: bool) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    device = Device(call_ms=1.5)
    timer = event_timer(device.call, device.event, device.synchronize)
    assert timer(4) == pytest.approx(1.5)
    assert torch.backends.cudnn.benchmark is benchmark
    settling = ["call"] * SETTLING_CALLS + ["synchronize"]
    burst = ["synchronize", "record", *["call"] * 4, "record", "wait for event"]
    assert device.log == settling + burst


def test_the_flag_is_restored_after_an_error() -> None:
    before = torch.backends.cudnn.benchmark
    counter = itertools.count()

    def fail() -> None:
        next(counter)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        event_timer(fail, lambda: None, lambda: None)
    assert torch.backends.cudnn.benchmark == before


def test_without_a_gpu_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda' here; valid: cuda, where PyTorch finds"):
        TorchCUDA().check(Target(device="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    TorchCUDA().check(Target(device="cuda"))
    with pytest.raises(ValueError, match="device='cpu' here"):
        TorchCUDA().check(Target(device="cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(dtype: str) -> None:
    backend, target = TorchCUDA(), Target(device="cuda", dtype=dtype, resolution=32)
    network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    found = measure_network(network, backend, target, in_chans=3, rounds=3, burst_ms=1.0)
    assert found.median_ms > 0
    assert next(network.parameters()).device.type == "cpu"
    assert backend.describe()["device_name"]
