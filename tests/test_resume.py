"""A search that was killed and resumed ends as one that never was, to the bit."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from supernet.checkpoint import load_checkpoint

EPOCHS, STEPS = 4, 4  # steps an epoch; the first two epochs are warm-up
SETTINGS = (
    f"strategy.epochs={EPOCHS}",
    "strategy.warmup_epochs=2",
    "checkpoint_every=3",
    "measure=false",
)
draw = random.Random(7)
MOMENTS = {
    "warm-up": ("weight-step", draw.randint(1, 2 * STEPS)),
    "weight step of the search": ("weight-step", draw.randint(2 * STEPS + 1, EPOCHS * STEPS)),
    "architecture step": ("architecture-step", draw.randint(1, 2 * STEPS)),
    "half a checkpoint": ("half-written search.safetensors", draw.randint(2, 6)),
    "a checkpoint not yet in place": ("written search.safetensors", draw.randint(2, 6)),
    "a line of the journal": ("line", draw.randint(2, 2 * EPOCHS)),
    "first checkpoint": ("half-written search.safetensors", 1),
    "result": ("half-written result.json", 1),
    "report": ("written report.html", 1),
}


def same(ours: Any, theirs: Any) -> bool:
    """Equality of nested states, bit by bit for tensors."""
    if isinstance(ours, torch.Tensor):
        return (
            ours.dtype == theirs.dtype
            and ours.shape == theirs.shape
            and torch.equal(ours.view(-1).view(torch.uint8), theirs.view(-1).view(torch.uint8))
        )
    if isinstance(ours, dict):
        return list(ours) == list(theirs) and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, (list, tuple)):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


def assert_same_run(ours: Path, theirs: Path) -> None:
    first, second = (
        load_checkpoint(run / "checkpoint" / "search.safetensors") for run in (ours, theirs)
    )
    assert set(first["search"]) == {
        "step", "supernet", "logits", "weight_optimizer", "logits_optimizer", "objective",
        "weight_stream", "arch_stream", "weight_meter", "arch_meter", "generator", "rng", "ranked",
        "monitor", "selected", "decided", "tuned", "parts",
    }  # fmt: skip
    for name, state in first["search"].items():
        assert same(state, second["search"][name]), name
    assert first["journals"]["metrics"] == second["journals"]["metrics"]
    for name in ("metrics.jsonl", "architecture.json", "latency_table.json"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    first, second = (json.loads((run / "result.json").read_text()) for run in (ours, theirs))
    for result in (first, second):
        del result["seconds"]
        assert result["measured_ms"] is None
    assert first == second
    times = [(run / "timing.jsonl").read_text().splitlines() for run in (ours, theirs)]
    assert len(times[0]) == len(times[1]) == EPOCHS


@pytest.fixture(scope="module")
def table(commands: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("table")
    commands.succeed("measure", *commands.TINY, "output=table.json", cwd=folder)
    return folder / "table.json"


@pytest.fixture(scope="module")
def reference(
    commands: Any, table: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The folder of an uninterrupted search, by its mixed op."""
    folder = tmp_path_factory.mktemp("reference")

    def run(mixed_op: str) -> Path:
        if not (folder / mixed_op).exists():
            settings = [*commands.TINY, *SETTINGS, f"mixed_op={mixed_op}"]
            where = [f"latency.table={table}", f"run_dir={mixed_op}"]
            commands.succeed("search", *settings, *where, cwd=folder, report=False)
        return folder / mixed_op

    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixed_op", "moment"),
    [("binary_gate", moment) for moment in MOMENTS]
    + [("softmax", "architecture step"), ("softmax", "half a checkpoint")]
    + [("one_shot", "weight step of the search"), ("one_shot", "ranking")],
)
def test_killed_and_resumed(
    mixed_op: str,
    moment: str,
    commands: Any,
    reference: Callable[[str], Path],
    table: Path,
    tmp_path: Path,
) -> None:
    theirs = reference(mixed_op)
    search = [*commands.TINY, *SETTINGS, f"mixed_op={mixed_op}", f"latency.table={table}"]
    # the journal of timings has a line an epoch too, but none of a ranked architecture
    kill = ("line", 2 * EPOCHS + 2) if moment == "ranking" else MOMENTS[moment]
    killed = commands("search", *search, "run_dir=run", cwd=tmp_path, report=False, kill=kill)
    assert killed.code == -9, killed.err
    resumed = [*search, "run_dir=run", "resume=true"]
    commands.succeed("search", *resumed, cwd=tmp_path, report=False)
    assert_same_run(tmp_path / "run", theirs)
    assert "is finished" in commands.succeed("search", *resumed, cwd=tmp_path).out


