"""Training one derived network, from scratch or from inherited weights, in one folder."""

from __future__ import annotations

import logging
import math
import os
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from supernet.choice import Architecture
from supernet.data import Data, Loader, Split, Stream
from supernet.engine import make_accelerator
from supernet.evaluate import evaluate, recalibrate_bn
from supernet.learner import Learner
from supernet.network import Network
from supernet.recipe import Recipe, seeded
from supernet.space import SearchSpace
from supernet.strategies.base import Run
from supernet.tracking import NoTracker, Tracker
from supernet.weights_file import save_network

log = logging.getLogger(__name__)

BN_IMAGES = 2000  # what recalibration reads, as in Once-for-All (Cai et al. 2020)


def retrain(
    architecture: Architecture,
    data: Data,
    recipe: Recipe,
    run_dir: str | os.PathLike[str],
    *,
    name: str = "derived",
    seed: int = 0,
    network: Network | None = None,
    accelerator: Accelerator | None = None,
    tracker: Tracker | None = None,
    resume: bool = False,
    checkpoint_every: int = 500,
) -> dict[str, Any]:
    """Train one network, choose its best epoch on held-out training images, then test it once.

    The folder receives `metrics.jsonl`, `timing.jsonl`, `best.safetensors`, `last.safetensors` and
    `checkpoint/`; in a run of several processes, from the first of them alone.

    Args:
        architecture: what to train.
        data: where the images come from; the test set is read once, at the end.
        recipe: how to train.
        run_dir: folder of this network alone.
        name: of the network, for logs and the result.
        seed: of initialisation, data order, split and augmentation.
        network: holds inherited weights, whose batch norms are recalibrated here; it is trained in
            place and ends with the best weights. None starts from scratch.
        accelerator: processes, device and precision; by default made for the recipe.
        tracker: mirrors the metrics.
        resume: continue from the folder's checkpoint where there is one; on the CPU the result is
            that of a run that was never interrupted. A finished network is not trained again.
        checkpoint_every: steps between checkpoints; one more is made at each epoch's end.

    Returns:
        JSON values: name, accuracy (test, percent), test_loss, val_accuracy, val_loss, best_epoch,
        weights ("network", or "ema" where the moving average was better), init,
        init_val_accuracy (before training; None from scratch), epochs, params, architecture
        {choice: option}, seconds.

    Raises:
        ValueError: architecture, data, recipe or checkpoint do not go together.
        Diverged: the loss is not finite.
    """
    accelerator = accelerator or make_accelerator(recipe.mixed_precision)
    if accelerator.mixed_precision != recipe.mixed_precision:
        raise ValueError(
            f"recipe.mixed_precision is {recipe.mixed_precision!r}, but the accelerator was made "
            f"for {accelerator.mixed_precision!r}; make it for the recipe's"
        )
    run = Run(
        folder=Path(run_dir),
        main=accelerator.is_main_process,
        tracker=tracker or NoTracker(),
        resume=resume,
        checkpoint_every=checkpoint_every,
        kind="retrain",
    )
    if run.main and not resume:
        run.checkpoint.unlink(missing_ok=True)  # a later resume must not find an older training
    state = run.load()
    training = _Training(architecture, data, recipe, run, name, seed, network, accelerator)
    try:
        return training.run_through(state)
    finally:
        accelerator.free_memory()  # else it keeps this network while the next one is trained


