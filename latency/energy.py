"""Energy counters, where the device exposes one: RAPL on Linux, NVML on NVIDIA GPUs."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

from latency.runner import RAPL, rapl


def energy_counter(device: str) -> Callable[[], float] | None:
    """A function that reads the mJ spent so far by the whole package or board; None without one."""
    if device.startswith("cuda"):
        return _nvml()
    return rapl(RAPL)


def _nvml() -> Callable[[], float] | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(_gpu_uuid())
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except Exception:  # not installed, no driver, or a GPU without the counter
            return None

    def read() -> float:
        torch.cuda.synchronize()
        return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle))

    return read


def _gpu_uuid() -> str:
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
