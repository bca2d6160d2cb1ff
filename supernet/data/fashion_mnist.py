"""Fashion-MNIST (Xiao et al. 2017): 70,000 grey images of clothes, 28x28, in ten classes."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torchvision.datasets import FashionMNIST as TorchvisionFashionMNIST

from supernet.data.base import Data
from supernet.data.download import downloaded
from supernet.data.records import ArrayRecords
from supernet.data.transforms import Augment

CLASS_NAMES = tuple(TorchvisionFashionMNIST.classes)


class FashionMnist(Data):
    """Reads the IDX .gz files that the data set is published as.

    Args:
        folder: where the .gz files lie; by default where Debian's package dataset-fashion-mnist
            puts them.
        root: where torchvision downloads them if they are not in `folder`; None is the
            cache folder.
        img_size: the 28x28 images are resized to this side, once.
        pad, hflip, cutout, auto_augment: see `Augment`.
        mean, std, train_limit, test_limit: see `Data`.
    """

    def __init__(
        self,
        *,
        folder: str | os.PathLike[str] = "/usr/share/datasets/fashion-mnist",
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
            in_chans=1,
            img_size=img_size,
            augment=Augment(pad, hflip, cutout, auto_augment),
            mean=mean,
            std=std,
            train_limit=train_limit,
            test_limit=test_limit,
        )
        self.folder, self.root = Path(folder).expanduser(), root

    def _read(self, train: bool) -> ArrayRecords:
        prefix = "train" if train else "t10k"
        names = (f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz")
        folder = self.folder
        if not all((folder / name).is_file() for name in names):
            folder = downloaded(
                _download,
                self.root,
                "Fashion-MNIST",
                f"put the four .gz files into {self.folder} (data.folder; on Debian: "
                "apt install dataset-fashion-mnist) or choose another folder by data.root",
            )
        images, labels = (read_idx(folder / name) for name in names)
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"{folder}: images of shape {images.shape} and labels of shape {labels.shape} "
                "do not belong together; download the files again"
            )
        if labels.max() >= len(CLASS_NAMES):
            raise ValueError(f"{folder / names[1]}: label {labels.max()} is not in 0..9")
        return ArrayRecords(images, labels.astype(np.int64), CLASS_NAMES)


def _download(root: Path) -> Path:
    return Path(TorchvisionFashionMNIST(str(root), download=True).raw_folder)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read a gzipped IDX file of unsigned bytes (the format is described at Yann LeCun's MNIST
    page: two zero bytes, a type, the number of dimensions, big-endian sizes, values).

    Raises:
        ValueError: truncated, damaged or another kind of file.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a readable gzip file: {error}") from None
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = struct.unpack(f">{content[3]}I", content[4:start]) if len(content) >= start else ()
    if len(content) != start + math.prod(shape):
        raise ValueError(f"{path} is truncated: {len(content)} bytes do not hold shape {shape}")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()  # writable
