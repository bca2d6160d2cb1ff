from __future__ import annotations

import copy
import itertools
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from latency.backends import torch_cpu
from latency.backends.torch_cpu import TorchCPU, num_threads
from latency.measure import measure_network
from latency.table import Target

TARGET = Target(resolution=8)


class Probe(nn.Module):
    """Notes under which conditions it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.seen: list[tuple[object, ...]] = []

    def __deepcopy__(self, memo: dict[int, object]) -> Probe:
        twin = Probe()
        twin.load_state_dict(self.state_dict())
        twin.seen = self.seen  # shared, so that the test sees the copy's notes
        return twin

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(
            (x.dtype, tuple(x.shape), self.training, torch.is_inference_mode_enabled(),
             torch.get_num_threads())
        )  # fmt: skip
        return self.norm(self.conv(x))


class Sleep(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.001)
        return x


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_conditions_and_the_original_is_untouched(dtype: str) -> None:
    probe = Probe().train()
    before = copy.deepcopy(probe.state_dict())
    target = replace(TARGET, threads=2, dtype=dtype, batch=2)
    threads = torch.get_num_threads()
    timer = TorchCPU().prepare(probe, ((2, 3, 8, 8),), target)
    assert timer(3) > 0
    assert probe.seen == [(getattr(torch, dtype), (2, 3, 8, 8), False, True, 2)] * 3
    assert torch.get_num_threads() == threads
    assert probe.training
    after = probe.state_dict()
    assert all(before[n].dtype == after[n].dtype for n in before)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_threads_are_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), num_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before


def test_the_clock_counts_nanoseconds_and_the_timer_milliseconds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ticks = itertools.count(step=10_000_000)  # 10 ms between two looks at the clock
    monkeypatch.setattr(torch_cpu, "perf_counter_ns", lambda: next(ticks))
    timer = TorchCPU().prepare(nn.Identity(), ((1, 3, 8, 8),), TARGET)
    assert timer(10) == pytest.approx(1.0)
    assert timer(1) == pytest.approx(10.0)


def test_an_operation_of_one_millisecond_reads_about_one() -> None:
    found = measure_network(
        Sleep(), TorchCPU(), TARGET, in_chans=3, rounds=5, warmup=1, burst_ms=3.0
    )
    assert 1.0 <= found.median_ms < 100.0  # never shorter; seconds or microseconds lie far away


def test_several_inputs() -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    assert TorchCPU().prepare(Sum(), ((1, 3, 8, 8), (1, 3, 1, 1)), TARGET)(2) > 0


def test_description_names_the_device_and_the_versions() -> None:
    found = TorchCPU().describe()
    assert found["torch"] == torch.__version__
    assert {"device_name", "python", "platform"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float64"}, "'float64'; valid: float32, bfloat16, float16"),
        ({"device": "cuda"}, "'cuda' here; valid: cpu"),
        ({"runtime": "onnxruntime"}, "'onnxruntime'; valid: torch"),
    ],
)
def test_what_it_cannot_measure(change: dict[str, str], message: str) -> None:
    TorchCPU().check(TARGET)
    with pytest.raises(ValueError, match=message):
        TorchCPU().check(replace(TARGET, **change))
