"""The four commands from end to end, on a search of a second."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from timm.models.efficientnet import EfficientNet, decode_arch_def

from latency.memory import peak_memory
from latency.sites import trace
from latency.table import LatencyTable
from supernet.choice import Architecture
from supernet.data import Loader
from supernet.evaluate import evaluate
from supernet.mixed_ops.base import MixedOp
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.nasbench201 import NasBench201
from supernet.tracking import read_journal
from supernet.weights_file import load_network

SAME = 1 + 1e-9  # two sums of the same numbers, in another order


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with `run`, a finished search."""
    yield tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def run(commands: Any, place: Path) -> Path:
    done = commands.succeed("search", *commands.TINY, "run_dir=run", cwd=place)
    assert f"report: {place / 'run' / 'report.html'}" in done.out
    assert done.err == ""  # no warning, and no bar in what is not a terminal
    return place / "run"


@pytest.fixture
def given(run: Path) -> str:
    """The run's table, for a search that does not measure."""
    return f"latency.table={run / 'latency_table.json'}"


def site_sum(table: LatencyTable, architecture: Architecture) -> float:
    """Latency of an architecture added up from the table by hand."""
    target = table.target
    space = SearchSpace.of(architecture)
    shape = (target.batch, space.in_chans, target.resolution, target.resolution)
    sites = trace(space.build(MixedOp, 10, search=False), space.choices, shape)
    return table.overhead_ms + sum(
        table.measurements[site.key].median_ms
        for site in sites
        if site.choice is None or architecture[site.choice] == site.option
    )


