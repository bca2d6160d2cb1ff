"""Distributions of spaces: F(e) = share of sampled architectures below e (Radosavovic et al. 2019,
2020, section 3.1; of costs: Lin et al. 2020, section 3.1)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from supernet.files import write_json, write_text
from supernet.report.page import number, render
from supernet.report.progress import find_runs, name_runs
from supernet.report.style import new_figure, styled, svg
from supernet.tracking import read_journal

ERROR = "error"


def edf(values: Sequence[float], at: Sequence[float]) -> list[float]:
    """F at each of some points: the share of values strictly below it."""
    ordered = np.sort(np.asarray(values, dtype=float))
    return [float(n) / len(ordered) for n in np.searchsorted(ordered, at, side="left")]


def read_values(folder: Path, of: str) -> list[float]:
    """Of each architecture that a search judged.

    Args:
        of: "error" (in percent), or a cost that the records have: macs, params, latency, energy.

    Raises:
        ValueError: it judged none, or its records do not have it.
    """
    journal = read_journal(folder / "metrics.jsonl")
    records = [r for r in journal if r["phase"] == "rank" and "judge" in r]
    if not records:
        raise ValueError(
            f"{folder} judged no architectures one by one: sample a space by strategy=random"
        )
    if of == ERROR:
        if not records[0]["unit"]:
            raise ValueError(
                f"{folder} was judged by {records[0]['judge']}, which is no accuracy and has no "
                "error: sample with estimator=from_scratch, shared_weights or table"
            )
        return [100 - record["accuracy"] for record in records]
    if of not in records[0]["costs"]:
        raise ValueError(
            f"edf={of!r} is not in the records of {folder}; valid: "
            + ", ".join([ERROR, *records[0]["costs"]])
        )
    return [record["costs"][of] for record in records]


def write_edf(
    folders: Sequence[str | os.PathLike[str]], of: str, output: str | os.PathLike[str]
) -> tuple[Path, list[dict[str, Any]]]:
    """The distributions of several samples in one plot: `edf_OF.html` and `.json` in `output`.
    Samples that differ in nothing but the seed are put together.

    Returns:
        The page, and a row a sample.

    Raises:
        ValueError: as `read_values`; or a folder holds no run.
    """
    samples: dict[str, list[float]] = {}
    for folder, name in name_runs(find_runs(folders)):
        samples.setdefault(name, []).extend(read_values(folder, of))
    rows: list[dict[str, Any]] = [
        {"name": name, "n": len(values), "of": of, "least": min(values),
         "quartiles": [float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))],
         "values": sorted(values)}
        for name, values in samples.items()
    ]  # fmt: skip
    x = "error (%)" if of == ERROR else of
    page = render(
        "figures.html.j2",
        title=f"Distribution of {of}",
        subtitle=", ".join(f"{row['name']}: {row['n']} architectures" for row in rows),
        figure=_draw(samples, x),
        caption=f"F(x): the share of architectures whose {of} is below x. Of errors, the curve "
        "further up and left is the better space; of the MACs that a memory limit leaves, the one "
        "further right.",
        columns=["", "n", "least", "quartiles"],
        rows=[[row["name"], str(row["n"]), number(row["least"]),
               " / ".join(number(q) for q in row["quartiles"])] for row in rows],
        note="",
    )  # fmt: skip
    path = Path(output) / f"edf_{of}.html"
    write_text(path, page)
    write_json(path.with_suffix(".json"), rows)
    return path, rows


@styled
def _draw(samples: Mapping[str, Sequence[float]], x: str) -> str:
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    every = np.unique(np.concatenate([np.asarray(values) for values in samples.values()]))
    points = [*every.tolist(), float(every[-1] + 0.02 * np.ptp(every))]
    for name, values in samples.items():
        axes.plot(points, edf(values, points), drawstyle="steps-pre", label=name)
    axes.set(xlabel=x, ylabel="F", ylim=(0, 1.02))
    axes.legend(loc="lower right")
    return svg(figure, "edf")
