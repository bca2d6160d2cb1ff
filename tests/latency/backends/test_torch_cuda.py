from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from latency.backends.torch_cuda import SETTLING_CALLS, TorchCUDA, captured, event_timer, settled
from latency.measure import measure_networks
from latency.runner import Plan
from latency.samples import Operation
from latency.table import Target

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TARGET = Target(device="cuda", resolution=32)


class Device:
    """A queue: calls are counted when issued and take time when the device is waited for."""

    def __init__(self, call_ms: float) -> None:
        self.call_ms = call_ms
        self.clock = 0.0
        self.log: list[str] = []

    def call(self) -> None:
        assert torch.is_inference_mode_enabled()
        self.clock += self.call_ms
        self.log.append("call")

    def synchronize(self) -> None:
        self.clock += 500.0  # what was queued before is not the burst's
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


@pytest.mark.parametrize("num_calls", [1, 4])
def test_a_burst_lies_between_two_events_on_an_idle_device(num_calls: int) -> None:
    device = Device(call_ms=1.5)
    timer = event_timer(device.call, device.event, device.synchronize)
    assert device.log == []
    assert timer(num_calls) == pytest.approx(1.5)
    burst = ["synchronize", "record", *["call"] * num_calls, "record", "wait for event"]
    assert device.log == burst
    assert timer(num_calls) == pytest.approx(1.5)
    assert device.log == 2 * burst


def test_without_a_gpu_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda' here; valid: cuda, where PyTorch finds"):
        TorchCUDA().check(TARGET)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    TorchCUDA().check(TARGET)
    with pytest.raises(ValueError, match="device='cpu' here"):
        TorchCUDA().check(Target(device="cpu"))


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU())


@needs_gpu
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(dtype: str, graphs: bool) -> None:
    backend, target = TorchCUDA(graphs), Target(device="cuda", dtype=dtype, resolution=32)
    module = network()
    plan = Plan(rounds=3, min_rounds=3, burst_ms=1.0)
    (found,) = measure_networks([module], backend, target, plan, in_chans=3)
    assert found.measurement.median_ms > 0
    assert next(module.parameters()).device.type == "cpu"
    assert backend.describe()["device_name"]
    assert backend.describe()["cuda_graphs"] == ("yes" if graphs else "no")


@needs_gpu
def test_cudnn_searches_before_anything_is_captured_or_timed() -> None:
    calls = []
    call = settled(lambda: calls.append(torch.cuda.is_current_stream_capturing()))
    assert calls == [False] * SETTLING_CALLS
    assert torch.backends.cudnn.benchmark
    captured(lambda: (call(), torch.zeros(1, device="cuda"))[0])
    assert calls == [False] * SETTLING_CALLS + [True]


@needs_gpu
def test_a_replay_computes_what_the_module_does() -> None:
    module, x = network().cuda().eval(), torch.randn(1, 3, 32, 32, device="cuda")
    output = torch.zeros(1, 16, 30, 30, device="cuda")
    replay = captured(settled(lambda: output.copy_(module(x))))
    with torch.inference_mode():
        expected = module(x.copy_(torch.randn_like(x))).clone()
        output.zero_()
        replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(output, expected)


@needs_gpu
def test_the_launches_of_many_small_kernels_are_not_mistaken_for_work() -> None:
    module = nn.Sequential(*(nn.ReLU() for _ in range(200)))
    operation = Operation(module, ((1, 8, 4, 4),), "x")
    eager, replayed = (
        min(TorchCUDA(graphs).prepare(operation, TARGET)(20) for _ in range(5))
        for graphs in (False, True)
    )
    assert replayed < eager
