"""Searches that try architectures, through the commands."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from latency.memory import peak_memory
from supernet.spaces.nasbench201 import NasBench201

SPACE = NasBench201(in_chans=1, img_size=8, widths=[4, 8], num_cells=1)
CELLS = ["space=nasbench201", "space.widths=[4,8]", "space.num_cells=1"]
OWN = ["data=digits", "data.img_size=8", "data.train_limit=64", "device=cpu", "measure=false",
       "objective=none", "objective.cost=params", "bn_batches=1"]  # fmt: skip


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every cell: the more 3x3 convolutions, the better."""
    path = tmp_path_factory.mktemp("table") / "cells.csv"
    names = [choice.name for choice in SPACE.choices]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("architecture", "test"))
        for ops in itertools.product(SPACE.choices[0].options, repeat=6):
            cell = SPACE.architecture(dict(zip(names, ops, strict=True)))
            writer.writerow((SPACE.to_string(cell), 50 + 5 * ops.count("nor_conv_3x3")))
    return path


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_an_oracle_says_so_everywhere(commands: Any, table: Path, tmp_path: Path) -> None:
    own = [*CELLS, *OWN, "estimator=table", f"estimator.path={table}", "num_evaluations=12"]
    sweep = ["-m", *own, "strategy=random,aging_evolution", "run_dir=sweep"]
    done = commands.succeed("search", *sweep, cwd=tmp_path, report=False)
    assert "oracle" in done.out
    for job in ("0", "1"):
        folder = tmp_path / "sweep" / job
        result = read(folder / "result.json")
        assert result["oracle"] is True and "oracle" in result["judged_by"]
        assert result["evaluations"] == 12 and result["costs"]["params"] == result["predicted"]
        cell = SPACE.build_network(SPACE.architecture(result["architecture"]), 10)
        assert result["costs"]["peak_memory"] == peak_memory(cell, (1, 1, 8, 8))
        chosen = list(result["architecture"].values()).count("nor_conv_3x3")
        assert result["accuracy"] == 50 + 5 * chosen
    assert "oracle" in (tmp_path / "sweep" / "progress.html").read_text()
    derived = ["derive", "run=sweep/0", "output=again", f"budget={result['reachable'][1] * 0.5}"]
    out = commands.succeed(*derived, "measure=false", cwd=tmp_path, report=False).out
    assert "oracle" in out
    out = commands.succeed(
        "compare", "runs=[sweep/0,sweep/1]", "output=side", cwd=tmp_path, report=False
    ).out
    assert out.count("oracle") == 2 and (tmp_path / "side" / "progress.html").is_file()


def test_a_score_is_no_percentage(commands: Any, tmp_path: Path) -> None:
    own = [*CELLS, *OWN, "strategy=random", "estimator=zero_cost", "estimator.batch_size=8"]
    done = commands.succeed("search", *own, "num_evaluations=3", "run_dir=run", cwd=tmp_path)
    assert "with a score of the untrained network" in done.out and "accuracy" not in done.out
    assert read(tmp_path / "run" / "result.json")["accuracy_unit"] == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["strategy=random"], "needs an estimator .*: estimator=from_scratch"),
        (["strategy=random", "estimator=zero_cost"], "would never end: set num_evaluations"),
        (["strategy=random", "num_evaluations=0", "estimator=zero_cost"], "number above 0; got 0"),
        (["strategy=first_order", "estimator=zero_cost"], "FirstOrder does not try: leave"),
        (["num_evaluations=4"], "num_evaluations=4 would be ignored: FirstOrder tries no"),
        (["strategy=random", "num_evaluations=2", "estimator=zero_cost", "+estimator.steps=3"],
         "ZeroCost has no setting 'steps', .*: take it out with '~estimator.steps'"),
        (["strategy=random", "estimator=table", "num_evaluations=2"], "needs estimator.path=FILE"),
        (["strategy=bayesian", "strategy.sampler=Magic", "estimator=zero_cost",
          "num_evaluations=2"], "sampler='Magic' is none of Optuna's samplers; valid: .*TPE"),
        (["strategy=first_order", "objective=mnasnet_soft", "objective.target=1000",
          "mixed_op=softmax"], "Product ranks single architectures and has no loss"),
        (["strategy=random", "objective=mnasnet_hard", "estimator=zero_cost", "num_evaluations=2"],
         "objective.target=None must be a positive number"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    settings: list[str], message: str, commands: Any, tmp_path: Path
) -> None:
    own = [a for a in OWN if a != "objective=none" or not any("mnasnet" in s for s in settings)]
    refused = commands.refuse("search", *CELLS, *own, *settings, "run_dir=run", cwd=tmp_path)
    assert re.search(message, refused), refused
    assert not (tmp_path / "run" / "result.json").exists()


def test_the_baseline_of_a_trial_search_judges_as_many_in_the_same_way(
    commands: Any, table: Path, tmp_path: Path
) -> None:
    own = [*CELLS, *OWN, "strategy=evolution", "strategy.population=4", "strategy.num_parents=2",
           "strategy.num_mutations=2", "strategy.num_crossovers=1", "estimator=table",
           f"estimator.path={table}", "num_evaluations=9", "search_baseline=random"]  # fmt: skip
    commands.succeed("search", *own, "run_dir=run", cwd=tmp_path)
    found = read(tmp_path / "run" / "random_search" / "result.json")
    assert found["evaluations"] == 9 and found["oracle"] is True


@pytest.mark.slow
def test_one_search_gives_a_family(commands: Any, tmp_path: Path) -> None:
    own = ["experiment=efficientnet_scaling_small", *OWN[1:4], "data=digits", "measure=false",
           "data.img_size=8", "space.resolution=8", "space.depths=[1.0,2.0]",
           "space.widths=[1.0,1.4]", "space.resolutions=[1.0]", "latency.network_rounds=3",
           "latency.burst_ms=0.2"]  # fmt: skip
    short = ["recipe.epochs=1", "recipe.batch_size=16", "recipe.scheduler.warmup_epochs=0"]
    few = ["estimator.steps=2", "estimator.num_images=20", "data.test_limit=20"]
    commands.succeed("search", *own, *few, *short, "run_dir=run", cwd=tmp_path)
    result = read(tmp_path / "run" / "result.json")
    assert result["evaluations"] == 2
    (entry,) = read(tmp_path / "run" / "retrain" / "result.json")["networks"]
    sweep = ["-m", "run=run", "retrain_space={phi: 1},{phi: 2}", "run_dir=family", "device=cpu"]
    commands.succeed("retrain", *sweep, *short, cwd=tmp_path)
    files = [tmp_path / "family" / job / "result.json" for job in "01"]
    family = [read(file)["networks"][0] for file in files]
    assert family[0]["macs"] == result["costs"]["macs"] < family[1]["macs"] == entry["macs"]
    assert entry["architecture"] == family[1]["architecture"] == result["architecture"]