class _Training:
    """One retraining; its `state_dict` is all there is to resume from."""

    def __init__(
        self,
        architecture: Architecture,
        data: Data,
        recipe: Recipe,
        run: Run,
        name: str,
        seed: int,
        network: Network | None,
        accelerator: Accelerator,
    ) -> None:
        self.architecture, self.data, self.recipe, self.run = architecture, data, recipe, run
        self.name, self.seed, self.accelerator = name, seed, accelerator
        self.identity = {  # what a checkpoint must agree with
            "architecture": architecture.to_dict(),
            "data": data.info.to_dict(),
            "recipe": asdict(recipe),
            "seed": seed,
            "init": "scratch" if network is None else "inherit",
            "processes": accelerator.num_processes,
        }
        train, val = data.retrain_splits(seed, recipe.val_share)
        if len(train) // accelerator.num_processes < recipe.batch_size:
            raise ValueError(
                f"{len(train)} training images do not fill one batch of {recipe.batch_size} in "
                f"each of {accelerator.num_processes} process(es); lower recipe.batch_size"
            )
        self.val = self._loader(val, train=False)
        self.stream = Stream(self._loader(train, train=True))
        self.steps = len(self.stream.loader)  # an epoch
        network = self._build() if network is None else network
        self._check_network(network)
        self.learner = Learner(network, recipe, self.steps, accelerator, seed)
        self.seconds = 0.0
        self.init_val_accuracy: float | None = None
        self.best: dict[str, Any] | None = None

    def _loader(self, split: Split, train: bool) -> Loader:
        return Loader(
            split,
            batch_size=self.recipe.batch_size,
            seed=self.seed,
            train=train,
            device=self.accelerator.device,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
        )

    def _build(self) -> Network:
        space = SearchSpace.of(self.architecture)
        with seeded(self.seed):
            return space.build_network(self.architecture, self.data.info.num_classes)

    def _check_network(self, network: Network) -> None:
        info = self.data.info
        for what, theirs, ours in (
            ("input channels", network.in_chans, info.in_chans),
            ("classes", network.num_classes, info.num_classes),
        ):
            if theirs != ours:
                raise ValueError(
                    f"the network has {theirs} {what}, the data {ours}; "
                    "retrain on the data the architecture was searched for, or on like data"
                )

    def run_through(self, state: dict[str, Any] | None) -> dict[str, Any]:
        """Train from the state to the end and test; the result is kept in the checkpoint."""
        if state is not None:
            self._load(state)
            if state["entry"] is not None:
                return dict(state["entry"])
        elif self.identity["init"] == "inherit":
            self._recalibrate()
        test = self.data.test_split()  # asked for early: a set that does not fit fails here
        self.train()
        entry = self._test(test)
        self.run.save(self.state_dict(entry))
        self.accelerator.wait_for_everyone()
        return entry

    def _recalibrate(self) -> None:
        loader, learner = self.stream.loader, self.learner
        images = self.recipe.batch_size * self.accelerator.num_processes
        count = min(self.steps, math.ceil(BN_IMAGES / images))
        recalibrate_bn(learner.network, islice(loader.batches(0, 0), count))
        learner.average_buffers()
        learner.reset_ema()
        self.init_val_accuracy = evaluate(learner.network, self.val, self.accelerator)[0]

    def train(self) -> None:
        """Run from the present step to the last, with a line and a checkpoint an epoch."""
        learner, run = self.learner, self.run
        self._start_clock()
        for epoch in range(learner.step // self.steps, learner.epochs):
            learner.network.train()
            end = (epoch + 1) * self.steps
            title = f"{self.name} {epoch + 1}/{learner.epochs}"
            with run.progress(self.steps, self.steps - end + learner.step, title) as bar:
                while learner.step < end:
                    learner.take_step(*self.stream.next())
                    bar.update()
                    if learner.step % run.checkpoint_every == 0 and learner.step < end:
                        run.save(self.state_dict())
            self.end_epoch(epoch)
            run.save(self.state_dict())

    def end_epoch(self, epoch: int) -> None:
        """Validate, keep the best, log, and set the next epoch's learning rate."""
        learner = self.learner
        learner.average_buffers()
        loss, accuracy = learner.meter.read(self.accelerator)
        val_accuracy, val_loss = self._validate("network", learner.network, epoch)
        ema_accuracy = ema_loss = None
        if learner.ema is not None:
            ema_accuracy, ema_loss = self._validate("ema", learner.ema, epoch)
        record = {
            "step": learner.step,
            "epoch": epoch + 1,
            "phase": "retrain",
            "train_loss": loss,
            "train_accuracy": accuracy,
            "val_loss": val_loss,
            "val_accuracy": val_accuracy,
            "ema_val_loss": ema_loss,
            "ema_val_accuracy": ema_accuracy,
            "learning_rate": learner.learning_rate,
        }
        timing = self._timing()
        self.run.log(record, timing)
        log.info(_line(self.name, learner.epochs, record, timing["seconds"]))
        learner.end_epoch(epoch, val_accuracy)

    def _validate(self, weights: str, network: Network, epoch: int) -> tuple[float, float]:
        """(accuracy in percent, loss) on the held-out part; the best so far is kept and written.

        Among equal accuracies the lower loss is better.
        """
        accuracy, loss = evaluate(network, self.val, self.accelerator)
        best = self.best
        if best is None or (accuracy, -loss) > (best["val_accuracy"], -best["val_loss"]):
            state = {k: v.to("cpu", copy=True) for k, v in network.state_dict().items()}
            figures = {
                "val_accuracy": accuracy,
                "val_loss": loss,
                "best_epoch": epoch + 1,
                "weights": weights,
            }
            self.best = {**figures, "state": state}
            self._write("best", network, figures)
        return accuracy, loss

    def _write(self, file: str, network: Network, figures: dict[str, Any]) -> None:
        if self.run.main:
            meta = {"data": self.identity["data"], "name": self.name, "seed": self.seed, **figures}
            path = self.run.folder / f"{file}.safetensors"
            save_network(path, network, self.architecture, meta)

    def _test(self, test: Split) -> dict[str, Any]:
        """Evaluate the best weights on the test set, once."""
        network, best = self.learner.network, self.best
        assert best is not None
        self._write("last", network, {"weights": "network", "epoch": self.learner.epochs})
        network.load_state_dict(best["state"])
        accuracy, loss = evaluate(network, self._loader(test, train=False), self.accelerator)
        log.info("%s: test accuracy %.2f%%", self.name, accuracy)
        return {
            "name": self.name,
            "accuracy": accuracy,
            "test_loss": loss,
            **{key: value for key, value in best.items() if key != "state"},
            "init": self.identity["init"],
            "init_val_accuracy": self.init_val_accuracy,
            "epochs": self.learner.epochs,
            "params": sum(parameter.numel() for parameter in network.parameters()),
            "architecture": dict(self.architecture),
            "seconds": self.seconds,
        }

    def _start_clock(self) -> None:
        self.started, self.waited = time.perf_counter(), self.stream.wait_seconds
        self.first_step = self.learner.step

    def _timing(self) -> dict[str, Any]:
        """Wall-clock of the epoch (of its part since a resume)."""
        seconds = time.perf_counter() - self.started
        timing = {
            "seconds": seconds,
            "steps_per_second": (self.learner.step - self.first_step) / seconds,
            "wait_share": (self.stream.wait_seconds - self.waited) / seconds,
        }
        self.seconds += seconds
        self._start_clock()
        return timing

    def state_dict(self, entry: dict[str, Any] | None = None) -> dict[str, Any]:
        """What a checkpoint holds; `entry` is the result of a finished training."""
        return {
            "identity": self.identity,
            "learner": self.learner.state_dict(),
            "stream": self.stream.state_dict(),
            "seconds": self.seconds + time.perf_counter() - self.started,
            "init_val_accuracy": self.init_val_accuracy,
            "best": self.best,
            "entry": entry,
        }

    def _load(self, state: dict[str, Any]) -> None:
        theirs = state.get("identity", {})
        if differ := [key for key in self.identity if theirs.get(key) != self.identity[key]]:
            raise ValueError(
                f"{self.run.checkpoint} is of another retraining: "
                + "; ".join(f"{k} was {theirs.get(k)}, is {self.identity[k]}" for k in differ)
                + "; resume with what it was started with, or choose another folder"
            )
        self.learner.load_state_dict(state["learner"])
        self.stream.load_state_dict(state["stream"])
        self.seconds, self.init_val_accuracy = state["seconds"], state["init_val_accuracy"]
        self.best = state["best"]
        log.info(
            "%s: resuming at step %d of %d",
            self.name,
            self.learner.step,
            self.learner.epochs * self.steps,
        )


def _line(name: str, epochs: int, record: dict[str, Any], seconds: float) -> str:
    ema = record["ema_val_accuracy"]
    return (
        f"{name} {record['epoch']}/{epochs}: train loss {record['train_loss']:.4f}, "
        f"train {record['train_accuracy']:.2f}%, validation {record['val_accuracy']:.2f}%"
        + ("" if ema is None else f" (average {ema:.2f}%)")
        + f", {seconds:.1f} s"
    )
