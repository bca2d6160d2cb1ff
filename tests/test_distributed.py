"""Two gloo processes, each on its own data, end with one result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def launch(*arguments: str, cwd: Path, processes: int = 2) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*LAUNCH, f"--nproc-per-node={processes}", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["binary_gate", "softmax", "one_shot", "enas", "shared_weights"])
def test_ranks_end_bit_identical(name: str, tmp_path: Path) -> None:
    launch(str(ROOT / "tests" / "workers" / "search_rank.py"), str(tmp_path), name, cwd=tmp_path)
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert first.pop("labels") != second.pop("labels")
    assert first == second
    assert {p.name for p in tmp_path.iterdir()} == {"rank0.json", "rank1.json", "run"}


@pytest.mark.slow
def test_two_processes_train_other_networks_side_by_side_as_one_would_all(tmp_path: Path) -> None:
    worker, found = str(ROOT / "tests" / "workers" / "search_rank.py"), []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch(worker, str(folder), "from_scratch", cwd=folder, processes=processes)
        found += [json.loads((folder / f"rank{r}.json").read_text()) for r in range(processes)]
    alone, first, second = found
    assert alone == first == second and len(alone["ranked"]) == 3
    assert all(r["costs"] == {"latency": r["cost"] / 7} for r in alone["ranked"])


@pytest.mark.slow
def test_all_ranks_know_of_a_loss_that_is_not_finite_in_one(tmp_path: Path) -> None:
    launch(str(ROOT / "tests" / "workers" / "learner_rank.py"), str(tmp_path), cwd=tmp_path)
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1))
    assert first["message"].startswith("the training loss is not finite in another process at step")
    assert second["message"].startswith("the training loss is nan at step 2")
    assert first["step"] == second["step"] == 1 and first["steps"] == second["steps"] == 2


@pytest.mark.slow
def test_the_command_writes_one_run_folder(tmp_path: Path) -> None:
    launch(
        str(ROOT / "scripts" / "search.py"),
        "experiment=quickstart", "run_dir=out", "data.img_size=8", "data.train_limit=64",
        "data.test_limit=20", "space.stages=[[8,2,2]]", "space.first_chs=8", "space.kernels=[3]",
        "strategy.epochs=2", "strategy.warmup_epochs=1", "strategy.batch_size=8",
        "latency.rounds=3", "latency.burst_ms=0.5", "latency.network_rounds=3",
        "latency.num_fit=2", "latency.num_held_out=2", "retrain=false", "bn_batches=2",
        "objective.budget_share=1", "device=cpu",
        cwd=tmp_path,
    )  # fmt: skip
    assert [p.name for p in tmp_path.iterdir() if p.name != "supernet_cache"] == ["out"]
    written = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"architecture.json", "latency_table.json", "metrics.jsonl", "report.html"} <= written
    lines = (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]
