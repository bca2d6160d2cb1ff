"""PyTorch in eager mode on this machine's CPU."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter_ns

import torch
from torch import nn

from latency.backends.base import DTYPES, Backend, Timer, torch_module, torch_versions
from latency.table import Target


class TorchCPU(Backend):
    runtime = "torch"
    dtypes = tuple(DTYPES)
    devices = "cpu"

    def accepts_device(self, device: str) -> bool:
        return device == "cpu"

    def describe(self) -> dict[str, str]:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"{_cpu_model()}, {os.cpu_count()} cores, {capability}"
        return {"device_name": name, **torch_versions()}

    def prepare(
        self, module: nn.Module, input_shapes: tuple[tuple[int, ...], ...], target: Target
    ) -> Timer:
        module, inputs = torch_module(module, input_shapes, target.dtype, "cpu")

        def timer(num_calls: int) -> float:
            with num_threads(target.threads), torch.inference_mode():
                start = perf_counter_ns()
                for _ in range(num_calls):
                    module(*inputs)
                return (perf_counter_ns() - start) / num_calls / 1e6

        return timer


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """Compute with so many threads, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _cpu_model() -> str:
    """The model's name where the system tells it (Linux), else the architecture."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