def test_search_leaves_a_consistent_run(run: Path) -> None:
    assert {p.name for p in run.iterdir()} == {
        "config.yaml", "architecture.json", "latency_table.json", "metrics.jsonl", "timing.jsonl",
        "result.json", "checkpoint", "report.html", "search.log", ".hydra",
    }  # fmt: skip
    result = read(run / "result.json")
    architecture = Architecture.load(run / "architecture.json")
    assert dict(architecture) == result["architecture"]
    table = LatencyTable.load(run / "latency_table.json")
    assert result["predicted"] == pytest.approx(site_sum(table, architecture), abs=1e-9)
    assert result["predicted_ms"] == result["predicted"]
    low, high = result["reachable"]
    assert low / SAME <= result["predicted"] <= high * SAME and high == result["budget"]
    assert result["measured_ms"]["median_ms"] > 0
    assert result["objective"] == 100 - result["accuracy"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    phases = [(r["step"], r["epoch"], r["phase"]) for r in lines]
    assert phases == [(4, 1, "warmup"), (8, 2, "search")]
    # a network that was measured to miss the budget was replaced after the last epoch
    assert lines[-1]["architecture"] == result["attempts"][0]["architecture"]
    assert result["architecture"] in [attempt["architecture"] for attempt in result["attempts"]]
    config = OmegaConf.load(run / "config.yaml")
    assert config.data.img_size == 8 and "run_dir" not in config


@pytest.mark.slow
def test_derive_obeys_another_budget(commands: Any, run: Path, place: Path) -> None:
    low, _ = read(run / "result.json")["reachable"]
    table = LatencyTable.load(run / "latency_table.json")
    before = (run / "architecture.json").read_bytes()
    budget = f"budget_ms={low * (1 + 1e-9)}"  # as predicted: measured, it may leave room for more
    commands.succeed("derive", "run=run", "output=cheap", budget, "measure=false", cwd=place)
    cheapest = Architecture.load(place / "cheap" / "architecture.json")
    assert site_sum(table, cheapest) == pytest.approx(low, abs=1e-9)
    commands.succeed("derive", "run=run", "output=same", cwd=place)
    assert (place / "same" / "architecture.json").read_bytes() == before
    refused = commands.refuse("derive", "run=run", "output=no", f"budget_ms={low / 2}", cwd=place)
    assert f"{low:.6g}" in refused and not (place / "no").exists()
    assert (run / "architecture.json").read_bytes() == before


@pytest.mark.slow
def test_retrain_beside_a_random_network(commands: Any, run: Path, place: Path) -> None:
    """Then the best weights are loaded, evaluated, and exported."""
    short = ["recipe.epochs=1", "recipe.batch_size=16", "recipe.scheduler.warmup_epochs=0"]
    commands.succeed(
        "retrain", "run=run", "baseline=random", "num_baselines=1", "device=cpu", *short, cwd=place
    )
    result = read(run / "retrain" / "result.json")
    table = LatencyTable.load(run / "latency_table.json")
    assert [entry["name"] for entry in result["networks"]] == ["derived", "random_0"]
    data = instantiate(OmegaConf.load(run / "config.yaml").data)
    for entry in result["networks"]:
        network, _ = load_network(run / "retrain" / entry["name"] / "best.safetensors")
        loader = Loader(data.test_split(), batch_size=7, seed=0, train=False)
        accuracy, loss = evaluate(network, loader)
        assert accuracy == entry["accuracy"]
        assert loss == pytest.approx(entry["test_loss"], abs=1e-5)
        assert sum(p.numel() for p in network.parameters()) == entry["params"]
        architecture = SearchSpace.of(Architecture.load(run / "architecture.json")).architecture(
            entry["architecture"]
        )
        assert entry["predicted_ms"] == pytest.approx(site_sum(table, architecture), abs=1e-9)
        assert entry["measured_ms"]["median_ms"] > 0
    assert result["networks"][0]["architecture"] == read(run / "result.json")["architecture"]
    budget = result["budget"]
    assert 0.9 * budget <= result["networks"][1]["predicted_ms"] <= budget

    best = run / "retrain" / "derived" / "best.safetensors"
    commands.succeed("derive", "run=run", "output=onnx", "onnx=true", f"weights={best}", cwd=place)
    session = onnxruntime.InferenceSession(str(place / "onnx" / "network.onnx"))
    images = torch.randn(1, 1, 8, 8)
    (logits,) = session.run(None, {"images": images.numpy()})
    network, _ = load_network(best)
    assert torch.allclose(torch.from_numpy(logits), network(images), atol=1e-4)


@pytest.mark.slow
def test_retrain_from_the_supernet(commands: Any, run: Path, place: Path) -> None:
    short = ["recipe.epochs=1", "recipe.batch_size=16", "recipe.scheduler.warmup_epochs=0"]
    arguments = ["run=run", "run_dir=inherited", "init=inherit", "device=cpu", *short]
    commands.succeed("retrain", *arguments, cwd=place)
    (entry,) = read(place / "inherited" / "result.json")["networks"]
    assert entry["init"] == "inherit" and entry["init_val_accuracy"] is not None
    assert "holds a run already" in commands.refuse("retrain", *arguments, cwd=place)
    before = read(place / "inherited" / "result.json")
    commands.succeed("retrain", *arguments, "resume=true", cwd=place)
    after = read(place / "inherited" / "result.json")
    assert after["networks"][0].pop("measured_ms") and before["networks"][0].pop("measured_ms")
    assert after == before


@pytest.mark.slow
def test_timm_export_of_a_search(commands: Any, tmp_path: Path) -> None:
    tiny = [*commands.TINY, "space.stem_stride=2", "run_dir=run"]
    commands.succeed("search", *tiny, cwd=tmp_path, report=False)
    commands.succeed("derive", "run=run", "timm=true", cwd=tmp_path)
    config = read(tmp_path / "run" / "timm_model.json")
    network = EfficientNet(decode_arch_def(config.pop("arch_def")), **config)
    network.load_state_dict(load_file(tmp_path / "run" / "timm_model.safetensors"))
    assert network.eval()(torch.randn(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ["mixed_op=one_shot"],
        ["mixed_op=binary_gate"],
        ["mixed_op=binary_gate", "objective=none", "objective.cost=params"],
        ["mixed_op=one_shot", "objective=additive", "objective.budget_share=0.9"],
        ["objective=additive", "objective.lambda1=1e-4", "objective.budget_share=1"],
        ["objective=proxyless", "objective.cost=macs", "objective.ref=1e5"],
        ["objective=fbnet", "objective.cost=macs"],
        ["objective.cost=macs", "objective.budget_share=0.8", "precision=bf16"],
    ],
    ids=" ".join,
)
def test_methods_run_through(
    settings: list[str], commands: Any, given: str, tmp_path: Path
) -> None:
    tiny = [word for word in commands.TINY if "budget_share" not in word or not settings]
    if not any(word.startswith(("objective=", "objective.budget")) for word in settings):
        tiny.append("objective.budget_share=1")
    commands.succeed("search", *tiny, given, *settings, "run_dir=run", cwd=tmp_path, report=False)
    result = read(tmp_path / "run" / "result.json")
    low, high = result["reachable"]
    assert low / SAME <= result["predicted"] <= high * SAME
    if result["budget"] is not None:  # a measured network may have been allowed more or less
        allowed = {json.dumps(a["architecture"]): a["allowed"] for a in result["attempts"]}
        upper = allowed.get(json.dumps(result["architecture"]), result["budget"])
        assert result["predicted"] <= upper * SAME
    commands.succeed("derive", "run=run", "output=again", cwd=tmp_path)
    again = Architecture.load(tmp_path / "again" / "architecture.json")
    assert dict(again) == result["architecture"]


@pytest.mark.slow
@pytest.mark.parametrize("mixed_op", ["softmax", "one_shot"])
def test_limits_and_exclusion_hold_from_search_to_retraining(
    mixed_op: str, commands: Any, tmp_path: Path
) -> None:
    """Excluded candidates are not even measured."""
    out = ["exclude=['*=k5_e6']", f"mixed_op={mixed_op}"]
    limits = ["objective.limits.macs=8e4", "objective.limits.peak_memory=9000"]
    search = [*commands.TINY, *out, *limits, "run_dir=run"]
    commands.succeed("search", *search, cwd=tmp_path)
    run = tmp_path / "run"
    table = LatencyTable.load(run / "latency_table.json")
    assert not any("48,5x5" in key.op or "48,48,5x5" in key.op for key in table.measurements)
    result = read(run / "result.json")
    assert list(result["limits"]) == ["macs", "peak_memory"]
    architecture = Architecture.load(run / "architecture.json")
    network = SearchSpace.of(architecture).build_network(architecture, 10)
    peak = peak_memory(network, (1, 1, 8, 8))
    assert result["limits"]["peak_memory"]["derived"] == peak <= 9000
    assert result["limits"]["macs"]["derived"] <= 8e4
    assert "k5_e6" not in result["architecture"].values()
    commands.succeed("derive", "run=run", "output=again", cwd=tmp_path)
    assert dict(Architecture.load(tmp_path / "again" / "architecture.json")) == dict(architecture)

    short = ["recipe.epochs=1", "recipe.batch_size=16", "recipe.scheduler.warmup_epochs=0"]
    random = ["baseline=random", "num_baselines=2", "device=cpu"]
    commands.succeed("retrain", "run=run", *random, *short, cwd=tmp_path)
    space = SearchSpace.of(architecture)
    for entry in read(run / "retrain" / "result.json")["networks"]:
        network = space.build_network(space.architecture(entry["architecture"]), 10)
        assert peak_memory(network, (1, 1, 8, 8)) <= 9000 and entry["macs"] <= 8e4
        assert "k5_e6" not in entry["architecture"].values()
    assert "Predicted peak memory" in (run / "report.html").read_text()


@pytest.mark.slow
def test_nasbench_cells_run_through(commands: Any, tmp_path: Path) -> None:
    tiny = [word for word in commands.TINY if not word.startswith("space.")]
    cells = ["space=nasbench201", "space.widths=[4,8]", "space.num_cells=1"]
    commands.succeed("search", *tiny, *cells, "mixed_op=softmax", "run_dir=run", cwd=tmp_path)
    result = read(tmp_path / "run" / "result.json")
    assert len(result["architecture"]) == 6
    table = LatencyTable.load(tmp_path / "run" / "latency_table.json")
    architecture = Architecture.load(tmp_path / "run" / "architecture.json")
    assert result["predicted"] == pytest.approx(site_sum(table, architecture), abs=1e-9)
    space = SearchSpace.of(architecture)
    # the same operation everywhere is worth most: the best within a budget is known
    worth = {}
    for options in product(*(choice.options for choice in space.choices)):
        cell = space.architecture(dict(zip(space.by_name, options, strict=True)))
        worth[space.to_string(cell)] = len(set(options))
    rows = "".join(f"{cell},{90 - value}\n" for cell, value in worth.items())
    (tmp_path / "truth.csv").write_text(f"architecture,test\n{rows}")
    low, high = result["reachable"]
    budgets = f"budget_ms={low + 1e-9},{high}"
    commands.succeed(
        "derive", "run=run", budgets, "measure=false", "benchmark.table=truth.csv", cwd=tmp_path
    )
    for found in read(tmp_path / "run" / "budgets" / "result.json"):
        derived = 90 - len(set(found["architecture"].values()))
        assert found["benchmark"]["accuracy"] == derived <= found["benchmark"]["best_within"] == 89
    page = (tmp_path / "run" / "budgets" / "pareto.html").read_text()
    assert "best within budget (%)" in page and page.count("89.0") >= 2
    refused = commands.refuse("derive", "run=run", "benchmark.table=no.csv", cwd=tmp_path)
    assert "benchmark's table 'no.csv' is not a file" in refused


CELLS = (
    "space=nasbench201", "space.widths=[4,8]", "space.num_cells=1", "objective=none",
    "objective.cost=params", "objective.budget_share=null", "measure=false",
)  # fmt: skip
LOCAL = [f"strategy.refinement.{setting}" for setting in (
    "num_neighbours=3", "steps=2", "num_finalists=1", "final_steps=3", "repeats=1", "num_images=16",
    "recipe.batch_size=8",
)]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "phases"),
    [
        (["strategy=local_search", *LOCAL], ["rank"] * 5),
        (["strategy=second_order"], ["warmup", "search"]),
        (
            ["strategy=first_order_pt", "strategy.selection.steps=1"],
            ["warmup", "search", *["select"] * 6],
        ),
        (["strategy=proxyless_reinforce", "strategy.num_samples=2"], ["warmup", "search"]),
        (["mixed_op=gumbel"], ["warmup", "search"]),
        (["mixed_op=gumbel", "mixed_op.hard=false"], ["warmup", "search"]),
        (["mixed_op=sigmoid"], ["warmup", "search"]),
        (["mixed_op=beta_softmax"], ["warmup", "search"]),
        (["mixed_op=partial_channels", "mixed_op.share=2"], ["warmup", "search"]),
    ],
    ids=lambda value: " ".join(value[:2]),
)
def test_strategies_and_mixed_ops_run_through(
    settings: list[str], phases: list[str], commands: Any, tmp_path: Path
) -> None:
    """Under a budget that everything meets, the checkpoint answers what the search did."""
    tiny = [word for word in commands.TINY if not word.startswith(("space.", "objective."))]
    if "strategy=local_search" in settings:
        tiny = [word for word in tiny if not word.startswith(("strategy.", "experiment="))]
    search = [*tiny, *CELLS, *settings, "num_threads=1", "run_dir=run"]
    commands.succeed("search", *search, cwd=tmp_path, report=False)
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [x["phase"] for x in lines if x["phase"] != "monitor"] == phases
    result = read(run / "result.json")
    assert len(result["architecture"]) == 6 and result["judged_by"] == (
        "short training" if "strategy=local_search" in settings
        else "the supernet's weights" if "mixed_op=partial_channels" in settings
        else "inherited weights"
    )  # fmt: skip
    budget = f"budget={result['reachable'][1]}"
    commands.succeed("derive", "run=run", "output=again", budget, "measure=false", cwd=tmp_path)
    again = Architecture.load(tmp_path / "again" / "architecture.json")
    assert dict(again) == result["architecture"]


