"""Data: a training set that a search may split, and a test set that it never sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from supernet.data.counter import Draw, hash64, spread
from supernet.data.records import Records
from supernet.data.sources import MemorySource, Source, Split, decode_all, statistics
from supernet.data.transforms import MODES, Augment


@dataclass(frozen=True)
class DataInfo:
    """What a network needs to know about its data; checkpoints store it.

    Attributes:
        num_classes: outputs of a classifier.
        class_names: one a class, in the order of the labels.
        in_chans: channels of an image, 1 or 3.
        img_size: side of an image in pixels.
        mean, std: of each channel, for pixel values in [0, 1].
    """

    num_classes: int
    class_names: tuple[str, ...]
    in_chans: int
    img_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.class_names) != self.num_classes:
            raise ValueError(f"{self.num_classes} classes have {len(self.class_names)} names")
        if self.in_chans not in MODES:
            raise ValueError(f"in_chans={self.in_chans!r} is not supported; valid: 1, 3")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.in_chans:
                raise ValueError(f"{name} needs {self.in_chans} values (in_chans); got {values}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive; got {self.std}")

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, value: Any) -> DataInfo:
        """Read the dictionary form.

        Raises:
            ValueError: a field is missing, unknown or of the wrong type.
        """
        names = list(cls.__dataclass_fields__)
        if not isinstance(value, Mapping) or set(value) != set(names):
            raise ValueError(f"a description of data has the fields {', '.join(names)}: {value!r}")
        try:
            return cls(
                num_classes=int(value["num_classes"]),
                class_names=tuple(map(str, value["class_names"])),
                in_chans=int(value["in_chans"]),
                img_size=int(value["img_size"]),
                mean=tuple(map(float, value["mean"])),
                std=tuple(map(float, value["std"])),
            )
        except TypeError as error:
            raise ValueError(f"the description of data is damaged ({error}): {value!r}") from None


class Data(ABC):
    """Base of all sources. Nothing is read before a split or `info` is asked for.

    Args:
        in_chans: channels of an image, 1 or 3.
        img_size: side in pixels; of other images the square in the middle is resized (bilinear).
        augment: of training images.
        mean, std: of each channel for pixel values in [0, 1]; None computes them from the
            training images.
        train_limit, test_limit: use at most so many images, the same ones whatever the seed,
            spread evenly over the classes' shares and over each class; None for all.
        num_workers: processes that decode the images, where there are many.
    """

    def __init__(
        self,
        *,
        in_chans: int,
        img_size: int,
        augment: Augment,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        train_limit: int | None = None,
        test_limit: int | None = None,
        num_workers: int = 2,
    ) -> None:
        if in_chans not in MODES:
            raise ValueError(f"in_chans={in_chans!r} is not supported; valid: 1, 3")
        if img_size < 1:
            raise ValueError(f"img_size={img_size!r} must be a number of pixels, 1 or more")
        if (mean is None) != (std is None):
            raise ValueError(f"give mean and std together, or neither; got {mean=} {std=}")
        self.in_chans, self.img_size, self.augment = in_chans, img_size, augment
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != in_chans:
                raise ValueError(f"{name} needs {in_chans} values (in_chans); got {list(values)}")
        self.mean = None if mean is None else tuple(map(float, mean))
        self.std = None if std is None else tuple(map(float, std))
        self.train_limit, self.test_limit = train_limit, test_limit
        self.num_workers = num_workers

    @abstractmethod
    def _read(self, train: bool) -> Records:
        """List the training images or the test images, and touch nothing of the others."""

    def _source(
        self,
        records: Records,
        normalization: tuple[tuple[float, ...], tuple[float, ...]] | None,
    ) -> Source:
        """Make a source; `normalization` is the mean and std, None to find them out."""
        images = decode_all(records, self.in_chans, self.img_size, self.num_workers)
        mean, std = statistics(images) if normalization is None else normalization
        return MemorySource(images, records.labels, mean, std, self.augment)

    @cached_property
    def _train(self) -> tuple[Source, tuple[str, ...]]:
        records = _limit(self._read(train=True), self.train_limit, "train_limit")
        given = None if self.mean is None or self.std is None else (self.mean, self.std)
        return self._source(records, given), records.class_names

    @cached_property
    def _test(self) -> Source:
        records = self._read(train=False)
        ours, theirs = self.info.class_names, records.class_names
        if theirs != ours:
            differ = sorted({*ours} ^ {*theirs})
            raise ValueError(
                f"the training set has {len(ours)} classes and the test set {len(theirs)}; "
                f"only one of them has {', '.join(map(repr, differ[:5]))}; give both the same"
            )
        records = _limit(records, self.test_limit, "test_limit")
        return self._source(records, (self.info.mean, self.info.std))

    @cached_property
    def info(self) -> DataInfo:
        """Known from the training set alone, which this reads."""
        source, names = self._train
        return DataInfo(len(names), names, self.in_chans, self.img_size, source.mean, source.std)

    def search_splits(self, seed: int) -> tuple[Split, Split]:
        """Weight half and architecture half of the training set: disjoint, together all of it,
        class by class equal in size, give or take one image."""
        count = len(self._train[0]) // 2
        return self._split(seed, count, "the training set has fewer than 2 images")

    def retrain_splits(self, seed: int, val_share: float) -> tuple[Split, Split]:
        """Training part and validation part, both of the training set and split like the halves.

        Args:
            val_share: share of the training set that validates, above 0 and below 1.

        Raises:
            ValueError: a part would be empty.
        """
        size = len(self._train[0])
        count = round(size * val_share)
        return self._split(
            seed, count, f"val_share={val_share!r} leaves one part of {size} training images empty"
        )

    def test_split(self) -> Split:
        """All test images. It also checks the test set's classes: ask early.

        Raises:
            ValueError: its classes are not those of the training set.
        """
        return Split(self._test, np.arange(len(self._test)))

    def _split(self, seed: int, count: int, problem: str) -> tuple[Split, Split]:
        source = self._train[0]
        size = len(source)
        if not 0 < count < size:
            raise ValueError(problem)
        # at random within a class, and every class in the same proportion
        order = np.lexsort((hash64(seed, Draw.SPLIT, np.arange(size)), source.labels.numpy()))
        second = spread(size, count)
        return (
            Split(source, np.sort(order[~second])),
            Split(source, np.sort(order[second])),
        )


def _limit(records: Records, limit: int | None, name: str) -> Records:
    if limit is None or limit >= len(records):
        return records
    order: NDArray[np.int64] = np.argsort(records.labels, kind="stable")
    kept = records.subset(np.sort(order[spread(len(records), max(limit, 0))]))
    present = len(np.unique(kept.labels))
    if present < len(np.unique(records.labels)):
        raise ValueError(
            f"{name}={limit} leaves {present} of {len(records.class_names)} classes; raise it"
        )
    return kept
