"""The jobs of a multirun side by side."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from supernet.files import read_json, write_json, write_text
from supernet.outcome import BEST_AT_RANDOM, RANDOM_SEARCH
from supernet.report.page import number, percent, render

MEANS = {  # over seeds: title and form of each
    "objective": ("objective", percent),
    "accuracy": ("search accuracy (%)", percent),
    "benchmark": ("benchmark (%)", percent),
    "test_accuracy": ("test accuracy (%)", percent),
    "seconds": ("seconds", number),
}


@dataclass(frozen=True)
class Column:
    title: str
    text: bool = False


def comparison_table(run_dirs: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """One row a job folder, and one more for its random search where it has one; a job that left no
    readable result is a failed one.

    Each folder has `.hydra/overrides.yaml` and, unless it failed, `result.json`.

    Returns:
        {"job", "overrides": {key: value} that are not the same in all jobs, "status": "done" or
        "failed", "why" (of a failure), "judge" (of "accuracy"), "unit", "budget", "predicted",
        "predicted_ms", "measured_ms" (median), "accuracy" (percent, in the search), "benchmark"
        (percent, of the benchmark table), "test_accuracy" (percent, derived and retrained),
        "objective", "seconds"}; what a job does not know is None.
    """
    folders, names, overrides = [], [], []
    for folder in map(Path, run_dirs):
        given = overrides_of(folder)
        baseline = (folder / RANDOM_SEARCH / "result.json").exists()
        folders.append(folder)
        names.append(folder.name)
        overrides.append({"strategy": "search", **given} if baseline else given)
        if baseline:
            folders.append(folder / RANDOM_SEARCH)
            names.append(f"{folder.name}/{RANDOM_SEARCH}")
            overrides.append({**given, "strategy": "random"})
    keys = list(dict.fromkeys(key for given in overrides for key in given))
    differ = [key for key in keys if len({given.get(key) for given in overrides}) > 1]
    return [
        {
            "job": name,
            "overrides": {key: given.get(key) for key in differ},
            **_outcome(folder),
        }
        for name, folder, given in zip(names, folders, overrides, strict=True)
    ]


def over_seeds(table: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Jobs that differ in nothing but the seed, together; none where all have the same seed.

    Returns:
        {"overrides": without the seed, "n": jobs that are done, "failed": the others, and for each
        of `MEANS` that all n know {"mean", "std"}}; the deviation is that of the sample
        (n - 1), None for one job.
    """
    if "seed" not in table[0]["overrides"]:
        return []
    groups: dict[tuple[tuple[str, str | None], ...], list[Mapping[str, Any]]] = {}
    for row in table:
        same = tuple((k, v) for k, v in row["overrides"].items() if k != "seed")
        groups.setdefault(same, []).append(row)
    return [{"overrides": dict(same), **_statistics(rows)} for same, rows in groups.items()]


