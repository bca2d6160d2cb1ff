"""Raw labelled images as a source lists them: nothing is decoded before it is asked for."""

from __future__ import annotations

import io
import os
import tarfile
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from timm.data.readers.reader_image_folder import ReaderImageFolder
from timm.data.readers.reader_image_in_tar import ReaderImageInTar


class Records(ABC):
    """Images in a fixed order with their labels.

    Args:
        labels: shape (num_images,), positions in `class_names`.
        class_names: of all classes.
    """

    def __init__(self, labels: NDArray[np.int64], class_names: tuple[str, ...]) -> None:
        self.labels = labels.astype(np.int64)
        self.class_names = class_names

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """Decode one image.

        Raises:
            ValueError: it is damaged.
        """

    @abstractmethod
    def subset(self, indices: NDArray[np.int64]) -> Records:
        """Only the images at `indices`."""


class ArrayRecords(Records):
    """Images that are already decoded: uint8, shape (N, H, W) or (N, H, W, 3)."""

    def __init__(
        self,
        images: NDArray[np.uint8],
        labels: NDArray[np.int64],
        class_names: tuple[str, ...],
    ) -> None:
        assert len(images) == len(labels), (images.shape, labels.shape)
        super().__init__(labels, class_names)
        self.images = images

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def subset(self, indices: NDArray[np.int64]) -> ArrayRecords:
        return ArrayRecords(self.images[indices], self.labels[indices], self.class_names)


@dataclass(frozen=True)
class Location:
    """Where the bytes of an image lie: a whole file (`size` is -1) or a piece of a tar."""

    path: str
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        # opened anew each time, so that no position is shared by threads or forked workers
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            return file.read(self.size)


class FileRecords(Records):
    """PNG and JPEG files in folders or in tars."""

    def __init__(
        self,
        locations: list[Location],
        labels: NDArray[np.int64],
        class_names: tuple[str, ...],
    ) -> None:
        super().__init__(labels, class_names)
        self.locations = locations

    def image(self, index: int) -> Image.Image:
        location = self.locations[index]
        try:
            image = Image.open(io.BytesIO(location.read()))
            image.load()
        except (OSError, SyntaxError) as error:  # Pillow's two ways to refuse a file
            where = f" at byte {location.offset}" if location.size >= 0 else ""
            raise ValueError(f"{location.path}{where} is not a readable image: {error}") from None
        return image

    def subset(self, indices: NDArray[np.int64]) -> FileRecords:
        locations = [self.locations[index] for index in indices]
        return FileRecords(locations, self.labels[indices], self.class_names)


def scan(root: str | os.PathLike[str]) -> FileRecords:
    """List the images of a folder with one subfolder a class, a tar of such folders, or a folder
    of tars (one a class, or holding a folder a class), by timm's rules for class names.

    Raises:
        ValueError: there is nothing at `root`, no image, or images outside class folders.
    """
    root = Path(root).expanduser()
    if not root.exists():
        raise ValueError(f"no folder and no tar at {root}")
    if root.is_file() and root.suffix != ".tar":
        raise ValueError(f"{root} is neither a folder nor an uncompressed .tar file")
    in_tar = root.is_file() or any(root.glob("*.tar"))
    try:
        locations, labels, class_names = _scan_tar(root) if in_tar else _scan_folder(root)
    except (RuntimeError, ValueError, tarfile.TarError) as error:
        raise ValueError(
            f"no images can be read from {root} ({error}); expected CLASS/NAME.png or .jpg"
        ) from None
    if len(class_names) < 2 or "" in class_names:
        raise ValueError(
            f"{root} must hold one folder a class, and two classes at least; "
            f"found: {', '.join(map(repr, class_names))}"
        )
    return FileRecords(locations, np.array(labels), class_names)


def _scan_folder(root: Path) -> tuple[list[Location], list[int], tuple[str, ...]]:
    reader = ReaderImageFolder(str(root))
    samples = sorted(reader.samples)  # timm's order of equal numbers is the file system's
    locations = [Location(path) for path, _ in samples]
    return locations, [label for _, label in samples], _names(reader.class_to_idx)


def _scan_tar(root: Path) -> tuple[list[Location], list[int], tuple[str, ...]]:
    # no cache of what is in the tar: timm would pickle it
    reader = ReaderImageInTar(str(root), cache_tarinfo=False)
    samples = []
    for (member, parent, child), label in zip(reader.samples, reader.targets, strict=True):
        path = str(root / parent if parent else root)
        offset = member.offset_data + (child.offset_data if child else 0)
        samples.append((label, member.path, path, offset, member.size))
    samples.sort()  # timm's order of equal names is the file system's
    locations = [Location(path, offset, size) for _, _, path, offset, size in samples]
    return locations, [label for label, *_ in samples], _names(reader.class_name_to_idx)


def _names(class_to_idx: dict[str, int]) -> tuple[str, ...]:
    return tuple(sorted(class_to_idx, key=class_to_idx.__getitem__))
