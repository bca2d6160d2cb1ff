"""What a backend does: describe its device, and time a module on it."""

from __future__ import annotations

import copy
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from latency.table import Target

Timer = Callable[[int], float]  # number of calls in one burst -> mean ms of a call

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Backend(ABC):
    """One runtime on this machine. Subclasses name what they accept of a `Target`."""

    runtime: ClassVar[str]
    dtypes: ClassVar[tuple[str, ...]]
    devices: ClassVar[str]  # the valid ones, in words

    @abstractmethod
    def accepts_device(self, device: str) -> bool:
        """Whether `Target.device` names a device of this backend, and it is present."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """What timings depend on besides the target: `device_name`, and versions by name."""

    @abstractmethod
    def prepare(
        self, module: nn.Module, input_shapes: tuple[tuple[int, ...], ...], target: Target
    ) -> Timer:
        """Get a copy of `module` ready to be timed in evaluation mode; the original is untouched.

        Args:
            module: called with one tensor an input shape.
            input_shapes: batch included.
            target: accepted by `check`.

        Returns:
            A function that makes so many calls in a row and returns the mean ms of one.
        """

    def check(self, target: Target) -> None:
        """Refuse a target that this backend cannot stand for.

        Raises:
            ValueError: names the field and its valid values.
        """
        if target.runtime != self.runtime:
            raise ValueError(
                f"{type(self).__name__} cannot measure runtime={target.runtime!r}; "
                f"valid: {self.runtime}"
            )
        if target.dtype not in self.dtypes:
            raise ValueError(
                f"{type(self).__name__} cannot measure dtype={target.dtype!r}; "
                f"valid: {', '.join(self.dtypes)}"
            )
        if not self.accepts_device(target.device):
            raise ValueError(
                f"{type(self).__name__} cannot measure device={target.device!r} here; "
                f"valid: {self.devices}"
            )


def torch_module(
    module: nn.Module,
    input_shapes: tuple[tuple[int, ...], ...],
    dtype: str,
    device: torch.device | str,
) -> tuple[nn.Module, list[Tensor]]:
    """A copy in evaluation mode and random inputs, both of the dtype and on the device."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator).to(device, DTYPES[dtype]) for shape in input_shapes
    ]
    return copy.deepcopy(module).to(device, DTYPES[dtype]).eval(), inputs


def torch_versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }
