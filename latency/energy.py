"""Energy counters, where the device exposes one: RAPL on Linux, NVML on NVIDIA GPUs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch

RAPL = Path("/sys/class/powercap")


def energy_counter(device: str) -> Callable[[], float] | None:
    """A function that reads the mJ spent so far by the whole package or board; None without one."""
    if device.startswith("cuda"):
        return _nvml()
    return rapl(RAPL)


def rapl(folder: Path) -> Callable[[], float] | None:
    """The sum over CPU packages, as `intel-rapl:N/energy_uj` tells; readable by root alone."""
    zones = [zone for zone in sorted(folder.glob("intel-rapl:*")) if zone.name.count(":") == 1]
    try:
        ranges = [int((zone / "max_energy_range_uj").read_text()) for zone in zones]
        last = [int((zone / "energy_uj").read_text()) for zone in zones]
    except (OSError, ValueError):
        return None
    if not zones:
        return None
    total = 0

    def read() -> float:
        nonlocal total
        for index, zone in enumerate(zones):
            now = int((zone / "energy_uj").read_text())
            total += (now - last[index]) % (ranges[index] + 1)  # the counter wraps around
            last[index] = now
        return total / 1e3

    return read


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