SHARED = (
    "mixed_op=single_path", "strategy=random", "num_evaluations=4",
    "estimator=shared_weights", "estimator.epochs=2", "estimator.batch_size=8",
    "search_baseline=random",
)  # fmt: skip


@pytest.mark.slow
def test_architectures_tried_on_shared_weights_run_through(commands: Any, tmp_path: Path) -> None:
    """Killed in the training of the supernet, which serves the baseline as well; what is derived
    and retrained inherits from it."""
    tiny = [word for word in commands.TINY if not word.startswith(("strategy.", "experiment="))]
    search = [*tiny, *SHARED, "objective=budget", "objective.cost=macs", "measure=false"]
    search += ["checkpoint_every=1", "run_dir=run"]
    killed = commands("search", *search, cwd=tmp_path, report=False, kill=("weight-step", 5))
    assert killed.code == -9, killed.err
    commands.succeed("search", *search, "resume=true", cwd=tmp_path)
    run = tmp_path / "run"
    result, random = read(run / "result.json"), read(run / "random_search" / "result.json")
    assert result["judged_by"] == "inherited weights" and result["evaluations"] == 4
    assert random["evaluations"] == 4 and random["accuracy"] == result["accuracy"]  # one seed
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(x["phase"], x["step"]) for x in lines] == [
        ("search", 4), ("search", 8), *[("rank", step) for step in (9, 10, 11, 12)]
    ]  # fmt: skip
    lines = (run / "random_search" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["phase"] for line in lines] == ["rank"] * 4
    assert "Ranking of candidates" in (run / "report.html").read_text()
    budget = f"budget={result['reachable'][1]}"
    commands.succeed("derive", "run=run", "output=again", budget, "onnx=true", cwd=tmp_path)
    again = Architecture.load(tmp_path / "again" / "architecture.json")
    assert dict(again) == result["architecture"]
    assert (tmp_path / "again" / "network.onnx").is_file()
    short = ["recipe.epochs=1", "recipe.batch_size=16", "recipe.scheduler.warmup_epochs=0"]
    commands.succeed("retrain", "run=run", "init=inherit", "device=cpu", *short, cwd=tmp_path)
    entries = read(run / "retrain" / "result.json")["networks"]
    assert {entry["init"] for entry in entries} == {"inherit"}
    refused = commands.refuse(
        "search", *search[:-1], "mixed_op=softmax", "run_dir=no", cwd=tmp_path
    )  # fmt: skip
    assert "Softmax has logits" in refused


