"""Several searches from one command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

KEEP = "+hydra.callbacks.keep._target_=job_returns.Keep"  # tests/workers/job_returns.py


def jobs(sweep: Path) -> list[Path]:
    return sorted(path.parent for path in sweep.glob("*/config.yaml"))


def returned(sweep: Path) -> list[float]:
    return [json.loads(line) for line in (sweep / "returns.jsonl").read_text().splitlines()]


def tracked_group(file: Path) -> str:
    """The group in wandb's record of an offline run, a LevelDB log of protocol buffers."""
    content, position = file.read_bytes(), 7  # after the file's own header
    while position < len(content):
        length = int.from_bytes(content[position + 4 : position + 6], "little")
        record = wandb_internal_pb2.Record()
        record.ParseFromString(content[position + 7 : position + 7 + length])
        if record.WhichOneof("record_type") == "run":
            return record.run.run_group
        position += 7 + length  # the run is in the first block, before any padding
    raise AssertionError(f"{file} tracks no run")


@pytest.mark.slow
def test_six_jobs_share_a_table_and_are_compared(commands: Any, tmp_path: Path) -> None:
    axes = ["mixed_op=one_shot,softmax,binary_gate", "seed=1,2"]
    tracked = ["tracker=wandb", "tracker.mode=offline"]
    arguments = ["-m", *commands.TINY, *axes, *tracked, "run_dir=sweep", KEEP]
    done = commands.succeed("search", *arguments, cwd=tmp_path, report=False)
    sweep = tmp_path / "sweep"
    folders = jobs(sweep)
    assert [folder.name for folder in folders] == list("012345")

    # measured once, before the first job
    logs = [(folder / "search.log").read_text() for folder in folders]
    assert all("latency table from the cache" in log for log in logs)
    assert not any("latency table measured" in log for log in logs)
    (cached,) = (tmp_path / "supernet_cache").glob("*.json")
    assert cached.stat().st_mtime <= (folders[0] / "config.yaml").stat().st_mtime
    assert len({(folder / "latency_table.json").read_bytes() for folder in folders}) == 1

    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    assert returned(sweep) == [result["objective"] for result in results]
    assert len({(folder / "metrics.jsonl").read_bytes() for folder in folders}) == 6

    text = (sweep / "comparison.txt").read_text()
    assert text.strip() in done.out
    rows = text.splitlines()[2:8]
    for row, (op, seed) in zip(
        rows, [(o, s) for o in ("one_shot", "softmax", "binary_gate") for s in "12"], strict=True
    ):
        assert row.split()[1:4] == [op, seed, "done"]
    means = text.splitlines()[-3:]
    ops = [["one_shot", "2"], ["softmax", "2"], ["binary_gate", "2"]]
    assert [mean.split()[:2] for mean in means] == ops
    assert not list(sweep.glob("*/random_search"))

    ids = {(folder / "wandb_run_id").read_text().strip() for folder in folders}
    assert len(ids) == 6
    for folder in folders:
        (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
        assert tracked_group(file) == "sweep"


@pytest.mark.slow
def test_a_sweep_over_seeds_ends_with_its_baseline(commands: Any, tmp_path: Path) -> None:
    own = ["random_estimator.steps=3", "random_search.num_evaluations=2", "run_dir=sweep"]
    own += ["objective.cost=macs", "retrain=true", "baseline=none"]
    own += ["recipe.epochs=1", "recipe.scheduler.warmup_epochs=0"]
    arguments = ["-m", *commands.TINY, "seed=0,1", *own]
    arguments.remove("retrain=false")
    done = commands.succeed("search", *arguments, cwd=tmp_path, report=False)
    sweep = tmp_path / "sweep"
    for job in jobs(sweep):
        assert len((job / "random_search" / "metrics.jsonl").read_text().splitlines()) == 2
        found = json.loads((job / "random_search" / "result.json").read_text())
        assert found["judged_by"] == "training from scratch"
        assert found["predicted"] <= found["budget"]
        retrained = json.loads((job / "retrain" / "result.json").read_text())["networks"]
        by_name = {entry["name"]: entry["architecture"] for entry in retrained}
        assert by_name["best_at_random"] == found["architecture"]
    rows = json.loads((sweep / "comparison_over_seeds.json").read_text())
    assert [(r["overrides"]["strategy"], r["n"]) for r in rows] == [("search", 2), ("random", 2)]
    assert all(row["test_accuracy"]["std"] is not None for row in rows)
    assert (sweep / "comparison.txt").read_text().strip() in done.out


@pytest.mark.slow
def test_a_random_search_is_derived_again_but_has_no_weights(commands: Any, tmp_path: Path) -> None:
    own = ["strategy=random", "num_evaluations=4", "run_dir=run"]
    own += ["estimator=from_scratch", "estimator.steps=2"]
    # the experiment has settings of another strategy
    tiny = [a for a in commands.TINY if not a.startswith(("experiment", "strategy"))]
    commands.succeed("search", *tiny, *own, "objective.cost=macs", cwd=tmp_path)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    budget = f"budget={result['budget']}"
    commands.succeed("derive", "run=run", "output=again", budget, "measure=false", cwd=tmp_path)
    again, found = (tmp_path / f / "architecture.json" for f in ("again", "run"))
    assert again.read_bytes() == found.read_bytes()
    for command, *asked in (["derive", "output=x", "timm=true"], ["retrain", "init=inherit"]):
        refused = commands.refuse(command, "run=run", *asked, cwd=tmp_path)
        assert "trained no shared weights" in refused


@pytest.mark.slow
def test_precisions_in_one_process(commands: Any, tmp_path: Path) -> None:
    arguments = ["-m", *commands.TINY, "precision=no,bf16", "run_dir=sweep", KEEP]
    commands.succeed("search", *arguments, cwd=tmp_path, report=False)
    folders = jobs(tmp_path / "sweep")
    first, second = ((folder / "metrics.jsonl").read_text() for folder in folders)
    assert first != second
    assert len(returned(tmp_path / "sweep")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("warmup", [0, 1])
@pytest.mark.parametrize("mixed_op", ["one_shot", "softmax", "binary_gate"])
def test_a_diverged_job_is_penalised(
    mixed_op: str, warmup: int, commands: Any, tmp_path: Path
) -> None:
    axes = ["strategy.weight_optimizer.lr=1e30,0.01", "strategy.clip_grad=null"]
    settings = [*axes, f"mixed_op={mixed_op}", f"strategy.warmup_epochs={warmup}"]
    arguments = ["-m", *commands.TINY, *settings, "run_dir=sweep", KEEP]
    done = commands.succeed("search", *arguments, cwd=tmp_path, report=False)
    penalty, objective = returned(tmp_path / "sweep")
    assert penalty == 100.0 > objective
    assert "diverged: the " in (tmp_path / "sweep" / "0" / "search.log").read_text()
    rows = (tmp_path / "sweep" / "comparison.txt").read_text().splitlines()[2:]
    assert "failed" in rows[0] and "done" in rows[1]
    assert rows[0] in done.out


@pytest.mark.slow
def test_a_diverged_search_alone_is_an_error(commands: Any, tmp_path: Path) -> None:
    settings = ["strategy.weight_optimizer.lr=1e30", "strategy.clip_grad=null", "run_dir=run"]
    refused = commands.refuse("search", *commands.TINY, *settings, cwd=tmp_path)
    assert "lower weight_optimizer.lr" in refused
