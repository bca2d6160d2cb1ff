"""Augmentation against an oracle that works image by image and number by number."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from supernet.data import Augment, DataInfo, eval_transform
from supernet.data.counter import below, hash64, permutation, seeded, spread
from supernet.data.transforms import fit, normalize

U64 = 2**64


def splitmix(x: int) -> int:
    """Steele, Lea & Flood 2014, figure 14, on python's integers."""
    x = (x + 0x9E3779B97F4A7C15) % U64
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % U64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % U64
    return x ^ (x >> 31)


def oracle_hash(*fields: int) -> int:
    state = 0
    for field in fields:
        state = splitmix(state ^ (field % U64))
    return state


def oracle_below(bound: int, *fields: int) -> int:
    return (oracle_hash(*fields) >> 32) * bound >> 32


def oracle_augment(
    image: np.ndarray, index: int, seed: int, epoch: int, pad: int, hflip: bool, cutout: int
) -> tuple[np.ndarray, np.ndarray]:
    """One image (C, H, W), pixel by pixel; returns it and the mask of cutout."""
    channels, height, width = image.shape
    top, left = (oracle_below(2 * pad + 1, seed, epoch, index, draw) for draw in (2, 3))
    flip = hflip and oracle_below(2, seed, epoch, index, 4) == 1
    row, column = (
        oracle_below(height, seed, epoch, index, 5),
        oracle_below(width, seed, epoch, index, 6),
    )
    result, mask = np.zeros_like(image), np.zeros((1, height, width), bool)
    for y in range(height):
        for x in range(width):
            from_y, from_x = y + top - pad, (width - 1 - x if flip else x) + left - pad
            if 0 <= from_y < height and 0 <= from_x < width:
                result[:, y, x] = image[:, from_y, from_x]
            dy, dx = y - (row - cutout // 2), x - (column - cutout // 2)
            mask[0, y, x] = 0 <= dy < cutout and 0 <= dx < cutout
    return result, mask


@pytest.mark.parametrize(
    ("channels", "pad", "hflip", "cutout"),
    [(3, 2, True, 0), (1, 0, True, 3), (3, 3, False, 4), (1, 0, False, 0)],
)
def test_augmentation_equals_the_slow_oracle(
    channels: int, pad: int, hflip: bool, cutout: int
) -> None:
    images = torch.randint(0, 256, (23, channels, 6, 7), dtype=torch.uint8)
    indices = np.arange(23) * 3 + 5
    result, mask = Augment(pad, hflip, cutout)(images, indices, seed=-4, epoch=9)
    assert (mask is None) == (cutout == 0)
    for n, index in enumerate(indices.tolist()):
        image, erased = oracle_augment(images[n].numpy(), index, -4, 9, pad, hflip, cutout)
        assert np.array_equal(result[n].numpy(), image)
        if mask is not None:
            assert np.array_equal(mask[n].numpy(), erased)


def test_hash_is_splitmix64_chained() -> None:
    # first output of the published generator from state 0
    assert int(hash64(0)[0]) == 0xE220A8397B1DCDAF
    grid = hash64(3, np.arange(5)[None, :], np.arange(4)[:, None])
    assert [[int(x) for x in row] for row in grid] == [
        [oracle_hash(3, b, a) for b in range(5)] for a in range(4)
    ]


def test_draws_are_uniform() -> None:
    counts = np.bincount(below(hash64(1, np.arange(9000)), 9), minlength=9)
    assert counts.sum() == 9000 and abs(counts - 1000).max() < 5 * 30  # 5 standard deviations
    order = permutation(1000, 3, 4)
    assert sorted(order.tolist()) == list(range(1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.15


def test_half_of_the_images_are_flipped_and_every_shift_occurs() -> None:
    image = torch.zeros(1, 1, 5, 5, dtype=torch.uint8)
    image[0, 0, 2, 1] = 255  # off the middle: a mirrored image is recognised
    images = image.expand(4000, -1, -1, -1)
    flipped = Augment(0, True)(images, np.arange(4000), 0, 0)[0][:, 0, 2, 3] > 0
    assert abs(int(flipped.sum()) - 2000) < 5 * 32
    shifted = Augment(1, False)(images, np.arange(4000), 0, 0)[0][:, 0].flatten(1).argmax(1)
    counts = torch.bincount(shifted, minlength=25)
    assert sorted(counts.nonzero().flatten().tolist()) == [5, 6, 7, 10, 11, 12, 15, 16, 17]
    assert (counts[counts > 0] - 4000 / 9).abs().max() < 5 * 20
    # flips and shifts of an image are drawn independently
    assert abs(np.corrcoef(flipped, shifted % 5)[0, 1]) < 0.08


@pytest.mark.parametrize("channels", [1, 3])
def test_auto_augment_depends_on_each_image_alone(channels: int) -> None:
    images = torch.randint(0, 256, (6, channels, 16, 16), dtype=torch.uint8)
    augment = Augment(0, False, 0, "rand-m9-mstd0.5")
    indices = np.arange(6)
    whole = augment(images, indices, 1, 2)[0]
    assert torch.equal(whole[4:5], augment(images[4:5], indices[4:5], 1, 2)[0])
    assert not torch.equal(whole, augment(images, indices, 1, 3)[0])
    assert not torch.equal(whole, images)


def test_wrong_augmentation_is_refused() -> None:
    with pytest.raises(ValueError, match="pad=-1 is negative"):
        Augment(pad=-1)
    with pytest.raises(ValueError, match="auto_augment='sharpen' is not a policy"):
        Augment(auto_augment="sharpen")


def test_normalize_is_the_formula_and_erases_to_the_mean() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    erase = torch.zeros(2, 1, 4, 4, dtype=torch.bool)
    erase[1, 0, 2, 3] = True
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    result = normalize(images, mean, std, erase)
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - mean[channel]) / std[channel]
        expected[1, 2, 3] = 0
        torch.testing.assert_close(result[:, channel].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("in_chans", "mode"), [(1, "L"), (3, "RGB")])
def test_fit_takes_the_middle_square(in_chans: int, mode: str) -> None:
    array = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    image = Image.fromarray(array)
    result = fit(image.convert("RGBA"), in_chans, 16)
    assert result.shape == (in_chans, 16, 16) and result.dtype == torch.uint8
    timm = create_transform(16, crop_pct=1.0, interpolation="bilinear", normalize=False)
    assert (result.int() - timm(image.convert(mode)).int()).abs().max() <= 1


def test_eval_transform_handles_any_mode() -> None:
    info = DataInfo(2, ("a", "b"), 1, 8, (0.5,), (0.25,))
    result = eval_transform(info)(Image.new("RGB", (20, 10), (255, 255, 255)))
    assert result.shape == (1, 8, 8)
    assert torch.equal(result, torch.full((1, 8, 8), 2.0))


def test_spread_is_even() -> None:
    for size, count in ((10, 5), (11, 5), (7, 2), (5, 5), (9, 0)):
        mask = spread(size, count)
        assert mask.sum() == count and len(mask) == size
        for start in range(size):
            for stop in range(start, size + 1):
                assert abs(mask[start:stop].sum() - (stop - start) * count / size) < 1


def test_seeded_restores_the_global_generators() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    expected = draw(), draw()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    first = draw()
    with seeded(2**63 + 1):
        inside = draw()
    assert (first, draw()) == expected
    with seeded(2**63 + 1):
        assert draw() == inside
