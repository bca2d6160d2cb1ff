"""Searches that try architectures side by side: the best so far against evaluations and seconds."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from supernet.files import write_json, write_text
from supernet.outcome import RANDOM_SEARCH
from supernet.report.comparison import overrides_of
from supernet.report.page import number, percent, render, scale
from supernet.report.style import new_figure, styled, svg
from supernet.tracking import read_journal

QUARTILES = (0.25, 0.5, 0.75)
UNTOLD = ("seed", "run_dir")  # overrides that do not set a search apart


@dataclass(frozen=True)
class Course:
    """How a search went.

    Attributes:
        name: what sets it apart from others, the seed aside.
        best: accuracy of the best architecture so far by the search's own ranking, after each
            evaluation; NaN where only parts were judged by then.
        seconds: that the search had taken by then.
        oracle: whether it was judged by the truth.
        judge: what the accuracies are of.
        unit: of them; none of scores.
    """

    name: str
    best: tuple[float, ...]
    seconds: tuple[float, ...]
    oracle: bool
    judge: str
    unit: str = "%"


def read_courses(folders: Sequence[str | os.PathLike[str]]) -> list[Course]:
    """Of run folders, and of the random searches in them; multirun folders stand for their jobs.

    Raises:
        ValueError: there is none, or one tried no architectures one by one.
    """
    return [read_course(folder, name) for folder, name in name_runs(find_runs(folders))]


def name_runs(folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """Runs and the random searches in them, each with the overrides that set it apart from others,
    the seed and the place aside."""
    runs: list[tuple[Path, dict[str, str]]] = []
    for folder in folders:
        given = overrides_of(folder)
        runs.append((folder, given))
        if (folder / RANDOM_SEARCH / "metrics.jsonl").exists():
            runs.append((folder / RANDOM_SEARCH, {**given, "strategy": "random baseline"}))
    keys = dict.fromkeys(key for _, given in runs for key in given if key not in UNTOLD)
    differ = [key for key in keys if len({given.get(key) for _, given in runs}) > 1]
    names = [", ".join(f"{k}={given[k]}" for k in differ if k in given) for _, given in runs]
    return [(folder, name or "search") for (folder, _), name in zip(runs, names, strict=True)]


def find_runs(folders: Sequence[str | os.PathLike[str]]) -> list[Path]:
    """Run folders as they are, and those of the jobs of sweeps.

    Raises:
        ValueError: a folder is neither.
    """
    found = []
    for folder in map(Path, folders):
        jobs = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
        own = [folder] if (folder / "metrics.jsonl").exists() else jobs
        if not own:
            raise ValueError(
                f"{folder} holds neither a search nor the jobs of a sweep: it has no metrics.jsonl"
            )
        found += own
    return found


def read_course(folder: Path, name: str) -> Course:
    """Of one run.

    Raises:
        ValueError: it tried no architectures one by one.
    """
    journal = read_journal(folder / "metrics.jsonl")
    records = [r for r in journal if r["phase"] in ("rank", "part")]
    spent = {line["step"]: line["seconds"] for line in read_journal(folder / "timing.jsonl")}
    if not records or any("judge" not in r or r["step"] not in spent for r in records):
        raise ValueError(
            f"{folder} is no search that tried architectures one by one (strategy=random, "
            "evolution, ...), or it has not begun"
        )
    best: list[float] = []
    least, found = math.inf, False
    for record in records:
        if record["phase"] == "rank" and (record["rank_value"] < least or not found):
            least, found = record["rank_value"], True
            best.append(record["accuracy"])
        else:
            best.append(best[-1] if best else math.nan)
    seconds = tuple(spent[record["step"]] for record in records)
    first = records[0]
    return Course(name, tuple(best), seconds, first["oracle"], first["judge"], first["unit"])


@dataclass(frozen=True)
class Group:
    """Searches that differ in nothing but the seed.

    Attributes:
        after: (n, evaluations) best so far after each evaluation that all searches have made.
        at: (n, times) best so far at some times.
        times: seconds.
    """

    name: str
    courses: Sequence[Course]
    after: np.ndarray
    at: np.ndarray
    times: np.ndarray


def group(courses: Sequence[Course]) -> list[Group]:
    """Groups of equal budget: all are cut where the shortest search of all ends, by evaluations and
    by seconds."""
    number_of = min(len(course.best) for course in courses)
    latest = min(course.seconds[-1] for course in courses)
    earliest = max(course.seconds[0] for course in courses)
    times = np.linspace(earliest, max(latest, earliest), 200)
    groups = []
    for name in dict.fromkeys(course.name for course in courses):
        own = [course for course in courses if course.name == name]
        after = np.array([course.best[:number_of] for course in own])
        at = np.array([
            [c.best[max(0, int(np.searchsorted(c.seconds, t, side="right")) - 1)] for t in times]
            for c in own
        ])  # fmt: skip
        groups.append(Group(name, own, after, at, times))
    return groups


def summarise(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """A row a group: what it had found when the shortest search had ended."""
    rows = []
    for one in groups:
        last = one.after[:, -1]
        rows.append({
            "name": one.name,
            "n": len(last),
            "evaluations": one.after.shape[1],
            "mean": _known(last.mean()),
            "std": _known(last.std(ddof=1)) if len(last) > 1 else None,
            "quartiles": [_known(q) for q in np.quantile(last, QUARTILES)],
            "seconds": float(np.mean([c.seconds[one.after.shape[1] - 1] for c in one.courses])),
            "mean_at_equal_seconds": _known(one.at[:, -1].mean()),
            "oracle": one.courses[0].oracle,
            "judge": one.courses[0].judge,
            "unit": one.courses[0].unit,
        })  # fmt: skip
    return rows


def _known(value: float) -> float | None:
    """None where a search had judged parts alone."""
    return None if math.isnan(value) else float(value)


@styled
def draw(groups: Sequence[Group]) -> str:
    """Mean and quartiles of the best so far, against evaluations and against seconds."""
    figure = new_figure(3.6)
    left, right = figure.subplots(1, 2, sharey=True)
    for index, one in enumerate(groups):
        colour = f"C{index % 7}"
        evaluations = np.arange(1, one.after.shape[1] + 1)
        _band(left, evaluations, one.after, colour, one.name)
        _band(right, one.times, one.at, colour, one.name)
    unit = scale(course.unit for one in groups for course in one.courses)
    left.set(xlabel="evaluations", ylabel=f"best so far ({unit})")
    right.set(xlabel="seconds")
    left.legend(loc="lower right")
    return svg(figure, "progress")


def _band(axes: Axes, x: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    low, _, high = np.quantile(values, QUARTILES, axis=0)
    axes.fill_between(x, low, high, color=colour, alpha=0.15, step="post", linewidth=0)
    axes.plot(x, values.mean(axis=0), color=colour, drawstyle="steps-post", label=label)


def write_progress(
    folders: Sequence[str | os.PathLike[str]], output: str | os.PathLike[str]
) -> tuple[Path, list[dict[str, Any]]]:
    """Compare searches: `progress.json` and `progress.html` in the folder `output`.

    Returns:
        The page, and its rows.

    Raises:
        ValueError: as `read_courses`.
    """
    courses = read_courses(folders)
    groups = group(courses)
    rows = summarise(groups)
    title = "Best so far"
    if any(row["oracle"] for row in rows):
        title += " (oracle: judged by the benchmark's table)"
    unit = scale(row["unit"] for row in rows)
    lengths = {len(course.best) for course in courses}
    cut = f"; the longest made {max(lengths)}" if len(lengths) > 1 else ""
    page = render(
        "figures.html.j2",
        title=title,
        subtitle=f"{len(courses)} searches, {rows[0]['evaluations']} evaluations each{cut}",
        figure=draw(groups),
        caption="The best architecture so far, by "
        + " or ".join(dict.fromkeys(row["judge"] for row in rows))
        + ": mean and quartiles over seeds. All searches are cut where the shortest one ends.",
        columns=["", "n", f"mean ({unit})", "deviation", f"quartiles ({unit})", "seconds",
                 f"mean at equal seconds ({unit})"],
        rows=[
            [row["name"] + (" (oracle)" if row["oracle"] else ""), str(row["n"]),
             percent(row["mean"]), percent(row["std"]), " / ".join(map(percent, row["quartiles"])),
             number(row["seconds"]), percent(row["mean_at_equal_seconds"])]
            for row in rows
        ],
        note="What different judges say is not comparable."
        if len({row["judge"] for row in rows}) > 1 else "",
    )  # fmt: skip
    path = Path(output) / "progress.html"
    write_text(path, page)
    write_json(path.with_suffix(".json"), rows)
    return path, rows
