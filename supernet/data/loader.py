"""Batches of a split: which images, in which order, on which rank."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from supernet.data.counter import Draw, permutation
from supernet.data.sources import Batch, Request, Split


class Loader:
    """The batches of every epoch, each a function of (epoch, index) alone.

    Training: an epoch's order is a permutation by (seed, epoch), of which rank r takes every
    world_size-th image from the r-th on; up to world_size - 1 images are left out so that all
    ranks have equally many. An image's augmentation depends on (seed, epoch, its position in the
    source) alone. A batch size above what a rank has gives one smaller batch.
    Evaluation: the split's own order, every image once, on some rank.

    Args:
        split: the images.
        batch_size: images in a batch on this rank.
        seed: of the orders and of the augmentation; the same on all ranks.
        train: shuffle and augment.
        device: where batches are put.
        rank, world_size: this process among those that share the epoch.
        drop_last: leave out an epoch's last batch if it is smaller, unless it is the only one;
            None does so in training.
        augment: augment or not; None does so in training.

    Raises:
        ValueError: fewer images than ranks, or a number out of range.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        train: bool,
        device: torch.device | str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        drop_last: bool | None = None,
        augment: bool | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r} must be 1 or more")
        if not 0 <= rank < world_size:
            raise ValueError(f"{rank=} must be at least 0 and below {world_size=}")
        if len(split) < world_size:
            raise ValueError(f"{len(split)} images are too few for {world_size} processes")
        self.split, self.batch_size, self.seed, self.train = split, batch_size, seed, train
        self.device = torch.device(device)
        self.rank, self.world_size = rank, world_size
        self.augment = train if augment is None else augment
        drop_last = train if drop_last is None else drop_last
        size = len(self.order(0))
        whole, rest = divmod(size, batch_size)
        self._num_batches = whole + bool(rest and not (drop_last and whole))

    def __len__(self) -> int:
        """Batches of an epoch on this rank; equal on all ranks in training."""
        return self._num_batches

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Positions in the source that this rank sees in an epoch, in order."""
        if not self.train:
            return self.split.indices[self.rank :: self.world_size]
        shuffled = self.split.indices[permutation(len(self.split), self.seed, epoch, Draw.ORDER)]
        shared = len(shuffled) - len(shuffled) % self.world_size
        return shuffled[self.rank : shared : self.world_size]

    def batch(self, epoch: int, index: int) -> Batch:
        """Make one batch, here and now.

        Returns:
            Images, float32 (N, C, H, W), normalised; labels, int64 (N,); both on the device.
        """
        assert 0 <= index < len(self), (index, len(self))
        return self.split.source.batch(self._request(self.order(epoch), epoch, index), self.device)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of epoch 0: a pass over the images."""
        order = self.order(0)
        requests = (self._request(order, 0, index) for index in range(len(self)))
        return self.split.source.batches(requests, self.device)

    def batches(self, epoch: int, index: int) -> Iterator[Batch]:
        """Endless batches from batch `index` of `epoch` on, made ahead where workers make them."""
        return self.split.source.batches(self._requests(epoch, index), self.device)

    def _requests(self, epoch: int, index: int) -> Iterator[Request]:
        for current in itertools.count(epoch):
            order = self.order(current)
            for position in range(index if current == epoch else 0, len(self)):
                yield self._request(order, current, position)

    def _request(self, order: NDArray[np.int64], epoch: int, index: int) -> Request:
        indices = order[index * self.batch_size : (index + 1) * self.batch_size]
        return Request(indices, epoch, self.seed, self.augment)


class Stream:
    """Endless batches of a loader. `epoch` and `position`, which name the batch that `next`
    returns, are the whole state.

    Attributes:
        wait_seconds: wall time spent in `next` so far, in seconds.
    """

    def __init__(self, loader: Loader) -> None:
        self.loader = loader
        self.epoch = 0
        self.position = 0
        self.wait_seconds = 0.0
        self._batches: Iterator[Batch] | None = None
        self._peeked: Batch | None = None

    def next(self) -> Batch:
        """Images and labels of the batch at (epoch, position); then move on."""
        batch, self._peeked = self.peek(), None
        self.position += 1
        if self.position == len(self.loader):
            self.epoch, self.position = self.epoch + 1, 0
        return batch

    def peek(self) -> Batch:
        """The batch that `next` returns, without moving on."""
        start = time.perf_counter()
        if self._batches is None:
            self._batches = self.loader.batches(self.epoch, self.position)
        if self._peeked is None:
            self._peeked = next(self._batches)
        self.wait_seconds += time.perf_counter() - start
        return self._peeked

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            ValueError: not a stream's state, or one of a loader with fewer batches.
        """
        if set(state) != {"epoch", "position"} or not all(
            isinstance(value, int) and value >= 0 for value in state.values()
        ):
            raise ValueError(f"not the state of a data stream: {dict(state)!r}")
        if state["position"] >= len(self.loader):
            raise ValueError(
                f"the data stream was saved at batch {state['position']} of an epoch, but an epoch "
                f"has {len(self.loader)} batches here; resume with the same data and batch size"
            )
        self.epoch, self.position = state["epoch"], state["position"]
        self._batches = self._peeked = None
