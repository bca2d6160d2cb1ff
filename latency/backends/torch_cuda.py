"""PyTorch in eager mode on an NVIDIA GPU, timed with CUDA events."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from latency.backends.base import DTYPES, Backend, Timer, torch_module, torch_versions
from latency.table import Target

SETTLING_CALLS = 3  # in which cuDNN tries its algorithms and the allocator fills its pool


class TorchCUDA(Backend):
    """The current GPU; CUDA_VISIBLE_DEVICES chooses another one."""

    runtime = "torch"
    dtypes = tuple(DTYPES)
    devices = "cuda, where PyTorch finds a GPU"

    def accepts_device(self, device: str) -> bool:
        return device == "cuda" and torch.cuda.is_available()

    def describe(self) -> dict[str, str]:
        return {
            "device_name": torch.cuda.get_device_name(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            **torch_versions(),
        }

    def prepare(
        self, module: nn.Module, input_shapes: tuple[tuple[int, ...], ...], target: Target
    ) -> Timer:
        module, inputs = torch_module(module, input_shapes, target.dtype, "cuda")
        return event_timer(
            lambda: module(*inputs),
            lambda: torch.cuda.Event(enable_timing=True),
            torch.cuda.synchronize,
        )


def event_timer(
    call: Callable[[], object], new_event: Callable[[], Any], synchronize: Callable[[], None]
) -> Timer:
    """A timer that reads CUDA events, once cuDNN has chosen its algorithms.

    Args:
        call: queues one call of the module.
        new_event: a `torch.cuda.Event` that keeps time.
        synchronize: waits until the device is idle.
    """
    with _searching_algorithms(), torch.inference_mode():
        for _ in range(SETTLING_CALLS):
            call()
        synchronize()

    def timer(num_calls: int) -> float:
        start, end = new_event(), new_event()
        with _searching_algorithms(), torch.inference_mode():
            synchronize()
            start.record()
            for _ in range(num_calls):
                call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / num_calls  # events count in ms

    return timer


@contextmanager
def _searching_algorithms() -> Iterator[None]:
    """Let cuDNN search; what it found holds only while the flag is set."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
