"""PyTorch on an NVIDIA GPU: CUDA graphs timed with events."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from latency.backends.base import DTYPES, LocalBackend, torch_operation, torch_versions
from latency.runner import Timer
from latency.samples import Operation
from latency.table import Target

SETTLING_CALLS = 3  # in which cuDNN tries its algorithms and the allocator fills its pool


class TorchCUDA(LocalBackend):
    """The current GPU; CUDA_VISIBLE_DEVICES chooses another one.

    Args:
        graphs: replay a captured CUDA graph, so that launching kernels one by one is not mistaken
            for their work; False times the eager calls.
    """

    runtime = "torch"
    dtypes = tuple(DTYPES)
    device = "cuda"
    devices = "cuda, where PyTorch finds a GPU"

    def __init__(self, graphs: bool = True) -> None:
        self.graphs = graphs

    def accepts_device(self, device: str) -> bool:
        return device == "cuda" and torch.cuda.is_available()

    def describe(self) -> dict[str, str]:
        return {
            "device_name": torch.cuda.get_device_name(),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),
            "cuda_graphs": "yes" if self.graphs else "no",
            **torch_versions(),
        }

    def prepare(self, operation: Operation, target: Target) -> Timer:
        module, inputs = torch_operation(operation, target.dtype, "cuda")
        call = settled(lambda: module(*inputs))
        if self.graphs:
            call = captured(call)
        return event_timer(
            call, lambda: torch.cuda.Event(enable_timing=True), torch.cuda.synchronize
        )


def settled(call: Callable[[], object]) -> Callable[[], object]:
    """The call once cuDNN has chosen its algorithms, on a stream of its own as a capture needs it.

    What cuDNN found holds only while its search is on, so it stays on.
    """
    torch.backends.cudnn.benchmark = True
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.inference_mode():
        for _ in range(SETTLING_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    return call


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """The replay of a graph of one call."""
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        call()
    return graph.replay


def event_timer(
    call: Callable[[], object], new_event: Callable[[], Any], synchronize: Callable[[], None]
) -> Timer:
    """A timer that reads CUDA events.

    Args:
        call: queues one call of the module.
        new_event: a `torch.cuda.Event` that keeps time.
        synchronize: waits until the device is idle.
    """

    def timer(num_calls: int) -> float:
        start, end = new_event(), new_event()
        with torch.inference_mode():
            synchronize()
            start.record()
            for _ in range(num_calls):
                call()
            end.record()
            end.synchronize()
        return float(start.elapsed_time(end)) / num_calls  # events count in ms

    return timer