@pytest.mark.slow
def test_killed_again_and_again(
    commands: Any, reference: Callable[[str], Path], table: Path, tmp_path: Path
) -> None:
    search = [*commands.TINY, *SETTINGS, "mixed_op=binary_gate", f"latency.table={table}"]
    search += ["run_dir=run", "resume=true"]  # with nothing to resume it starts
    for kill in (
        ("half-written latency_table.json", 1),
        ("weight-step", 4),
        ("line", 2),
        ("line", 4),
    ):
        assert commands("search", *search, cwd=tmp_path, report=False, kill=kill).code == -9
    commands.succeed("search", *search, cwd=tmp_path, report=False)
    assert_same_run(tmp_path / "run", reference("binary_gate"))


@pytest.mark.slow
def test_keeps_its_own_table_and_tracked_run(commands: Any, tmp_path: Path) -> None:
    """What the cache holds by then does not matter."""
    tracked = ["tracker=wandb", "tracker.mode=offline"]
    search = [*commands.TINY, *SETTINGS, *tracked, "mixed_op=binary_gate"]
    kill = ("architecture-step", 3)
    killed = commands("search", *search, "run_dir=run", cwd=tmp_path, report=False, kill=kill)
    assert killed.code == -9
    run = tmp_path / "run"
    kept = {name: (run / name).read_bytes() for name in ("latency_table.json", "wandb_run_id")}
    (cached,) = (tmp_path / "supernet_cache").glob("*.json")
    cached.unlink()
    commands.succeed("search", *search, "run_dir=run", "resume=true", cwd=tmp_path, report=False)
    assert {name: (run / name).read_bytes() for name in kept} == kept
    assert not cached.exists()
    offline = list((run / "wandb").glob(f"offline-run-*-{kept['wandb_run_id'].decode().strip()}"))
    assert len(offline) == 2  # wandb keeps a folder a process, of one run
    plain = [
        *commands.TINY,
        *SETTINGS,
        "mixed_op=binary_gate",
        f"latency.table={run}/latency_table.json",
    ]
    commands.succeed("search", *plain, "run_dir=plain", cwd=tmp_path, report=False)
    assert_same_run(run, tmp_path / "plain")


@pytest.mark.slow
def test_killed_while_retraining(commands: Any, table: Path, tmp_path: Path) -> None:
    recipe = ["recipe.epochs=2", "recipe.batch_size=16", "recipe.scheduler.warmup_epochs=0"]
    search = [*commands.TINY, "retrain=true", "num_baselines=1", *recipe, f"latency.table={table}"]
    search.append("measure=false")
    commands.succeed("search", *search, "run_dir=whole", cwd=tmp_path, report=False)
    kill = ("retrain-step", 4 + 3)  # of the random network, in its second epoch
    killed = commands("search", *search, "run_dir=run", cwd=tmp_path, report=False, kill=kill)
    assert killed.code == -9
    commands.succeed("search", *search, "run_dir=run", "resume=true", cwd=tmp_path, report=False)
    results = []
    for run in (tmp_path / "run", tmp_path / "whole"):
        result = json.loads((run / "retrain" / "result.json").read_text())
        for entry in result["networks"]:
            del entry["seconds"], entry["measured_ms"]
        results.append(result)
    assert results[0] == results[1]
    for name in ("derived", "random_0"):
        ours, theirs = (tmp_path / run / "retrain" / name for run in ("run", "whole"))
        assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()
        for file in ("best.safetensors", "last.safetensors"):
            assert same(network_file(ours / file), network_file(theirs / file)), (name, file)


def network_file(path: Path) -> dict[str, Any]:
    """Everything in the file, whose own order is not fixed."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}  # noqa: SIM118
        return {"metadata": dict(sorted(file.metadata().items())), "tensors": tensors}


@pytest.mark.slow
def test_an_existing_run_is_guarded(commands: Any, tmp_path: Path) -> None:
    """Without resume, with another configuration, and with nothing named to resume."""
    search = [*commands.TINY, "run_dir=run", "checkpoint_every=1"]
    killed = commands("search", *search, cwd=tmp_path, report=False, kill=("weight-step", 2))
    assert killed.code == -9
    kept = shutil.copytree(tmp_path / "run", tmp_path / "kept")
    refused = commands.refuse("search", *search, cwd=tmp_path)
    assert "holds a run already" in refused and "resume=true" in refused
    other = ["resume=true", "strategy.batch_size=4", "seed=3"]
    refused = commands.refuse("search", *search, *other, cwd=tmp_path)
    assert "seed=3 (was 0), strategy.batch_size=4 (was 8)" in refused
    nowhere = [word for word in search if not word.startswith("run_dir=")]
    assert "needs run_dir" in commands.refuse("search", *nowhere, "resume=true", cwd=tmp_path)
    for name in ("config.yaml", "metrics.jsonl", "checkpoint/search.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (kept / name).read_bytes()
    commands.succeed("search", *search, "resume=true", cwd=tmp_path, report=False)
