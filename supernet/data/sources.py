"""Images ready to be made into batches: held in memory, or decoded by workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from supernet.data.counter import Draw, hash64, seeded
from supernet.data.records import ArrayRecords, Records
from supernet.data.transforms import Augment, fit, normalize

_CHUNK = 128  # images decoded or counted at once
_CHUNKS_PER_WORKER = 16  # fewer are decoded faster than a process starts


@dataclass(frozen=True)
class Request:
    """One batch to make.

    Attributes:
        indices: shape (N,), positions in the source.
        epoch, seed: what the augmentation depends on besides the position.
        augment: whether to augment.
    """

    indices: NDArray[np.int64]
    epoch: int
    seed: int
    augment: bool


Batch = tuple[Tensor, Tensor]  # float32 (N, C, H, W) normalised; int64 (N,)


class Source(ABC):
    """The training set or the test set, never both.

    Args:
        labels: shape (num_images,).
        mean, std: of each channel, for pixel values in [0, 1].
    """

    def __init__(
        self, labels: NDArray[np.int64], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        self.labels = torch.from_numpy(labels)
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def batch(self, request: Request, device: torch.device) -> Batch:
        """Make one batch, here and now."""

    @abstractmethod
    def batches(self, requests: Iterable[Request], device: torch.device) -> Iterator[Batch]:
        """Make the batches of a plan, which may be endless, in its order."""


class MemorySource(Source):
    """All images as one uint8 tensor, augmented by the batch on the batch's device.

    Args:
        images: uint8, shape (N, C, H, W).
    """

    def __init__(
        self,
        images: Tensor,
        labels: NDArray[np.int64],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        augment: Augment,
    ) -> None:
        assert images.dtype == torch.uint8 and len(images) == len(labels), images.shape
        super().__init__(labels, mean, std)
        self.images = images
        self.augment = augment

    def batch(self, request: Request, device: torch.device) -> Batch:
        indices = torch.from_numpy(request.indices)
        images, erase = self.images[indices].to(device), None
        if request.augment:
            images, erase = self.augment(images, request.indices, request.seed, request.epoch)
        return normalize(images, self.mean, self.std, erase), self.labels[indices].to(device)

    def batches(self, requests: Iterable[Request], device: torch.device) -> Iterator[Batch]:
        return (self.batch(request, device) for request in requests)


class FileSource(Source):
    """Images decoded when they are asked for, by worker processes that work ahead.

    Args:
        records: the images.
        in_chans, img_size: of what comes out.
        train_transform: PIL image to uint8 (C, H, W), drawing from the global generators.
        num_workers: processes a running plan keeps; 0 decodes in this process.
    """

    def __init__(
        self,
        records: Records,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        *,
        in_chans: int,
        img_size: int,
        train_transform: Callable[[Image.Image], Tensor],
        num_workers: int,
    ) -> None:
        super().__init__(records.labels, mean, std)
        self.num_workers = num_workers
        self.dataset = _Decode(records, in_chans, img_size, train_transform)

    def batch(self, request: Request, device: torch.device) -> Batch:
        return self._finish(*self.dataset[request], device)

    def batches(self, requests: Iterable[Request], device: torch.device) -> Iterator[Batch]:
        loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
            self.dataset,
            batch_size=None,  # a request is a whole batch
            sampler=requests,
            num_workers=self.num_workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else it draws from the global one
        )
        return (self._finish(images, labels, device) for images, labels in loader)

    def _finish(self, images: Tensor, labels: Tensor, device: torch.device) -> Batch:
        images = images.to(device, non_blocking=True)
        return normalize(images, self.mean, self.std), labels.to(device, non_blocking=True)


class _Decode(Dataset[tuple[Tensor, Tensor]]):
    """Request -> uint8 (N, C, H, W) and labels; what a worker process holds."""

    def __init__(
        self,
        records: Records,
        in_chans: int,
        img_size: int,
        train_transform: Callable[[Image.Image], Tensor] | None = None,
    ) -> None:
        self.records = records
        self.in_chans, self.img_size = in_chans, img_size
        self.train_transform = train_transform

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor]:
        images = []
        bits = hash64(request.seed, request.epoch, request.indices, Draw.ITEM)
        for index, seed in zip(request.indices, bits, strict=True):
            image = self.records.image(int(index))
            if request.augment:
                assert self.train_transform is not None
                with seeded(int(seed)):
                    images.append(self.train_transform(image))
            else:
                images.append(fit(image, self.in_chans, self.img_size))
        return torch.stack(images), torch.from_numpy(self.records.labels[request.indices])


@dataclass(frozen=True)
class Split:
    """Some images of a source.

    Attributes:
        source: the training set or the test set.
        indices: positions in the source, ascending.
    """

    source: Source
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def labels(self) -> Tensor:
        """int64, shape (len(self),)."""
        return self.source.labels[torch.from_numpy(self.indices)]


def decode_all(records: Records, in_chans: int, img_size: int, num_workers: int) -> Tensor:
    """Every image as evaluation sees it before it is normalised: uint8 (N, C, H, W)."""
    images = torch.empty(len(records), in_chans, img_size, img_size, dtype=torch.uint8)
    if isinstance(records, ArrayRecords):
        pixels = torch.from_numpy(records.images).view(*records.images.shape[:3], -1)
        if pixels.shape[1:] == (img_size, img_size, in_chans):
            return images.copy_(pixels.permute(0, 3, 1, 2))
    chunks = np.split(np.arange(len(records)), range(_CHUNK, len(records), _CHUNK))
    loader: DataLoader[tuple[Tensor, Tensor]] = DataLoader(
        _Decode(records, in_chans, img_size),
        batch_size=None,
        sampler=[Request(chunk, epoch=0, seed=0, augment=False) for chunk in chunks],
        num_workers=min(num_workers, len(chunks) // _CHUNKS_PER_WORKER),
        generator=torch.Generator(),
    )
    for chunk, (pixels, _) in zip(chunks, loader, strict=True):
        images[chunk[0] : chunk[-1] + 1] = pixels
    return images


def statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 (N, C, H, W), in [0, 1], exact."""
    counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
    for chunk in images.split(_CHUNK):
        for channel, row in enumerate(counts):
            row += torch.bincount(chunk[:, channel].flatten(), minlength=256)
    values = torch.arange(256, dtype=torch.float64) / 255
    total = counts.sum(1)
    mean = (counts * values).sum(1) / total
    std = ((counts * (values - mean[:, None]) ** 2).sum(1) / total).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())
