"""The jobs of a multirun side by side."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from supernet.files import read_json, write_json, write_text
from supernet.report.page import number, percent, render


@dataclass(frozen=True)
class Column:
    title: str
    text: bool = False


def comparison_table(run_dirs: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """One row a job folder; a job that left no readable result is a failed one.

    Each folder has `.hydra/overrides.yaml` and, unless it failed, `result.json`.

    Returns:
        {"job", "overrides": {key: value} that are not the same in all jobs, "status": "done" or
        "failed", "why" (of a failure), "unit", "budget", "predicted", "predicted_ms",
        "measured_ms" (median), "accuracy" (percent, in the search), "test_accuracy" (percent,
        derived and retrained), "objective", "seconds"}; what a job does not know is None.
    """
    folders = [Path(folder) for folder in run_dirs]
    overrides = [_overrides(folder) for folder in folders]
    keys = list(dict.fromkeys(key for given in overrides for key in given))
    differ = [key for key in keys if len({given.get(key) for given in overrides}) > 1]
    return [
        {
            "job": folder.name,
            "overrides": {key: given.get(key) for key in differ},
            **_outcome(folder),
        }
        for folder, given in zip(folders, overrides, strict=True)
    ]


def write_comparison(sweep_dir: str | os.PathLike[str]) -> str:
    """Compare all jobs of a multirun: write comparison.json, .txt and .html into its folder.

    Returns:
        The table as text.

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
    failed = sum(row["status"] == "failed" for row in table)
    page = render(
        "comparison.html.j2",
        title=f"Sweep {folder.resolve().name}",
        subtitle=f"{len(table)} jobs" + (f", {failed} failed" if failed else ""),
        columns=columns,
        rows=[{"cells": line, "failed": row["status"] == "failed"}
              for line, row in zip(cells, table, strict=True)],
        caption="Only the overrides that differ between the jobs are shown. Search accuracy is on "
        "the architecture half with inherited weights; test accuracy is that of the derived "
        "network after retraining.",
        zip=zip,
    )  # fmt: skip
    write_json(folder / "comparison.json", table)
    write_text(folder / "comparison.txt", text + "\n")
    write_text(folder / "comparison.html", page)
    return text


def _overrides(folder: Path) -> dict[str, str]:
    """A job's command line: "+a.b=1" is {"a.b": "1"}."""
    path = folder / ".hydra" / "overrides.yaml"
    lines = OmegaConf.to_container(OmegaConf.load(path)) if path.exists() else []
    pairs = (str(line).partition("=") for line in lines or ())
    return {key.lstrip("+"): value for key, _, value in pairs}


def _outcome(folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(
        ("why", "unit", "budget", "predicted", "predicted_ms", "measured_ms", "accuracy",
         "test_accuracy", "objective", "seconds")
    )  # fmt: skip
    try:
        result = read_json(folder / "result.json", "result")
    except ValueError as error:
        why = "it left no result" if not (folder / "result.json").exists() else str(error)
        return {"status": "failed", **row, "why": why}
    for key in ("budget", "predicted", "predicted_ms", "accuracy", "objective"):
        row[key] = result.get(key)
    row["unit"] = result.get("cost", {}).get("unit")
    measured = result.get("measured_ms")
    row["measured_ms"] = measured and measured["median_ms"]
    row["seconds"] = _seconds(result.get("seconds"))
    retraining = folder / "retrain" / "result.json"
    if "networks" not in result and retraining.exists():
        result = read_json(retraining, "result")
    derived = [n for n in result.get("networks", ()) if n["name"] == "derived"]
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
