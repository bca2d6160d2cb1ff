from __future__ import annotations

import copy
import itertools
import platform
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from latency.backends import torch_cpu
from latency.backends.torch_cpu import TorchCPU, num_threads
from latency.measure import measure_networks
from latency.runner import Plan
from latency.samples import Operation, Unmeasurable
from latency.table import Target

TARGET = Target(resolution=8)
PLAN = Plan(rounds=5, min_rounds=5, warmup=1, burst_ms=3.0)
IMAGE = (1, 3, 8, 8)


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


class Sum(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_conditions_and_the_original_is_untouched(dtype: str) -> None:
    probe = Probe().train()
    before = copy.deepcopy(probe.state_dict())
    target = replace(TARGET, threads=2, dtype=dtype, batch=2)
    threads = torch.get_num_threads()
    timer = TorchCPU().prepare(Operation(probe, ((2, 3, 8, 8),), "x"), target)
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
    timer = TorchCPU().prepare(Operation(nn.Identity(), (IMAGE,), "x"), TARGET)
    assert timer(10) == pytest.approx(1.0)
    assert timer(1) == pytest.approx(10.0)


def test_an_operation_of_one_millisecond_reads_about_one() -> None:
    (found,) = measure_networks([Sleep()], TorchCPU(), TARGET, PLAN, in_chans=3)
    # never shorter, but for the correction of drift; seconds or microseconds lie far away
    assert 0.5 <= found.measurement.median_ms < 100.0


def test_several_inputs() -> None:
    timer = TorchCPU().prepare(Operation(Sum(), (IMAGE, (1, 3, 1, 1)), "x"), TARGET)
    assert timer(2) > 0


def test_an_operation_that_does_not_run_is_named() -> None:
    operations = {"relu": Operation(nn.ReLU(), (IMAGE,), "a=relu"),
                  "conv": Operation(nn.Conv2d(5, 5, 3), (IMAGE,), "a=conv, b=conv")}  # fmt: skip
    with pytest.raises(Unmeasurable, match="^a=conv, b=conv cannot be measured .conv.: Given gr"):
        TorchCPU().sample(operations, TARGET, PLAN)


def test_description_names_the_device_and_the_versions() -> None:
    found = TorchCPU().describe()
    assert found["torch"] == torch.__version__
    assert {"device_name", "python", "platform"} <= found.keys()
    assert all(isinstance(value, str) and value for value in found.values())
    assert TorchCPU(keep_memory=False).describe()["keeps_memory"] == "no"


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


# ---- freed memory

FAULTS = """
import resource
import torch
from latency.backends.torch_cpu import TorchCPU
from supernet.spaces.mbconv import MBConv

space = MBConv(stages=[(24, 2, 2), (40, 2, 2)], head_chs=128)
network = space.build_network(space.sample(torch.Generator().manual_seed(0)), 10).eval()
image = torch.zeros(1, 3, 224, 224)

def faults(call):
    for _ in range(5):  # the heap grows to what is needed
        call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
with torch.inference_mode():
    TorchCPU(keep_memory=False)
    before = faults(lambda: network(image))
    kept = TorchCPU().describe()["keeps_memory"]
    print(before, faults(lambda: network(image)), faults(lambda: torch.ones(7 * 2**20)), kept)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a way of glibc")
def test_kept_memory_saves_page_faults() -> None:
    """Large activations are given back to the system after every forward pass, or not at all.

    The last number is of 28 MB at once, more than anything the process had before.
    """
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True
    )
    *counts, kept = done.stdout.split()
    before, after, large = map(int, counts)
    assert kept == "yes"
    # before there are thousands of 4 KiB each, or dozens where the system has pages of 2 MiB
    assert before > 10 * max(after, 1) and large < 100, counts


def test_without_glibc_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def __init__(self, name: None) -> None:
            pass

    monkeypatch.setattr(torch_cpu.ctypes, "CDLL", Other)
    assert TorchCPU().describe()["keeps_memory"] == "no"