@pytest.mark.slow
def test_a_search_reads_the_accuracies_of_a_benchmark_in_the_end(
    commands: Any, tmp_path: Path
) -> None:
    """What is wrong in them is found only then; the run goes on with another column."""
    space = NasBench201()
    cells = [space.architecture(dict(zip(space.by_name, options, strict=True)))
             for options in product(*(choice.options for choice in space.choices))]  # fmt: skip
    rows = {space.to_string(cell): 90 - number % 83 for number, cell in enumerate(cells)}
    text = "".join(f"{cell},{value},high\n" for cell, value in rows.items())
    (tmp_path / "truth.csv").write_text(f"architecture,test,wrong\n{text}")
    tiny = [word for word in commands.TINY if not word.startswith(("space.", "objective."))]
    search = [*tiny, *CELLS, "benchmark.table=truth.csv", "run_dir=run"]
    run = tmp_path / "run"

    def column(name: str) -> str:
        return f"benchmark.column={name}"

    refused = commands.refuse("search", *search, column("tset"), cwd=tmp_path)
    assert "no column 'tset'; valid: test, wrong" in refused and not (run / "checkpoint").exists()
    refused = commands.refuse("search", *search, column("wrong"), cwd=tmp_path)
    assert "line 2: wrong is 'high', no number" in refused and (run / "checkpoint").exists()
    journal = (run / "metrics.jsonl").read_bytes()
    assert len(journal.splitlines()) == 2
    commands.succeed("search", *search, column("test"), "resume=true", cwd=tmp_path)
    assert (run / "metrics.jsonl").read_bytes() == journal
    result = read(run / "result.json")
    cell = space.architecture(result["architecture"])
    accuracy = rows[space.to_string(cell)]
    assert result["benchmark"] == {
        "name": "test", "accuracy": accuracy, "best": 90, "of": 15625,
        "rank": 1 + sum(other > accuracy for other in rows.values()),
    }  # fmt: skip


