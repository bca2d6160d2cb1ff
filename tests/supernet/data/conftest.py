"""Tiny image sets, written as files."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

CLASSES = ("cat", "dog", "eel")
MakeImages = Callable[..., Path]


@pytest.fixture
def image_of() -> Callable[..., np.ndarray]:
    """image_of(label, number, size): what `make_images` wrote there."""
    return pixels


def pixels(label: int, number: int, size: tuple[int, int] = (12, 12)) -> np.ndarray:
    """Random RGB pixels that are different for every image."""
    generator = np.random.default_rng([label, number])
    return generator.integers(0, 256, (*size, 3), dtype=np.uint8)


def encoded(array: np.ndarray, suffix: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, {"png": "PNG", "jpg": "JPEG"}[suffix])
    return buffer.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def make_images(tmp_path: Path) -> MakeImages:
    """make(name, form, counts, size, suffix): images of `CLASSES` as a folder, a tar, a folder of
    tars (one a class), or a tar of tars."""

    def make(
        name: str,
        form: str = "folder",
        counts: tuple[int, ...] = (7, 5, 6),
        size: tuple[int, int] = (12, 12),
        suffix: str = "png",
    ) -> Path:
        files = {
            label: {
                f"{number:03d}.{suffix}": encoded(pixels(index, number, size), suffix)
                for number in range(count)
            }
            for index, (label, count) in enumerate(zip(CLASSES, counts, strict=False))
        }
        root = tmp_path / name
        if form == "folder":
            for label, images in files.items():
                (root / label).mkdir(parents=True)
                for file, content in images.items():
                    (root / label / file).write_bytes(content)
            return root
        if form == "tar":
            with tarfile.open(root.with_suffix(".tar"), "w") as tar:
                for label, images in files.items():
                    for file, content in images.items():
                        add(tar, f"./{label}/{file}", content)
            return root.with_suffix(".tar")
        root.mkdir()
        for label, images in files.items():
            with tarfile.open(root / f"{label}.tar", "w") as tar:
                for file, content in images.items():
                    add(tar, file, content)
        if form == "tars":
            return root
        assert form == "tar_of_tars"
        with tarfile.open(root.with_suffix(".tar"), "w") as tar:
            for label in files:
                add(tar, f"{label}.tar", (root / f"{label}.tar").read_bytes())
        return root.with_suffix(".tar")

    return make
