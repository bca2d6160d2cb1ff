"""Loaders and streams, over images in memory and over files alike."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from supernet.data import Data, Loader, Split, Stream
from supernet.data.digits import Digits
from supernet.data.image_folder import ImageFolder

# on Python 3.12 and later, starting workers from a process with threads warns
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.fixture(params=["memory", "files", "workers"])
def data(request: pytest.FixtureRequest, make_images: Callable[..., Path]) -> Data:
    if request.param == "memory":
        return Digits(img_size=8, pad=1, hflip=True, cutout=2, train_limit=101)
    folder = make_images("train", counts=(14, 12, 11))
    num_workers = 2 if request.param == "workers" else 0
    return ImageFolder(
        train=folder, test=folder, img_size=8, in_memory=False, num_workers=num_workers
    )


@pytest.fixture
def split(data: Data) -> Split:
    return data.search_splits(seed=0)[0]


def make(split: Split, train: bool = True, batch_size: int = 4, **settings: int) -> Loader:
    return Loader(split, batch_size=batch_size, seed=3, train=train, **settings)


def same(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def images_by_index(loader: Loader, epoch: int) -> dict[int, Tensor]:
    result = {}
    order = loader.order(epoch)
    for index in range(len(loader)):
        images, _ = loader.batch(epoch, index)
        part = order[index * loader.batch_size :][: len(images)]
        result.update(zip(part.tolist(), images, strict=True))
    return result


def test_batches_have_the_promised_form(split: Split) -> None:
    images, labels = make(split).batch(0, 1)
    assert images.dtype == torch.float32 and images.shape[0] == 4 and images.shape[2:] == (8, 8)
    assert labels.dtype == torch.int64 and labels.shape == (4,)
    assert torch.equal(labels, split.source.labels[make(split).order(0)[4:8]])


def test_evaluation_sees_every_image_once_in_order(split: Split) -> None:
    loader = make(split, train=False)
    batches = list(loader)
    assert len(batches) == len(loader) == -(-len(split) // 4)
    assert sum(len(labels) for _, labels in batches) == len(split)
    assert torch.equal(torch.cat([labels for _, labels in batches]), split.labels)
    again = make(split, train=False, batch_size=len(split)).batch(7, 0)[0]
    assert torch.equal(torch.cat([images for images, _ in batches]), again)  # no augmentation


def test_an_epoch_is_a_permutation_by_seed_and_epoch(split: Split) -> None:
    loader = make(split)
    orders = [loader.order(epoch) for epoch in range(3)]
    for order in orders:
        assert np.array_equal(np.sort(order), split.indices)
    assert not np.array_equal(orders[0], orders[1]) and not np.array_equal(orders[1], orders[2])
    assert not np.array_equal(orders[0], Loader(split, batch_size=4, seed=4, train=True).order(0))


def test_augmentation_is_independent_of_batch_size_and_ranks(split: Split) -> None:
    whole = images_by_index(make(split, batch_size=len(split)), epoch=2)
    assert len(whole) == len(split)
    parts: dict[int, Tensor] = {}
    for rank in range(2):
        loader = make(split, batch_size=3, rank=rank, world_size=2)
        seen = images_by_index(loader, epoch=2)
        assert len(loader) == len(split) // 2 // 3 and not set(seen) & set(parts)
        parts |= seen
    assert len(parts) == 2 * 3 * (len(split) // 2 // 3)
    assert all(torch.equal(whole[index], image) for index, image in parts.items())


def test_an_image_differs_between_epochs_and_seeds(split: Split) -> None:
    one, two = (images_by_index(make(split, batch_size=len(split)), epoch) for epoch in (0, 1))
    other = images_by_index(Loader(split, batch_size=len(split), seed=4, train=True), 0)
    plain = images_by_index(make(split, train=False, batch_size=len(split)), 0)
    for a, b in ((one, two), (one, other), (one, plain)):
        assert sum(not torch.equal(a[index], b[index]) for index in a) > len(a) / 2


def test_augmentation_can_be_switched_off(split: Split) -> None:
    plain = images_by_index(make(split, train=False, batch_size=len(split)), 0)
    shuffled = images_by_index(make(split, augment=False), 5)
    assert shuffled and all(torch.equal(plain[i], image) for i, image in shuffled.items())


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_are_disjoint_and_equally_long(split: Split, world_size: int) -> None:
    loaders = [make(split, rank=rank, world_size=world_size) for rank in range(world_size)]
    orders = [set(loader.order(1).tolist()) for loader in loaders]
    assert len({len(loader) for loader in loaders}) == 1
    assert {len(order) for order in orders} == {len(split) // world_size}
    assert len(set.union(*orders)) == sum(map(len, orders))
    whole = make(split).order(1)
    assert np.array_equal(loaders[1].order(1), whole[1::world_size][: len(orders[1])])
    held = [make(split, train=False, rank=r, world_size=world_size) for r in range(world_size)]
    seen = np.concatenate([loader.order(0) for loader in held])
    assert np.array_equal(np.sort(seen), split.indices)


def test_the_last_small_batch(split: Split) -> None:
    size = len(split)
    batch_size = size // 2 + 1
    assert [len(make(split, train, batch_size)) for train in (True, False)] == [1, 2]
    kept = make(split, True, batch_size, drop_last=False)
    assert len(kept) == 2 and len(kept.batch(0, 1)[1]) == size - batch_size
    assert len(make(split, False, batch_size, drop_last=True)) == 1
    whole = make(split, True, batch_size=10 * size)
    assert len(whole) == 1 and len(whole.batch(0, 0)[1]) == size


def test_a_stream_is_the_batches_in_order_and_resumes_anywhere(split: Split) -> None:
    loader = make(split)
    length = len(loader)
    stream = Stream(loader)
    states, batches = [], []
    for _ in range(2 * length + 1):
        states.append(stream.state_dict())
        batches.append(stream.next())
    assert states == [
        {"epoch": step // length, "position": step % length} for step in range(2 * length + 1)
    ]
    for step in (0, 1, length - 1, length, 2 * length):
        assert same(batches[step], loader.batch(step // length, step % length))
    for step in (1, length - 1, length):
        resumed = Stream(make(split))
        resumed.next()  # whatever it made ahead is dropped
        resumed.load_state_dict(states[step])
        for later in range(step, min(step + length, len(batches))):
            assert same(resumed.next(), batches[later])
    assert stream.wait_seconds > 0


def test_a_peek_is_the_batch_to_come(split: Split) -> None:
    stream, plain = Stream(make(split)), Stream(make(split))
    for step in range(len(stream.loader) + 1):
        before = stream.state_dict()
        if step % 3:
            peeked = stream.peek()
            assert stream.peek() is peeked and stream.state_dict() == before
        assert same(stream.next(), plain.next()) and stream.state_dict() == plain.state_dict()
    stream.peek()
    stream.load_state_dict({"epoch": 0, "position": 1})
    assert same(stream.next(), plain.loader.batch(0, 1))


def test_making_batches_leaves_the_global_generators_alone(split: Split) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    Stream(make(split)).next()
    make(split).batch(0, 0)
    list(make(split, train=False))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


def test_a_foreign_state_is_refused() -> None:
    stream = Stream(make(Digits(img_size=8).search_splits(0)[0]))
    for state in ({}, {"epoch": 1}, {"epoch": -1, "position": 0}, {"epoch": 0, "position": "1"}):
        with pytest.raises(ValueError, match="not the state of a data stream"):
            stream.load_state_dict(state)
    with pytest.raises(ValueError, match="saved at batch 179 of an epoch, but an epoch has 179"):
        stream.load_state_dict({"epoch": 0, "position": 179})


def test_wrong_numbers_are_refused() -> None:
    split = Split(Digits(img_size=8).test_split().source, np.arange(3))
    with pytest.raises(ValueError, match="batch_size=0"):
        make(split, batch_size=0)
    with pytest.raises(ValueError, match="rank=2 must be"):
        make(split, rank=2, world_size=2)
    with pytest.raises(ValueError, match="3 images are too few for 4 processes"):
        make(split, world_size=4)
