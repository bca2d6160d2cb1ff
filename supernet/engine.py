"""What every training loop shares: processes and precision through Accelerate, meters, checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor, nn

PRECISIONS = ("no", "bf16", "fp16")


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


def make_accelerator(precision: str = "no", device: str = "auto") -> Accelerator:
    """Accelerate's view of this process; the jobs of a sweep may each ask for another precision.

    Args:
        precision: "no" (float32), "bf16" or "fp16".
        device: "auto" (a GPU where there is one) or "cpu".

    Raises:
        ValueError: unknown value.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown; valid: {', '.join(PRECISIONS)}")
    if device not in ("auto", "cpu"):
        raise ValueError(f"device={device!r} is unknown; valid: auto, cpu")
    AcceleratorState._reset_state()  # else a second precision in one process raises
    GradientState._reset_state()
    # A sampled path leaves the other candidates without gradients.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        mixed_precision=precision, cpu=device == "cpu" or None, kwargs_handlers=[ddp]
    )


class Alone(Accelerator):
    """One process by itself: it trains and evaluates as if there were no others, which do something
    else meanwhile. What it prepares is forgotten by its own `free_memory`."""

    def __init__(self, accelerator: Accelerator) -> None:
        super().__init__(mixed_precision=accelerator.mixed_precision)

    @property
    def num_processes(self) -> int:
        return 1

    @property
    def process_index(self) -> int:
        return 0

    def prepare_model(self, model: Any, *args: Any, **settings: Any) -> Any:
        """Without a wrapper that would average gradients."""
        return super().prepare_model(model, *args, **{**settings, "evaluation_mode": True})

    def reduce(self, tensor: Any, *args: Any, **settings: Any) -> Any:
        return tensor


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], accelerator: Accelerator) -> None:
    """Mean over processes, for parameters that stand outside the wrapped module."""
    if accelerator.num_processes > 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad = accelerator.reduce(parameter.grad, reduction="mean")


@torch.no_grad()
def average_buffers(module: nn.Module, accelerator: Accelerator) -> None:
    """Mean over processes of running statistics, which each process gathers on its own data."""
    if accelerator.num_processes > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                buffer.copy_(accelerator.reduce(buffer.clone(), reduction="mean"))


def holds_everywhere(holds: bool, accelerator: Accelerator) -> bool:
    """Whether it holds in every process: what only some do, the others would wait for."""
    if accelerator.num_processes == 1:
        return holds
    broken = torch.tensor(float(not holds), device=accelerator.device)
    return not accelerator.reduce(broken, reduction="sum").item()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block, no parameter of `module` asks for a gradient."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """After the block, the buffers of `module` are what they were before it."""
    buffers = list(module.buffers())
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)


def check_optimizers(
    weights: torch.optim.Optimizer,
    logits: torch.optim.Optimizer | None,
    supernet: nn.Module,
    parameters: nn.Module,
) -> None:
    """The two optimizers must be disjoint and together exhaustive.

    Raises:
        ValueError: a parameter is in both, in the wrong one, or in none.
    """
    held = [
        [id(p) for group in optimizer.param_groups for p in group["params"]] if optimizer else []
        for optimizer in (weights, logits)
    ]
    for optimizer_name, ids, module in (
        ("weight optimizer", held[0], supernet),
        ("architecture optimizer", held[1], parameters if logits else nn.Module()),
    ):
        wanted = {id(p): name for name, p in module.named_parameters()}
        if missing := [name for key, name in wanted.items() if key not in ids]:
            raise ValueError(f"the {optimizer_name} does not train {', '.join(missing[:5])}")
        if len(ids) != len(wanted):
            raise ValueError(f"the {optimizer_name} holds parameters that are not its own")


def at_least_float(x: Tensor) -> Tensor:
    """Half precision as float32, in which losses are computed; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class Meter:
    """Running mean of a loss and accuracy; sums stay on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, outputs: Tensor, labels: Tensor) -> None:
        """Shapes: loss (), outputs (N, num_classes), labels (N,)."""
        correct = (outputs.argmax(dim=1) == labels).sum()
        size = torch.tensor(len(labels), device=loss.device)
        self.sums += torch.stack([loss.detach().double() * size, correct.double(), size.double()])

    def read(self, accelerator: Accelerator) -> tuple[float, float]:
        """(mean loss, accuracy in percent) over all processes; (nan, nan) when empty."""
        loss, correct, size = accelerator.reduce(self.sums.clone(), reduction="sum").tolist()
        return (loss / size, 100 * correct / size) if size else (float("nan"), float("nan"))

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
