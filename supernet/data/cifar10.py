"""CIFAR-10 (Krizhevsky 2009): 60,000 colour images of 32x32 pixels in ten classes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from torchvision.datasets import CIFAR10

from supernet.data.base import Data
from supernet.data.download import downloaded
from supernet.data.records import ArrayRecords
from supernet.data.transforms import Augment


class Cifar10(Data):
    """torchvision's CIFAR-10, downloaded when it is missing.

    Its files are pickles; torchvision opens only those whose checksum it knows.

    Args:
        root: folder with, or for, `cifar-10-batches-py`; None is the cache folder.
        img_size: other sizes than 32 are resized to, once.
        pad, hflip, cutout, auto_augment: see `Augment`.
        mean, std, train_limit, test_limit: see `Data`.
    """

    def __init__(
        self,
        *,
        root: str | os.PathLike[str] | None = None,
        img_size: int = 32,
        pad: int = 4,
        hflip: bool = True,
        cutout: int = 0,
        auto_augment: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> None:
        super().__init__(
            in_chans=3,
            img_size=img_size,
            augment=Augment(pad, hflip, cutout, auto_augment),
            mean=mean,
            std=std,
            train_limit=train_limit,
            test_limit=test_limit,
        )
        self.root = root

    def _read(self, train: bool) -> ArrayRecords:
        dataset = downloaded(
            partial(_load, train=train),
            self.root,
            "CIFAR-10",
            "put the extracted folder cifar-10-batches-py there, choose another folder by "
            "data.root, or read PNG or JPEG files with data=image_folder",
        )
        return ArrayRecords(dataset.data, np.array(dataset.targets), tuple(dataset.classes))


def _load(root: Path, train: bool) -> CIFAR10:
    return CIFAR10(str(root), train=train, download=True)