def _statistics(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    done = [row for row in rows if row["status"] == "done"]
    found: dict[str, Any] = {"n": len(done), "failed": len(rows) - len(done)}
    for key in MEANS:
        values = [row[key] for row in done]
        known = bool(values) and None not in values
        found[key] = {
            "mean": statistics.fmean(values) if known else None,
            "std": statistics.stdev(values) if known and len(values) > 1 else None,
        }
    return found


def write_comparison(sweep_dir: str | os.PathLike[str]) -> str:
    """Compare all jobs of a multirun: write comparison.json, .txt and .html into its folder, and
    comparison_over_seeds.json where jobs differ in nothing but the seed.

    Returns:
        The tables as text.

    Raises:
        ValueError: the folder holds no jobs.
    """
    folder = Path(sweep_dir)
    jobs = [path.parent.parent for path in folder.glob("*/.hydra/overrides.yaml")]
    if not jobs:
        raise ValueError(f"{folder} holds no jobs: no folder in it has .hydra/overrides.yaml")
    jobs.sort(key=lambda job: (not job.name.isdigit(), job.name.zfill(12)))
    table = comparison_table(jobs)
    columns, cells = _layout(table)
    text = _text(columns, cells)
    groups = over_seeds(table)
    group_columns, group_cells = _group_layout(groups) if groups else ([], [])
    if groups:
        text += "\n\n" + _text(group_columns, group_cells)
        write_json(folder / "comparison_over_seeds.json", groups)
    failed = sum(row["status"] == "failed" for row in table)
    judges = dict.fromkeys(row["judge"] for row in table if row["judge"])
    page = render(
        "comparison.html.j2",
        title=f"Sweep {folder.resolve().name}",
        subtitle=f"{len(table)} jobs" + (f", {failed} failed" if failed else ""),
        columns=columns,
        rows=[{"cells": line, "failed": row["status"] == "failed"}
              for line, row in zip(cells, table, strict=True)],
        caption="Only the overrides that differ between the jobs are shown. Search accuracy is by "
        + (" or ".join(judges) or "what judged in the search")
        + "; test accuracy is that of the derived network after retraining.",
        group_columns=group_columns,
        group_rows=group_cells,
        group_caption="Mean and standard deviation of jobs that differ in nothing but the seed; n "
        "is their number. Search accuracies by different judges are not comparable: compare the "
        "other columns.",
        zip=zip,
    )  # fmt: skip
    write_json(folder / "comparison.json", table)
    write_text(folder / "comparison.txt", text + "\n")
    write_text(folder / "comparison.html", page)
    return text


def overrides_of(folder: Path) -> dict[str, str]:
    """A job's command line, but for its being resumed: "+a.b=1" is {"a.b": "1"}."""
    path = folder / ".hydra" / "overrides.yaml"
    lines = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else []
    pairs = (str(line).partition("=") for line in lines or ())
    return {key.lstrip("+"): value for key, _, value in pairs if key != "resume"}


def _outcome(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(
        ("why", "judge", "unit", "budget", "predicted", "predicted_ms", "measured_ms", "accuracy",
         "benchmark", "test_accuracy", "objective", "seconds")
    )  # fmt: skip
    try:
        result = read_json(folder / "result.json", "result")
    except ValueError as error:
        why = "it left no result" if not (folder / "result.json").exists() else str(error)
        return {"status": "failed", **row, "why": why}
    for key in ("budget", "predicted", "predicted_ms", "accuracy", "objective"):
        row[key] = result.get(key)
    row["unit"] = result.get("cost", {}).get("unit")
    row["judge"] = result.get("judged_by")
    measured = result.get("measured_ms")
    row["measured_ms"] = measured and measured["median_ms"]
    row["seconds"] = _seconds(result.get("seconds"))
    row["benchmark"] = result.get("benchmark", {}).get("accuracy")
    name, run = "derived", folder
    if folder.name == RANDOM_SEARCH:
        name, run = BEST_AT_RANDOM, folder.parent
    retraining = run / "retrain" / "result.json"
    if "networks" not in result and retraining.exists():
        result = read_json(retraining, "result")
    derived = [n for n in result.get("networks", ()) if n["name"] == name]
    row["test_accuracy"] = derived[0]["accuracy"] if derived else None
    return {"status": "done", **row}


def _seconds(value: float | Mapping[str, float] | None) -> float | None:
    return sum(value.values()) if isinstance(value, Mapping) else value


def _layout(table: Sequence[Mapping[str, Any]]) -> tuple[list[Column], list[list[str]]]:
    """Titles and cells; columns in which no job has a value are left out."""
    keys = list(table[0]["overrides"])
    units = {row["unit"] for row in table} - {None}
    unit = f" ({units.pop()})" if len(units) == 1 else ""
    numbers = [
        (f"budget{unit}", "budget", number),
        (f"predicted{unit}", "predicted", number),
        ("measured (ms)", "measured_ms", number),
        ("search accuracy (%)", "accuracy", percent),
        ("benchmark (%)", "benchmark", percent),
        ("test accuracy (%)", "test_accuracy", percent),
        ("seconds", "seconds", number),
    ]
    numbers = [entry for entry in numbers if any(row[entry[1]] is not None for row in table)]
    columns = [Column("job"), *(Column(key, text=True) for key in keys)]
    columns += [Column("status", text=True), *(Column(title) for title, _, _ in numbers)]
    cells = [
        [row["job"]]
        + [row["overrides"][key] or "" for key in keys]
        + [row["status"] + (f": {row['why']}" if row["why"] else "")]
        + [show(row[key]) for _, key, show in numbers]
        for row in table
    ]
    return columns, cells


def _group_layout(
    groups: Sequence[Mapping[str, Any]],
) -> tuple[list[Column], list[list[str]]]:
    keys = list(groups[0]["overrides"])
    known = [key for key in MEANS if any(g[key]["mean"] is not None for g in groups)]
    columns = [Column(key, text=True) for key in keys] + [Column("n")]
    columns += [Column(MEANS[key][0]) for key in known]
    cells = [
        [group["overrides"][key] or "" for key in keys]
        + [f"{group['n']}" + (f" ({group['failed']} failed)" if group["failed"] else "")]
        + [_mean(group[key], MEANS[key][1]) for key in known]
        for group in groups
    ]
    return columns, cells


def _mean(value: Mapping[str, float | None], show: Callable[[float | None], str]) -> str:
    if value["std"] is None:
        return show(value["mean"])
    return f"{show(value['mean'])} ± {show(value['std'])}"


def _text(columns: Sequence[Column], cells: Sequence[Sequence[str]]) -> str:
    lines = [[column.title for column in columns], *cells]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column.text else cell.rjust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    )
