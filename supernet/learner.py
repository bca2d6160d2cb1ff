"""A network in training by a recipe: optimizer, schedule, moving average, and the step itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor
from torch.nn.functional import cross_entropy

from supernet.engine import Diverged, Meter, average_buffers, holds_everywhere
from supernet.mixed_ops.base import Searchable
from supernet.network import Network, WithAuxiliary
from supernet.recipe import BatchAugmentation, Recipe, seeded


class Learner:
    """All that changes while a network is trained; `state_dict` is all there is to go on from.

    Args:
        network: to train in place; moved to the accelerator's device.
        steps_per_epoch: of this process.
        seed: of what augmentation and dropout draw.

    Attributes:
        network: plain, also where `accelerator` trains a wrapper of it.
        epochs: that the schedule asks for.
        step: steps done.
        meter: loss and accuracy of the steps since it was last set to zero. With mixed labels, a
            prediction counts where it is the larger part of the mix.
    """

    def __init__(
        self,
        network: Network,
        recipe: Recipe,
        steps_per_epoch: int,
        accelerator: Accelerator,
        seed: int,
    ) -> None:
        self.recipe, self.accelerator, self.seed = recipe, accelerator, seed
        self.network = network.to(accelerator.device).to(memory_format=recipe.memory_format)
        network.drop_rate = recipe.drop_rate
        self.steps_per_epoch = steps_per_epoch
        self._cells = _cells_to_drop(network) if recipe.drop_path else []
        # copied before Accelerate replaces the forward method
        self._ema = (
            ModelEmaV3(network, decay=recipe.ema_decay, use_warmup=recipe.ema_warmup)
            if recipe.ema_decay is not None
            else None
        )
        self._auxiliary: WithAuxiliary | None = None
        if recipe.aux_weight:
            with seeded(seed):
                self._auxiliary = WithAuxiliary(network).to(accelerator.device)
        trained = self._auxiliary or network
        optimizer = recipe.make_optimizer(trained)
        self.scheduler, self.epochs = recipe.make_scheduler(optimizer, steps_per_epoch)
        self._wrapped, self.optimizer = accelerator.prepare(trained, optimizer)
        self._augment = BatchAugmentation(recipe, network.num_classes, accelerator.device)
        self.meter = Meter(accelerator.device)
        self.step = 0

    @property
    def ema(self) -> Network | None:
        """The network of averaged weights."""
        return None if self._ema is None else self._ema.module

    @property
    def learning_rate(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def drop_path_rate(self) -> float:
        """Of the present epoch."""
        return self.recipe.drop_path * (self.step // self.steps_per_epoch) / self.epochs

    def take_step(self, images: Tensor, labels: Tensor) -> None:
        """One step of the optimizer, the moving average and the schedule.

        Args:
            images: (N, in_chans, H, W) on the device; changed in place.
            labels: (N,).

        Raises:
            Diverged: the loss is not finite in one of the processes, and then in all of them; the
                weights are as before the step.
        """
        for cell in self._cells:
            cell.drop_path_rate = self.drop_path_rate
        with seeded(self.seed, self.step, self.accelerator.process_index):
            images, targets = self._augment(images, labels)
            images = images.to(memory_format=self.recipe.memory_format)
            with self.accelerator.autocast():
                outputs = self._wrapped(images)
        extra: Tensor | float = 0.0
        if self._auxiliary is not None:
            outputs, others = outputs
            extra = self.recipe.aux_weight * cross_entropy(others.float(), targets)
        loss = cross_entropy(outputs.float(), targets) + extra
        finite = math.isfinite(value := loss.item())
        if not holds_everywhere(finite, self.accelerator):
            found = "not finite in another process" if finite else value
            raise Diverged(
                f"the training loss is {found} at step {self.step + 1}; "
                "lower recipe.optimizer.lr or set recipe.clip_grad"
            )
        self.step += 1
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        if self.recipe.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self._wrapped.parameters(), self.recipe.clip_grad)
        self.optimizer.step()
        if self._ema is not None:
            self._ema.update(self.network, step=self.step)
        if self.scheduler is not None:
            self.scheduler.step_update(self.step)
        self.meter.add(loss, outputs, targets.argmax(dim=1))

    def end_epoch(self, epoch: int, val_accuracy: float) -> None:
        """Set the rate of the next epoch; `epoch` counts from 0."""
        self.meter.sums.zero_()
        if self.scheduler is not None:
            self.scheduler.step(epoch + 1, val_accuracy)

    def average_buffers(self) -> None:
        """Agree with the other processes on running statistics, those of the average included."""
        for network in (self.network, self.ema):
            if network is not None:
                average_buffers(network, self.accelerator)

    def reset_ema(self) -> None:
        """Start the moving average from the network as it is."""
        if self._ema is not None:
            self._ema.set(self.network)

    def state_dict(self) -> dict[str, Any]:
        """For all processes; each must ask for it at the same step."""
        scaler = self.accelerator.scaler
        return {
            "step": self.step,
            "network": self.network.state_dict(),
            "auxiliary": self._auxiliary and self._auxiliary.head.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "meter": self.accelerator.reduce(self.meter.sums, reduction="sum"),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of a learner with the same network and recipe."""
        self.step = state["step"]
        self.network.load_state_dict(state["network"])
        if self._auxiliary is not None:
            self._auxiliary.head.load_state_dict(state["auxiliary"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.meter.sums.zero_()
        if self.accelerator.is_main_process:  # the state has the sum over the processes
            self.meter.sums.copy_(state["meter"])


def _cells_to_drop(network: Network) -> list[Searchable]:
    cells = [m for m in network.modules() if isinstance(m, Searchable)]
    if not (found := [cell for cell in cells if cell.drop_path_rate is not None]):
        raise ValueError("the network has no paths that could be dropped; set recipe.drop_path=0")
    return found
