"""Every test is seeded, uses one thread, and writes nowhere but in temporary folders."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data that SUPERNET_TEST_DATA names; the test is skipped without it."""
    name = os.environ.get("SUPERNET_TEST_DATA")
    if not name:
        pytest.skip("SUPERNET_TEST_DATA names no folder")
    folder = Path(name)
    assert folder.is_dir(), f"SUPERNET_TEST_DATA={name} is not a folder"
    return folder


@pytest.fixture(scope="session", autouse=True)
def _isolated_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the user's caches and wandb account away from the tests and their subprocesses."""
    folder = tmp_path_factory.mktemp("session")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("SUPERNET_CACHE", str(folder / "cache"))
        for kind in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
            path = folder / f"wandb_{kind.lower()}"
            path.mkdir()
            patch.setenv(f"WANDB_{kind}", str(path))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HYDRA_FULL_ERROR", "1")
        torch.set_num_threads(1)
        yield


@pytest.fixture(autouse=True)
def _isolated_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERNET_CACHE", str(tmp_path / "supernet_cache"))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
