"""Measuring a network on labelled images, and the batch-norm statistics it needs for that."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from supernet.mixed_ops.base import Weights

Batches = Iterable[tuple[Tensor, Tensor]]


@torch.no_grad()
def evaluate(
    network: nn.Module,
    loader: Batches,
    accelerator: Accelerator | None = None,
    weights: Weights | None = None,
) -> tuple[float, float]:
    """Accuracy and mean cross-entropy over everything `loader` yields, in evaluation mode.

    Args:
        network: plain, not wrapped for several processes; left in the mode it came in.
        loader: yields images (N, C, H, W) and labels (N,), on the network's device.
        accelerator: gives the precision (None: the network's own); with several processes each
            passes its own part of the data, and all get the figures of the whole.
        weights: of a supernet's choices; None for a derived network.

    Returns:
        (accuracy in percent, loss).

    Raises:
        ValueError: `loader` is empty.
    """
    was_training = network.training
    network.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=next(network.parameters()).device)
    for images, labels in loader:
        with accelerator.autocast() if accelerator else nullcontext():
            logits = _forward(network, images, weights)
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(dim=1) == labels).sum()
        totals += torch.stack((loss.double(), correct.double(), totals.new_tensor(len(labels))))
    network.train(was_training)
    if accelerator:
        totals = accelerator.reduce(totals, reduction="sum")
    loss_sum, num_correct, count = totals.tolist()
    if count == 0:
        raise ValueError("there is not one image to evaluate on; give a larger share or data set")
    return 100.0 * num_correct / count, loss_sum / count


@torch.no_grad()
def recalibrate_bn(network: nn.Module, batches: Batches, weights: Weights | None = None) -> None:
    """Replace every batch norm's running statistics by the mean over `batches`.

    A network with shared or inherited weights has statistics of other paths. The running mean and
    variance (unbiased) become the plain average of the batches' own. Only batch norms are put in
    training mode, so that dropout stays off; modes and momenta are restored.

    Args:
        network: on the device of `batches`.
        batches: of images (N, C, H, W) and labels, which are not used.
        weights: of a supernet's choices; None for a derived network.

    Raises:
        ValueError: there is no batch; the statistics are lost then.
    """
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    modes = [(module, module.training) for module in network.modules()]
    momenta = [norm.momentum for norm in norms]
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative average
        norm.train()
    count = 0
    for images, _ in batches:
        _forward(network, images, weights)
        count += 1
    for module, training in modes:
        module.training = training
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    if count == 0:
        raise ValueError("batch-norm statistics need at least one batch of images")


def _forward(network: nn.Module, images: Tensor, weights: Weights | None) -> Tensor:
    logits: Tensor = network(images) if weights is None else network(images, weights)
    return logits
