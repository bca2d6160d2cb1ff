"""How a derived network is trained: the settings, and what they make of a batch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.data.random_erasing import RandomErasing
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn

from supernet.checkpoint import rng_state, set_rng_state
from supernet.engine import PRECISIONS


@dataclass(frozen=True)
class Recipe:
    """Settings of a training.

    Args:
        epochs: passes over the training part (the schedule's cooldown or cycles come on top).
        batch_size: images a step and process.
        optimizer: arguments of timm's `create_optimizer_v2`.
        scheduler: arguments of timm's `create_scheduler_v2`.
        label_smoothing: share of each target spread evenly over the classes.
        mixup: alpha of mixup; 0 for none.
        cutmix: alpha of CutMix; 0 for none. With both, either is drawn for each batch.
        erasing: probability that a rectangle of an image is erased.
        ema_decay: of a moving average of the weights, validated beside them; None for none.
        ema_warmup: let the decay grow from 0 (timm's schedule), for short trainings.
        clip_grad: largest norm of the gradient; None for no clipping.
        drop_rate: dropout before the classifier.
        drop_path: rate at which paths of cells are dropped in the end (Larsson et al. 2017); it
            grows linearly from 0, epoch by epoch.
        aux_weight: of the loss of the network's auxiliary classifier; 0 for none.
        val_share: share of the training set held out to choose the best epoch.
        mixed_precision: "no" (float32), "bf16" or "fp16".
        channels_last: memory format of the network and its inputs.

    Raises:
        ValueError: a value out of range, by name.
    """

    epochs: int
    batch_size: int
    optimizer: Mapping[str, Any] = field(default_factory=lambda: {"opt": "sgd", "lr": 0.05})
    scheduler: Mapping[str, Any] = field(default_factory=lambda: {"sched": "cosine"})
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0
    ema_decay: float | None = None
    ema_warmup: bool = True
    clip_grad: float | None = None
    drop_rate: float = 0.0
    drop_path: float = 0.0
    aux_weight: float = 0.0
    val_share: float = 0.1
    mixed_precision: str = "no"
    channels_last: bool = False

    def __post_init__(self) -> None:
        even = self.batch_size % 2 == 0 or not self.mixes
        warmup = self.scheduler.get("warmup_epochs", 0)
        for name, valid, wanted in (
            ("epochs", self.epochs >= 1, "1 or more"),
            ("batch_size", self.batch_size >= 1, "1 or more"),
            ("batch_size", even, "even with mixup or cutmix, which pair the images of a batch"),
            ("scheduler", warmup < self.epochs, f"warmed up before its {self.epochs} epochs end"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "from 0 to below 1"),
            ("mixup", self.mixup >= 0, "0 or more"),
            ("cutmix", self.cutmix >= 0, "0 or more"),
            ("erasing", 0 <= self.erasing <= 1, "from 0 to 1"),
            ("ema_decay", self.ema_decay is None or 0 < self.ema_decay < 1, "between 0 and 1"),
            ("clip_grad", self.clip_grad is None or self.clip_grad > 0, "above 0, or null"),
            ("drop_rate", 0 <= self.drop_rate < 1, "from 0 to below 1"),
            ("drop_path", 0 <= self.drop_path < 1, "from 0 to below 1"),
            ("aux_weight", self.aux_weight >= 0, "0 or more"),
            ("val_share", 0 < self.val_share < 1, "between 0 and 1"),
            ("mixed_precision", self.mixed_precision in PRECISIONS, ", ".join(PRECISIONS)),
        ):
            if not valid:
                raise ValueError(f"recipe.{name} is {getattr(self, name)!r}; it must be {wanted}")

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def make_optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        """timm's optimizer; one-dimensional parameters (biases, norms) do not decay.

        Raises:
            ValueError: an unknown optimizer or argument.
        """
        try:
            return create_optimizer_v2(network, **self.optimizer)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"recipe.optimizer={dict(self.optimizer)} is refused by timm: {error}"
            ) from error

    def make_scheduler(
        self, optimizer: torch.optim.Optimizer, steps_per_epoch: int
    ) -> tuple[Scheduler | None, int]:
        """timm's scheduler (None for a constant rate), and the epochs it asks for.

        Raises:
            ValueError: an unknown schedule or argument.
        """
        settings = {"updates_per_epoch": steps_per_epoch, **self.scheduler}
        try:
            scheduler, epochs = create_scheduler_v2(optimizer, num_epochs=self.epochs, **settings)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"recipe.scheduler={dict(self.scheduler)} is refused by timm: {error}"
            ) from error
        return scheduler, int(epochs)


class BatchAugmentation:
    """What is done to a whole training batch: random erasing, then mixup or CutMix.

    Draws from the global generators: call it within `seeded`.
    """

    def __init__(self, recipe: Recipe, num_classes: int, device: torch.device) -> None:
        self.num_classes, self.smoothing = num_classes, recipe.label_smoothing
        self.erase = RandomErasing(recipe.erasing, mode="pixel", device=device)
        self.mix = (
            Mixup(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                label_smoothing=recipe.label_smoothing,
                num_classes=num_classes,
            )
            if recipe.mixes
            else None
        )

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images (N, C, H, W), changed in place, and labels (N,) -> targets (N, num_classes)."""
        if self.erase.probability > 0:
            images = self.erase(images)
        if self.mix is not None:
            images, targets = self.mix(images, labels)
        else:
            targets = mixup_target(labels, self.num_classes, smoothing=self.smoothing)
        return images, targets


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Within the block, the global generators (Python, numpy, torch) start from `key`; afterwards
    they go on as if the block had not been. What is drawn depends on the key alone, so that a
    resumed training draws the same.
    """
    before = rng_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    try:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 1 ms without a GPU
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed)
        yield
    finally:
        set_rng_state(before)
