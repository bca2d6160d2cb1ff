"""Where measurements are kept, and the lock that keeps two of them from running at once."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`$SUPERNET_CACHE`, or `supernet` in `$XDG_CACHE_HOME` or in `~/.cache`."""
    if named := os.environ.get("SUPERNET_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "supernet"


@contextmanager
def machine_lock() -> Iterator[None]:
    """Wait until no other job of this user measures on this machine.

    The lock file carries the machine's name, since the cache folder may be shared over a network.
    """
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f"measuring-{platform.node()}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("waiting for another job on this machine to finish measuring")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
