"""Your own images: PNG and JPEG files in folders or tars, one folder a class."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from torch import Tensor

from supernet.data.base import Data
from supernet.data.records import Records, scan
from supernet.data.sources import FileSource, Source
from supernet.data.transforms import MODES, Augment

MAX_MEMORY = 2 * 1024**3  # bytes of decoded training images that are held without being asked

_logger = logging.getLogger(__name__)


class ImageFolder(Data):
    """A folder with one subfolder a class, a .tar of such a folder, or a folder of .tar files.

    Small images are held in memory and augmented like those of the other sources (`pad`, `cutout`);
    the others are decoded by worker processes and augmented by timm (`scale`, `color_jitter`).

    Args:
        train, test: the training set and the test set; the latter is opened by `test_split` alone.
        img_size: side of the images that come out; evaluation takes the square in the
            middle, resized (bilinear).
        in_chans: 1 turns images grey, 3 into RGB.
        in_memory: None holds them in memory if the decoded training set takes at most 2 GiB.
        pad, cutout: see `Augment`; in memory only, by default 4 and 0.
        scale: range of the area that a random resized crop keeps; from files only, by default
            0.08 to 1.
        color_jitter: strength of random brightness, contrast and saturation; from files only, by
            default 0.4, and 0 where `auto_augment` is given, whose place it takes.
        hflip: mirror half of the training images.
        auto_augment: see `Augment`.
        mean, std: of each channel; None computes them in memory and takes ImageNet's from files
            (averaged over the colours for one channel).
        train_limit, test_limit: see `Data`.
        num_workers: processes that decode: ahead, for each running stream of batches, or all at
            once at the start into memory; 0 decodes in this process.
    """

    def __init__(
        self,
        *,
        train: str | os.PathLike[str],
        test: str | os.PathLike[str],
        img_size: int = 224,
        in_chans: int = 3,
        in_memory: bool | None = None,
        pad: int | None = None,
        cutout: int | None = None,
        scale: Sequence[float] | None = None,
        color_jitter: float | None = None,
        hflip: bool = True,
        auto_augment: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
        num_workers: int = 2,
    ) -> None:
        super().__init__(
            in_chans=in_chans,
            img_size=img_size,
            augment=Augment(
                4 if pad is None else pad, hflip, 0 if cutout is None else cutout, auto_augment
            ),
            mean=mean,
            std=std,
            train_limit=train_limit,
            test_limit=test_limit,
            num_workers=num_workers,
        )
        if color_jitter and auto_augment:
            raise ValueError("color_jitter and auto_augment exclude each other; give one of them")
        self.train, self.test = train, test
        self.in_memory = in_memory
        self.scale = None if scale is None else _range(scale)
        self.color_jitter = color_jitter
        self._only_memory = {"pad": pad, "cutout": cutout}
        self._only_files = {"scale": scale, "color_jitter": color_jitter}

    def _read(self, train: bool) -> Records:
        return scan(self.train if train else self.test)

    def _source(
        self,
        records: Records,
        normalization: tuple[tuple[float, ...], tuple[float, ...]] | None,
    ) -> Source:
        if self.in_memory is None:
            # settled by the training set, which is always made first, for the test set too
            size = len(records) * self.in_chans * self.img_size**2
            self.in_memory = size <= MAX_MEMORY
            _logger.info(
                "%d training images take %.2f GiB decoded: %s",
                len(records),
                size / 1024**3,
                "held in memory" if self.in_memory else "decoded by workers",
            )
        ignored = self._only_files if self.in_memory else self._only_memory
        if given := [name for name, value in ignored.items() if value is not None]:
            raise ValueError(
                f"{', '.join(given)} has no effect with in_memory={self.in_memory} (images are "
                f"{'held in memory' if self.in_memory else 'decoded by workers'}); "
                f"leave it out or set data.in_memory={not self.in_memory}"
            )
        if self.in_memory:
            return super()._source(records, normalization)
        mean, std = normalization or _imagenet(self.in_chans)
        return FileSource(
            records,
            mean,
            std,
            in_chans=self.in_chans,
            img_size=self.img_size,
            train_transform=self._train_transform(mean, std),
            num_workers=self.num_workers,
        )

    def _train_transform(
        self, mean: tuple[float, ...], std: tuple[float, ...]
    ) -> Callable[[Image.Image], Tensor]:
        jitter = self.color_jitter
        if jitter is None:
            jitter = 0.0 if self.augment.auto_augment else 0.4
        transform = create_transform(
            self.img_size,
            is_training=True,
            scale=self.scale,
            hflip=0.5 if self.augment.hflip else 0.0,
            color_jitter=jitter,
            auto_augment=self.augment.auto_augment,
            mean=mean,
            std=std,
            normalize=False,  # uint8 out: a quarter of the traffic from the workers
        )
        return _InMode(MODES[self.in_chans], transform)


class _InMode:
    """Converts an image before transforming it; a class, so that workers can be spawned."""

    def __init__(self, mode: str, transform: Callable[[Image.Image], Tensor]) -> None:
        self.mode, self.transform = mode, transform

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(image.convert(self.mode))


def _range(scale: Sequence[float]) -> tuple[float, float]:
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise ValueError(f"scale={list(scale)} must be two shares of the area, as [0.08, 1.0]")
    return scale[0], scale[1]


def _imagenet(in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if in_chans == 3:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    return (sum(IMAGENET_DEFAULT_MEAN) / 3,), (sum(IMAGENET_DEFAULT_STD) / 3,)
