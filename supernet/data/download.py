"""Downloads through torchvision, one process at a time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

from latency.cache import cache_folder

T = TypeVar("T")


def downloaded(
    load: Callable[[Path], T], root: str | os.PathLike[str] | None, what: str, else_: str
) -> T:
    """Call `load(root)`, which downloads what is missing under `root` (None: the cache folder).

    Raises:
        ValueError: it failed; names the folder and, with `else_`, the alternative.
    """
    folder = cache_folder() if root is None else Path(root).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"):
            return load(folder)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{what} is not in {folder} and downloading it failed ({reason}); {else_}"
        ) from None
