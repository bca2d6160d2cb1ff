"""Second-order DARTS (Liu et al. 2019, section 2.3, equations 7 and 8)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from supernet.engine import at_least_float
from supernet.mixed_ops.base import PathWeights, Sample
from supernet.strategies.base import Run
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.state import SearchState

PERTURBATION = 0.01  # the norm by which finite differences move the weights


class SecondOrder(FirstOrder):
    """The logits' gradient is taken at the weights after one virtual step on the weight half.

    With w' = w - xi grad_w L_train(w, a), the gradient of L_val(w'(a), a) in the logits a is
    grad_a L_val(w', a) - xi grad^2_{a,w} L_train(w, a) grad_{w'} L_val(w', a). The product is a
    finite difference of grad_a L_train at w +- eps grad_{w'} L_val, eps = 0.01 / its norm. xi is
    the weights' learning rate; the virtual step has their momentum and decay, as the authors' code
    does, and so it needs SGD without Nesterov's form. Its batch is that of the weights' next step,
    as there. A step costs four passes in place of one.

    Arguments: as `FirstOrder`.
    """

    def train(self, state: SearchState, run: Run) -> None:
        _check_optimizer(state.weight_optimizer.optimizer)
        super().train(state, run)

    def task_loss(
        self, state: SearchState, sample: Sample, images: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        supernet = state.problem.supernet
        train_images, train_labels = state.weight_stream.peek()  # of the weights' step to come
        train_images = train_images.to(memory_format=self.memory_format)
        parameters = list(supernet.parameters())
        weights, values = _leaves(sample)

        def loss_of(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            with state.problem.accelerator.autocast():
                outputs = supernet(x, weights)
            return cross_entropy(at_least_float(outputs), y), outputs

        def gradient(inputs: Sequence[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
            return _gradients(loss_of(x, y)[0], inputs)

        with _restored(supernet), _trainable(parameters):
            steps = _virtual_steps(state, gradient(parameters, train_images, train_labels))
            rate = state.weight_optimizer.param_groups[0]["lr"]
            _move(parameters, steps, -rate)
            loss, outputs = loss_of(images, labels)
            found = _gradients(loss, [*values, *parameters])
            direct, direction = found[: len(values)], found[len(values) :]
            _move(parameters, steps, rate)
            norm = torch.stack([d.norm() for d in direction]).norm()
            eps = PERTURBATION / float(norm.clamp(min=1e-12))
            _move(parameters, direction, eps)
            above = gradient(values, train_images, train_labels)
            _move(parameters, direction, -2 * eps)
            below = gradient(values, train_images, train_labels)
        total = loss.detach()
        own = [path.values for path in sample.weights.values() if path.values is not None]
        for value, first, up, down in zip(own, direct, above, below, strict=True):
            second = (up - down) / (2 * eps)
            # zero, with this gradient
            total = total + ((value - value.detach()) * (first - rate * second)).sum()
        return total, outputs


def _leaves(sample: Sample) -> tuple[dict[str, PathWeights], list[Tensor]]:
    """The weights cut off from the logits, and their values, to be differentiated in."""
    weights = {
        name: path
        if path.values is None
        else replace(path, values=path.values.detach().requires_grad_())
        for name, path in sample.weights.items()
    }
    return weights, [path.values for path in weights.values() if path.values is not None]


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(inputs), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer of the weights whose step is not the virtual one.

    Raises:
        ValueError: says what to set.
    """
    needed = "strategy=second_order needs SGD with plain momentum for its weights: "
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError(
            needed + f"strategy.weight_optimizer.opt makes a {type(optimizer).__name__}; "
            "set it to momentum"
        )
    for name, plain in (("nesterov", False), ("dampening", 0)):
        if (value := optimizer.param_groups[0][name]) != plain:
            raise ValueError(
                needed + f"got {name}={value}; set strategy.weight_optimizer.opt=momentum "
                f"(sgd is Nesterov's form) and leave {name} at {plain}"
            )


def _virtual_steps(state: SearchState, gradients: Sequence[Tensor]) -> list[Tensor]:
    """What a step of the weights subtracts, over its rate: gradient, decay and momentum."""
    optimizer = state.weight_optimizer
    settings = {
        parameter: group for group in optimizer.param_groups for parameter in group["params"]
    }
    steps = []
    for parameter, gradient in zip(state.problem.supernet.parameters(), gradients, strict=True):
        group = settings[parameter]
        step = gradient + group.get("weight_decay", 0.0) * parameter.detach()
        moment = optimizer.state.get(parameter, {}).get("momentum_buffer")
        steps.append(step if moment is None else step + group["momentum"] * moment)
    return steps


@torch.no_grad()
def _move(parameters: Sequence[Tensor], directions: Sequence[Tensor], length: float) -> None:
    torch._foreach_add_(list(parameters), list(directions), alpha=length)


@contextmanager
def _trainable(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within the block, the parameters ask for gradients."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


@contextmanager
def _restored(supernet: nn.Module) -> Iterator[None]:
    """Parameters and buffers are afterwards, to the bit, what they were before."""
    tensors = [*supernet.parameters(), *supernet.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(tensors, before)
