"""scikit-learn's digits: 1,797 real handwritten digits of 8x8 pixels that come with the package."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.datasets import load_digits

from supernet.data.base import Data
from supernet.data.records import ArrayRecords
from supernet.data.transforms import Augment

NUM_TEST = 360


class Digits(Data):
    """What `sklearn.datasets.load_digits` returns; its last 360 images are the test set.

    Args:
        img_size: the 8x8 images are enlarged to this side, once.
        pad, hflip, cutout, auto_augment: see `Augment`.
        mean, std, train_limit, test_limit: see `Data`.
    """

    def __init__(
        self,
        *,
        img_size: int = 32,
        pad: int = 2,
        hflip: bool = False,
        cutout: int = 0,
        auto_augment: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
    ) -> None:
        super().__init__(
            in_chans=1,
            img_size=img_size,
            augment=Augment(pad, hflip, cutout, auto_augment),
            mean=mean,
            std=std,
            train_limit=train_limit,
            test_limit=test_limit,
        )

    def _read(self, train: bool) -> ArrayRecords:
        digits = load_digits()
        part = slice(None, -NUM_TEST) if train else slice(-NUM_TEST, None)
        images = np.rint(digits.images[part] * (255 / 16)).astype(np.uint8)  # from 0..16
        return ArrayRecords(images, digits.target[part], tuple(map(str, range(10))))
