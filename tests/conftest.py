"""Every test is seeded, uses one thread, and writes nowhere but in temporary folders."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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
        gc.freeze()  # what is imported stays: else each `free_memory` looks through all of it
        yield
        gc.unfreeze()


@pytest.fixture(autouse=True)
def _isolated_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERNET_CACHE", str(tmp_path / "supernet_cache"))
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@dataclass(frozen=True)
class Done:
    """How a command ended: exit code (negative for a signal) and what it printed."""

    code: int
    out: str
    err: str


class Commands:
    """The commands, each in a process of its own; the worker explains `report` and `kill`."""

    TINY = (
        "experiment=quickstart",
        "data.img_size=8",
        "data.train_limit=64",
        "data.test_limit=20",
        "space.stages=[[8,2,2]]",
        "space.first_chs=8",
        "space.kernels=[3,5]",
        "strategy.epochs=2",
        "strategy.warmup_epochs=1",
        "strategy.batch_size=8",
        "strategy.ranking.num_candidates=4",
        "latency.rounds=3",
        "latency.burst_ms=0.2",
        "latency.network_rounds=3",
        "latency.num_fit=0",
        "bn_batches=2",
        "objective.budget_share=1",
        "retrain=false",
        "device=cpu",
    )  # a search of a second

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        worker = Path(__file__).parent / "workers" / "command_server.py"
        self.server = subprocess.Popen(
            [sys.executable, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(
        self,
        command: str,
        *arguments: str,
        cwd: Path,
        report: bool = True,
        kill: tuple[str, int] | None = None,
    ) -> Done:
        """Run supernet-`command`, with errors as users see them."""
        out, err = self.folder / "stdout", self.folder / "stderr"
        request = {
            "command": command,
            "arguments": arguments,
            "cwd": str(cwd),
            "env": {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"},
            "stdout": str(out),
            "stderr": str(err),
            "report": report,
            "kill": kill,
        }
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        code = int(self.server.stdout.readline())
        return Done(code, out.read_text(), err.read_text())

    def succeed(self, command: str, *arguments: str, cwd: Path, report: bool = True) -> Done:
        done = self(command, *arguments, cwd=cwd, report=report)
        assert done.code == 0, f"{done.out}\n{done.err}"
        return done

    def refuse(self, command: str, *arguments: str, cwd: Path) -> str:
        """What the command says in refusing; it may not be a traceback."""
        done = self(command, *arguments, cwd=cwd)
        assert done.code == 1, f"{done.code}\n{done.out}\n{done.err}"
        assert done.err.startswith(f"supernet-{command}: "), done.err
        assert "Traceback" not in done.out + done.err
        return done.err.removeprefix(f"supernet-{command}: ")


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    commands = Commands(tmp_path_factory.mktemp("commands"))
    yield commands
    commands.server.communicate()