@pytest.mark.slow
def test_darts_cells_are_retrained_in_a_larger_network(commands: Any, tmp_path: Path) -> None:
    tiny = [word for word in commands.TINY if not word.startswith(("space.", "objective."))]
    tiny.remove("retrain=false")
    cells = ["space=darts", "space.width=4", "space.num_cells=3", "mixed_op=softmax"]
    free = ["objective=none", "objective.cost=params", "measure=false"]
    larger = ["retrain=true", "retrain_space={num_cells: 4, width: 6}", "baseline=none"]
    short = ["recipe.epochs=2", "recipe.batch_size=16", "recipe.scheduler.warmup_epochs=0"]
    whole = ["recipe.drop_path=0.1", "recipe.aux_weight=0.4", "run_dir=run"]
    commands.succeed("search", *tiny, *cells, *free, *larger, *short, *whole, cwd=tmp_path)
    architecture = Architecture.load(tmp_path / "run" / "architecture.json")
    (entry,) = read(tmp_path / "run" / "retrain" / "result.json")["networks"]
    assert entry["architecture"] == dict(architecture)
    settings = {**json.loads(architecture.settings), "num_cells": 4, "width": 6}
    space = Darts(**settings)
    network = space.build_network(space.architecture(entry["architecture"]), 10)
    assert entry["params"] == sum(p.numel() for p in network.parameters())
    assert entry["predicted_ms"] is None and entry["measured_ms"]["median_ms"] > 0
    refused = commands.refuse(
        "retrain", "run=run", "retrain_space={num_cells: 4}", "init=inherit", "run_dir=no",
        cwd=tmp_path,
    )  # fmt: skip
    assert "leaves no weights to inherit" in refused


