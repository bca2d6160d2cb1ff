"""From pixels to what a network reads: fitting to a size, augmentation, normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as TF

from supernet.data.counter import Draw, below, hash64, seeded

if TYPE_CHECKING:
    from supernet.data.base import DataInfo

MODES = {1: "L", 3: "RGB"}  # PIL's name of an image with so many channels


@dataclass(frozen=True)
class Augment:
    """How training images held in memory are varied, in this order.

    Args:
        pad: black border in pixels added on every side before a random crop of the image's size.
        hflip: mirror half of the images.
        cutout: side in pixels of a square around a random pixel that is set to the mean, clipped
            at the image's border (DeVries & Taylor 2017); 0 for none.
        auto_augment: timm's policy text ("rand-m9-mstd0.5", "augmix-m3", "v0", ...), applied first
            and image by image, so much slower than the rest; None for none.
    """

    pad: int = 4
    hflip: bool = True
    cutout: int = 0
    auto_augment: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("pad", self.pad), ("cutout", self.cutout)):
            if value < 0:
                raise ValueError(f"{name}={value} is negative; give pixels, or 0 for none")
        if self.auto_augment is not None:
            _policy(self.auto_augment, 3, 32)

    def __call__(
        self, images: Tensor, indices: NDArray[np.int64], seed: int, epoch: int
    ) -> tuple[Tensor, Tensor | None]:
        """Vary a batch; each image by (seed, epoch, its index) alone.

        Args:
            images: uint8, shape (N, C, H, W), on any device.
            indices: shape (N,), the images' positions in their source.

        Returns:
            The images, and what cutout removes: bool, shape (N, 1, H, W), or None.
        """
        if self.auto_augment is not None:
            images = _apply_policy(self.auto_augment, images, indices, seed, epoch)
        height, width = images.shape[-2:]
        draws = np.arange(Draw.CROP_TOP, Draw.CUTOUT_LEFT + 1)[:, None]
        bits = hash64(seed, epoch, indices[None, :], draws)  # (draws, N)
        top, left, flip, cut_top, cut_left = (
            torch.from_numpy(below(row, bound)).to(images.device)
            for row, bound in zip(
                bits, (2 * self.pad + 1, 2 * self.pad + 1, 2, height, width), strict=True
            )
        )
        if self.pad or self.hflip:
            images = _crop_and_flip(images, self.pad, top, left, flip.bool() & self.hflip)
        if not self.cutout:
            return images, None
        rows = _inside(cut_top, self.cutout, height)[:, None, :, None]
        columns = _inside(cut_left, self.cutout, width)[:, None, None, :]
        return images, rows & columns


def _crop_and_flip(images: Tensor, pad: int, top: Tensor, left: Tensor, flip: Tensor) -> Tensor:
    """Crops of the padded images at (top, left), mirrored where `flip`; all of shape (N,)."""
    channels, height, width = images.shape[1:]
    padded = F.pad(images, [pad] * 4)
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - columns, columns)
    pixels = rows[:, :, None] * padded.shape[-1] + columns[:, None, :]  # (N, H, W)
    pixels = pixels.flatten(1)[:, None].expand(-1, channels, -1)
    return padded.flatten(2).gather(2, pixels).view_as(images)


def _inside(center: Tensor, side: int, size: int) -> Tensor:
    """Which of `size` positions lie in the interval of length `side` around `center`."""
    start = center[:, None] - side // 2
    positions = torch.arange(size, device=center.device)
    return (start <= positions) & (positions < start + side)


@lru_cache
def _policy(text: str, in_chans: int, img_size: int) -> Callable[[Image.Image], Image.Image]:
    """timm's transform of an augmentation policy text.

    Raises:
        ValueError: timm does not know the policy.
    """
    try:
        _, transform, _ = create_transform(
            img_size,
            is_training=True,
            separate=True,
            color_jitter=0.0,
            auto_augment=text,
            mean=(0.5,) * in_chans,  # what moved images are filled up with
        )
    except (AssertionError, KeyError, ValueError) as error:
        raise ValueError(
            f"auto_augment={text!r} is not a policy that timm knows ({error!r}); "
            "for example: rand-m9-mstd0.5, original, v0, 3a, augmix-m3"
        ) from None
    return transform


def _apply_policy(
    text: str, images: Tensor, indices: NDArray[np.int64], seed: int, epoch: int
) -> Tensor:
    transform = _policy(text, images.shape[1], images.shape[-1])
    results = []
    for image, bits in zip(images.cpu(), hash64(seed, epoch, indices, Draw.ITEM), strict=True):
        with seeded(int(bits)):
            results.append(TF.pil_to_tensor(transform(TF.to_pil_image(image))))
    return torch.stack(results).to(images.device)


def normalize(
    images: Tensor, mean: Sequence[float], std: Sequence[float], erase: Tensor | None = None
) -> Tensor:
    """uint8 (..., C, H, W) to float32, (value / 255 - mean) / std a channel; zero where `erase`."""
    shape = (-1, 1, 1)
    shift = torch.tensor([255 * m for m in mean], device=images.device).view(shape)
    scale = torch.tensor([255 * s for s in std], device=images.device).view(shape)
    result = images.to(torch.float32).sub_(shift).div_(scale)
    return result if erase is None else result.masked_fill_(erase, 0.0)


def fit(image: Image.Image, in_chans: int, img_size: int) -> Tensor:
    """Bring an image to its mode and size: the square in its middle, resized (bilinear, like
    timm's evaluation transform at crop_pct=1).

    Returns:
        uint8, shape (in_chans, img_size, img_size).
    """
    image = image.convert(MODES[in_chans])
    if image.size != (img_size, img_size):
        image = ImageOps.fit(image, (img_size, img_size), Image.Resampling.BILINEAR)
    return TF.pil_to_tensor(image)


@dataclass(frozen=True)
class EvalTransform:
    """PIL image -> float32 (C, H, W), exactly as in evaluation batches."""

    in_chans: int
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image.Image) -> Tensor:
        return normalize(fit(image, self.in_chans, self.img_size), self.mean, self.std)


def eval_transform(info: DataInfo) -> EvalTransform:
    """What turns one image file into the network's input: `eval_transform(info)(image)[None]`."""
    return EvalTransform(info.in_chans, info.img_size, info.mean, info.std)
