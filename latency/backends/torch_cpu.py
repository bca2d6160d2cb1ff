"""PyTorch in eager mode on this machine's CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter_ns

import torch

from latency.backends.base import DTYPES, LocalBackend, cpu_name, torch_operation, torch_versions
from latency.runner import Timer
from latency.samples import Operation
from latency.table import Target

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
MMAP_THRESHOLD = 32 * 2**20  # the largest that glibc takes
TRIM_THRESHOLD = 2**31 - 1


class TorchCPU(LocalBackend):
    """PyTorch's eager mode.

    Args:
        keep_memory: let this process keep the memory it frees. By default the C library hands
            large activations back to the system after every layer, and each next one costs a page
            fault every 4 KiB. A deployed process gets the same from
            MALLOC_MMAP_THRESHOLD_=33554432 and MALLOC_TRIM_THRESHOLD_=2147483647 in its
            environment. False measures with the faults.
    """

    runtime = "torch"
    dtypes = tuple(DTYPES)
    device = "cpu"
    devices = "cpu"

    def __init__(self, keep_memory: bool = True) -> None:
        self.keeps_memory = keep_memory and keep_freed_memory()

    def accepts_device(self, device: str) -> bool:
        return device == "cpu"

    def describe(self) -> dict[str, str]:
        keeps = "yes" if self.keeps_memory else "no"
        return {"device_name": cpu_name(), "keeps_memory": keeps, **torch_versions()}

    def prepare(self, operation: Operation, target: Target) -> Timer:
        module, inputs = torch_operation(operation, target.dtype, "cpu")

        def timer(num_calls: int) -> float:
            with num_threads(target.threads), torch.inference_mode():
                start = perf_counter_ns()
                for _ in range(num_calls):
                    module(*inputs)
                return (perf_counter_ns() - start) / num_calls / 1e6

        return timer


def keep_freed_memory() -> bool:
    """Make glibc's malloc keep freed memory for this process; False where that is not possible."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    return bool(
        mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD) and mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)
    )


@contextmanager
def num_threads(threads: int) -> Iterator[None]:
    """Compute with so many threads, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