# ---- measuring


@pytest.mark.slow
def test_measuring_is_resumed_completed_and_used(commands: Any, tmp_path: Path) -> None:
    arguments = [*commands.TINY, "output=table.json"]
    killed = commands("measure", *arguments, cwd=tmp_path, kill=("round", 2))
    assert killed.code == -9 and not (tmp_path / "table.json").exists()
    journal = tmp_path / "table.json.progress"
    header, *rounds = map(json.loads, journal.read_text().splitlines())
    assert len(rounds) == 2
    # a device that was a million times slower
    slow = [{**row, "ms": [1e6 * ms for ms in row["ms"]]} for row in rounds]
    journal.write_text("".join(json.dumps(line) + "\n" for line in (header, *slow)))
    assert "2 rounds done before" in commands.succeed("measure", *arguments, cwd=tmp_path).out
    assert {p.name for p in tmp_path.iterdir()} == {"table.json", "supernet_cache"}
    table = LatencyTable.load(tmp_path / "table.json")
    # two of three rounds are those of before
    assert table.reference_ms > 1000
    assert {m.num_runs for m in table.measurements.values()} == {3}

    before = (tmp_path / "table.json").read_bytes()
    assert "has every operation" in commands.succeed("measure", *arguments, cwd=tmp_path).out
    assert (tmp_path / "table.json").read_bytes() == before

    content = json.loads(before)
    dropped = [content["measurements"].pop(2), content["measurements"].pop(5)]
    (tmp_path / "table.json").write_text(json.dumps(content))
    search = [*commands.TINY, "latency.table=table.json", "run_dir=run"]
    refused = commands.refuse("search", *search, cwd=tmp_path)
    for row in dropped:
        assert f"{row['op']} in_chs={row['in_chs']} out_chs={row['out_chs']}" in refused
    assert refused.count("in_chs=") == 2
    (command,) = re.findall(r"supernet-(measure .*)$", refused, re.MULTILINE)
    words = shlex.split(command.replace("output=FILE", "output=table.json"))
    commands.succeed(*words, cwd=tmp_path)
    completed = LatencyTable.load(tmp_path / "table.json").measurements
    assert set(completed) == set(table.measurements)
    same = [completed[key] == measurement for key, measurement in table.measurements.items()]
    assert same.count(False) == 2

    shutil.rmtree(tmp_path / "run")
    commands.succeed("search", *search, cwd=tmp_path, report=False)
    kept = LatencyTable.load(tmp_path / "run" / "latency_table.json")
    assert kept.measurements == completed


