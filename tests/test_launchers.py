"""Sweeps whose jobs run in other processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "search.py"
TINY = [
    "data.img_size=16",
    "data.train_limit=128",
    "space=mbconv_small",
    "space.stages=[[8,1,2]]",
    "space.kernels=[3]",
    "strategy.epochs=2",
    "strategy.warmup_epochs=1",
    "strategy.batch_size=32",
    "objective.budget_share=1.0",
    "latency.rounds=1",
    "latency.burst_ms=0.1",
    "bn_batches=1",
    "random_estimator.steps=2",
    "random_search.num_evaluations=1",
    "device=cpu",
]


def sweep(command: list[str], cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    output = f"{done.stdout}\n{done.stderr}"
    assert done.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "announcement"),
    [
        (["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"], "Joblib.Parallel(n_jobs=2"),
        (["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=10"], "Submitit 'local'"),
    ],
    ids=["joblib", "submitit"],
)
def test_jobs_of_a_launcher_share_one_table(
    launcher: list[str], announcement: str, tmp_path: Path
) -> None:
    command = [sys.executable, str(SCRIPT), "-m", *launcher, "seed=1,2", "run_dir=sweep", *TINY]
    output = sweep(command, tmp_path)
    assert announcement in output
    assert "Warning" not in output
    folders = [tmp_path / "sweep" / str(job) for job in range(2)]
    tables = [(folder / "latency_table.json").read_bytes() for folder in folders]
    assert tables[0] == tables[1]
    for folder in folders:
        result = json.loads((folder / "result.json").read_text())
        assert result["predicted"] <= result["budget"] * (1 + 1e-9)  # a sum in another order
        assert (folder / "report.html").is_file()
        assert (folder / "random_search" / "result.json").is_file()
    first, second = ((folder / "metrics.jsonl").read_text() for folder in folders)
    assert first != second
    cached = list(Path(os.environ["SUPERNET_CACHE"]).rglob("*.json"))
    assert len(cached) == 1
