"""What a backend does: describe its device, and sample the time of operations on it."""

from __future__ import annotations

import copy
import logging
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from latency.energy import energy_counter
from latency.runner import Journal, Plan, Timer, run_rounds
from latency.samples import EMPTY, Operation, Samples, Unmeasurable, header
from latency.table import Target

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REFERENCE = Operation(nn.Conv2d(32, 32, 3, padding=1), ((1, 32, 32, 32),), "the reference")
NOTHING = Operation(nn.Identity(), ((1, 1),), EMPTY)


class Backend(ABC):
    """One runtime on one device. Subclasses name what they accept of a `Target`."""

    runtime: str
    dtypes: tuple[str, ...]
    device: str  # of a target that names none
    devices: str  # the valid ones, in words
    is_here: bool = True  # False: measuring is up to the user
    framed: bool = False  # whether operations are timed between other layers (`latency.framing`)

    def accepts_runtime(self, runtime: str) -> bool:
        """Whether `Target.runtime` names what this backend measures."""
        return runtime == self.runtime

    @abstractmethod
    def accepts_device(self, device: str) -> bool:
        """Whether `Target.device` names a device of this backend, and it is present."""

    @abstractmethod
    def describe(self) -> dict[str, str]:
        """What timings depend on besides the target: `device_name`, and versions by name."""

    @abstractmethod
    def sample(
        self,
        operations: Mapping[str, Operation],
        target: Target,
        plan: Plan,
        journal: Path | None = None,
        show: bool = True,
    ) -> Samples:
        """Time the operations and an empty call, in rounds, beside the reference.

        Args:
            operations: by name; modules are measured in evaluation mode and left as they are.
            target: accepted by `check`.
            journal: keeps the finished rounds, so that a call after a kill goes on from them;
                deleted at the end.
            show: progress where the output is a terminal.

        Raises:
            Unmeasurable: an operation does not get to the device, or does not run there.
            Elsewhere: the measuring is up to the user now; the message says what to do.
        """

    def check(self, target: Target) -> None:
        """Refuse a target that this backend cannot stand for.

        Raises:
            ValueError: names the field and its valid values.
        """
        if not self.accepts_runtime(target.runtime):
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


class LocalBackend(Backend):
    """A runtime in this process."""

    @abstractmethod
    def prepare(self, operation: Operation, target: Target) -> Timer:
        """Get a copy of the module ready to be timed; the original is untouched.

        Args:
            target: accepted by `check`.

        Returns:
            A function that makes so many calls in a row and returns the mean ms of one.
        """

    def sample(
        self,
        operations: Mapping[str, Operation],
        target: Target,
        plan: Plan,
        journal: Path | None = None,
        show: bool = True,
    ) -> Samples:
        every = {EMPTY: NOTHING, **operations}
        device = self.describe()
        kept = Journal(
            None if journal is None else os.fspath(journal), header(list(every), target, device)
        )
        done = len(kept.load(len(every)))
        if kept.note:
            log.warning("going on from %d rounds, others cannot be used: %s", done, kept.note)
        log.info(
            "measuring %d operations on %s%s",
            len(operations),
            target.device,
            f", {done} rounds done before" if done else "",
        )
        disable = None if show else True  # None: silent where the output is no terminal
        with tqdm(
            desc="preparing", total=len(every), unit="op", leave=False, disable=disable
        ) as bar:
            timers = []
            for name, operation in every.items():
                timers.append(_named(self, name, operation, target))
                bar.update()
        reference = _named(self, "conv 3x3", REFERENCE, target)
        with tqdm(desc="measuring", unit="burst", leave=False, disable=disable) as bar:

            def tick(index: int, done: int, total: int) -> None:
                bar.set_description(f"measuring, round {index + 1} of at most {plan.rounds}")
                bar.total = total
                bar.update(done - bar.n)

            rows, ended = run_rounds(
                timers, reference, plan, kept, energy_counter(target.device), tick
            )
        kept.delete()
        return Samples(list(every), rows, ended, device, vars(plan))


def _named(backend: LocalBackend, name: str, operation: Operation, target: Target) -> Timer:
    """A timer whose failures name the operation."""
    try:
        timer = backend.prepare(operation, target)
    except Exception as error:  # runtimes raise what they like
        raise Unmeasurable(operation.where, name, error) from error

    def named(num_calls: int) -> float:
        try:
            return timer(num_calls)
        except Exception as error:
            raise Unmeasurable(operation.where, name, error) from error

    return named


def torch_operation(
    operation: Operation, dtype: str, device: torch.device | str
) -> tuple[Callable[..., object], list[Tensor]]:
    """A copy of the module in evaluation mode and random inputs, of the dtype, on the device."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(shape, generator=generator).to(device, DTYPES[dtype])
        for shape in operation.input_shapes
    ]
    return copy.deepcopy(operation.module).to(device, DTYPES[dtype]).eval(), inputs


def torch_versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def cpu_name() -> str:
    """Model, cores and instruction set of this machine's CPU."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