@pytest.mark.slow
def test_a_table_of_another_target(commands: Any, given: str, tmp_path: Path) -> None:
    search = [*commands.TINY, given, "latency.target.batch=2"]
    refused = commands.refuse("search", *search, "run_dir=no", cwd=tmp_path)
    assert "batch=1 instead of 2" in refused and "allow_other_target=true" in refused
    allowed = [*search, "latency.allow_other_target=true", "run_dir=run"]
    commands.succeed("search", *allowed, cwd=tmp_path, report=False)
    assert read(tmp_path / "run" / "result.json")["predicted"] > 0


# ---- refusals


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "file", "damage"),
    [
        ("derive", "checkpoint/search.safetensors", cut),
        ("derive", "checkpoint/search.safetensors", flip),
        ("derive", "checkpoint/search.safetensors", Path.unlink),
        ("derive", "latency_table.json", cut),
        ("derive", "config.yaml", Path.unlink),
        ("retrain", "architecture.json", cut),
        ("retrain", "result.json", cut),
        ("search", "checkpoint/search.safetensors", flip),
        ("search", "latency_table.json", cut),
    ],
)
def test_damaged_files_are_refused(
    command: str,
    file: str,
    damage: Callable[[Path], None],
    commands: Any,
    run: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run" / file)
    if command == "search":
        (tmp_path / "run" / "report.html").unlink()  # else it is finished
        arguments = [*commands.TINY, "run_dir=run", "resume=true"]
    else:
        arguments = ["run=run", "run_dir=new" if command == "retrain" else "budget_ms=1"]
    refused = commands.refuse(command, *arguments, cwd=tmp_path)
    assert Path(file).name in refused
    assert refused.count("\n") == 1, "one sentence"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["objective.budget_share=null", "objective.budget_ms=1e-6"], "reaches from .* to .* ms"),
        (["objective.budget_ms=1"], "give one budget"),
        (["data=image_folder", "data.train=nowhere", "data.test=nowhere"], "nowhere"),
        (["strategy.arch_optimizer.betas=[0.9,0.999]", "mixed_op=binary_gate"], "beta1 = 0"),
        (["strategy.warmup_epochs=2"], "strategy.warmup_epochs"),
        (["precision=fp8"], "valid: no, bf16, fp16"),
        (["space.kernels=[3,4]"], "kernels must be odd"),
        (["resume=true"], "resume=true needs run_dir"),
        (["latency.table=missing.json"], "no latency table at missing.json"),
        (["objective.limits.macs=1"], "macs <= 1 MACs: the reachable range is [0-9]+ to [0-9]+ M"),
        (["objective.limits.peak_memory=1"], "peak_memory <= 1 bytes: .* is [0-9]+ bytes and more"),
        (["objective.limits.energy=1"], "'cpu' with runtime 'torch' gave no energy of any oper"),
        (["objective.limits.latency=1"], "latency is objective.cost already"),
        (["benchmark.table=no.csv"], "benchmark's table 'no.csv' is not a file"),
        (
            ["search_baseline=random", "+random_estimator.recipe.mixed_precision=bf16"],
            "mixed_precision='bf16' in the recipe of short trainings: .* set precision=bf16",
        ),
        (["exclude=['stage1_1=none']"], "'stage1_1' has no option 'none'; valid: k3_e3"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_settings_are_refused(
    settings: list[str], message: str, commands: Any, given: str, tmp_path: Path
) -> None:
    """Before anything is trained."""
    run_dir = [] if settings == ["resume=true"] else ["run_dir=run"]

    refused = commands.refuse("search", *commands.TINY, given, *settings, *run_dir, cwd=tmp_path)
    assert re.search(message, refused), refused
    assert not list(tmp_path.rglob("checkpoint"))
    assert not any(path.stat().st_size for path in tmp_path.rglob("*.jsonl"))


NAS_RL = (
    "data.img_size=8", "data.train_limit=64", "data.test_limit=20", "device=cpu", "bn_batches=2",
    "latency.network_rounds=3", "latency.burst_ms=0.2", "space=nas_rl", "space.num_layers=3",
)  # fmt: skip


@pytest.mark.slow
def test_a_space_whose_costs_are_no_sums_runs_through(commands: Any, tmp_path: Path) -> None:
    random = ["strategy=random", "estimator=from_scratch", "estimator.steps=2"]
    costs = ["objective=none", "objective.cost=macs", "objective.budget_share=0.2"]
    limits = ["objective.limits.peak_memory=60000", "objective.limits.params=80000"]
    count = ["strategy.num_evaluations=4", "search_baseline=random"]
    commands.succeed(
        "search", *NAS_RL, *random, *count, *costs, *limits, "run_dir=run", cwd=tmp_path
    )
    result = read(tmp_path / "run" / "result.json")
    assert result["budget"] == 0.2 * result["reachable"][1] and result["measured_ms"]
    records = read_journal(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 4 and all(r["cost"] <= result["budget"] for r in records)
    architecture = Architecture.load(tmp_path / "run" / "architecture.json")
    network = SearchSpace.of(architecture).build_network(architecture, 10)
    assert result["costs"]["params"] == sum(p.numel() for p in network.parameters()) <= 80000
    peak = result["limits"]["peak_memory"]["derived"]
    assert all(r["costs"].keys() == {"macs", "params", "peak_memory"} for r in records)
    assert peak == result["costs"]["peak_memory"] == peak_memory(network, (1, 1, 8, 8)) <= 60000
    commands.succeed("derive", "run=run", "output=again", cwd=tmp_path)
    assert Architecture.load(tmp_path / "again" / "architecture.json") == architecture
    short = ["recipe.epochs=1", "recipe.batch_size=16", "recipe.scheduler.warmup_epochs=0"]
    commands.succeed("retrain", "run=run", *short, "device=cpu", cwd=tmp_path)
    derived, best_at_random = read(tmp_path / "run" / "retrain" / "result.json")["networks"]
    assert derived["macs"] == result["costs"]["macs"]
    assert best_at_random["macs"] <= result["budget"]


@pytest.mark.slow
def test_networks_are_measured_whole_where_no_table_could_tell(
    commands: Any, tmp_path: Path
) -> None:
    words = [*NAS_RL, "strategy=random", "estimator=zero_cost", "estimator.batch_size=8"]
    count = ["strategy.num_evaluations=4", "objective.budget_share=0.8", "run_dir=run"]
    commands.succeed("search", *words, *count, cwd=tmp_path)
    result = read(tmp_path / "run" / "result.json")
    assert result["cost"] == {"name": "latency", "unit": "ms"}
    records = read_journal(tmp_path / "run" / "metrics.jsonl")
    assert len(records) == 4 and all(r["costs"]["latency"] <= result["budget"] for r in records)
    known = read_journal(tmp_path / "run" / "network_latencies.jsonl")
    measured = {tuple(record["architecture"].items()): record["ms"] for record in known}
    assert len(measured) == len(known) >= 8  # the ends of the space among them
    assert [measured[tuple(r["architecture"].items())] for r in records] == [
        r["cost"] for r in records
    ]
    assert result["predicted"] == measured[tuple(result["architecture"].items())]
    assert 0.5 < result["measured_ms"]["median_ms"] / result["predicted"] < 2
    commands.succeed("derive", "run=run", "output=again", f"budget_ms={result['predicted']}",
                     cwd=tmp_path)  # fmt: skip
    assert read_journal(tmp_path / "run" / "network_latencies.jsonl")[: len(known)] == known


@pytest.mark.parametrize(
    ("command", "settings", "message"),
    [
        ("search", ["objective=none", "objective.cost=macs"], "FirstOrder needs the expected cost"),
        (
            "search",
            ["strategy=random", "strategy.num_evaluations=1", "estimator=from_scratch",
             "backend=bundle"],
            "each network is measured when the search comes upon it, which backend Bundle cannot",
        ),
        (
            "search",
            ["strategy=random", "strategy.num_evaluations=1", "estimator=from_scratch",
             "objective.cost=energy"],
            "NasRL has no table of energies",
        ),
        ("measure", ["output=table.json"], "NasRL has no latency table"),
    ],
)
def test_what_needs_costs_that_are_sums_is_refused(
    command: str, settings: list[str], message: str, commands: Any, tmp_path: Path
) -> None:
    tiny = [word for word in NAS_RL if command == "search" or word.startswith(("space", "data"))]
    budget = ["objective.budget_share=0.5"] if command == "search" else []
    assert message in commands.refuse(command, *tiny, *settings, *budget, cwd=tmp_path)
