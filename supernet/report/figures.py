"""The report's figures, as SVG text that takes its colours and fonts from the page around it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.colors
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from supernet.report.style import PAGE, WIDTH, new_figure, styled, svg

Record = Mapping[str, Any]

HEAT = matplotlib.colors.to_rgb("#2f7fd1")  # its opacity is the probability


@styled
def probabilities(
    records: Sequence[Record], options: Mapping[str, Sequence[str]], chosen: Mapping[str, str]
) -> str:
    """One heat map a choice, options x epoch.

    Args:
        records: epoch lines that have probabilities.
        options: names by choice.
        chosen: option by choice, set in bold.
    """
    names = list(options)
    columns = min(3, len(names))
    letters = max(len(option) for name in names for option in options[name])
    indent, title, line = 0.2 + 0.076 * letters, 0.3, 0.19  # inches
    width = WIDTH / columns - indent - 0.05
    rows = [names[i : i + columns] for i in range(0, len(names), columns)]
    heights = [line * max(len(options[name]) for name in row) + title + 0.34 for row in rows]
    # dozens of axes take seconds to draw: this is one, in inches from the upper left corner
    height = sum(heights) + 0.25
    figure = Figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    for i, name in enumerate(names):
        left = WIDTH / columns * (i % columns) + indent
        top = sum(heights[: i // columns]) + 0.25 + title
        bottom = top + line * len(options[name])
        alpha = np.clip(np.array([r["probabilities"][name] for r in records], float).T, 0, 1)
        _heat(axes, alpha, (left, left + width, bottom, top))
        axes.text(left, top - 0.07, name, fontsize=9.5)
        for j, option in enumerate(options[name]):
            bold: Any = {"c": PAGE["muted"]}
            if option == chosen.get(name):
                bold = {"fontweight": "bold"}
            y = top + line * (j + 0.5)
            axes.text(left - 0.07, y, option, ha="right", va="center", fontsize=8.5, **bold)
        ends: Any = dict(y=bottom + 0.05, va="top", fontsize=8.5, color=PAGE["muted"])
        axes.text(left, s=f"epoch {records[0]['epoch']}", **ends)
        axes.text(left + width, s=f"{records[-1]['epoch']}", ha="right", **ends)
    _scale(axes, WIDTH - 0.35, 0.08)
    axes.set(xlim=(0, WIDTH), ylim=(height, 0))
    return svg(figure, "probabilities")


@styled
def decided(records: Sequence[Record]) -> str:
    """Entropy, and shares of choices by what their most probable option does, over the epochs."""
    figure = new_figure(2.3)
    axes = figure.add_subplot()
    _line(axes, records, "entropy", "entropy (1: undecided, 0: decided)")
    _line(axes, records, "skip_share", "share of choices that skip", linestyle="--")
    for key, label in (("none_share", "that carry nothing"), ("free_share", "without parameters")):
        if any(_values(records, key)):
            _line(axes, records, key, label, linestyle=":")
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="best")
    _epochs(axes)
    return svg(figure, "decided")


@styled
def curvature(records: Sequence[Record]) -> str:
    """Largest eigenvalue of the Hessian of the loss in the logits, over the epochs."""
    figure = new_figure(2.3)
    axes = figure.add_subplot()
    _line(axes, records, "curvature", "curvature")
    axes.set_ylabel("largest eigenvalue")
    _epochs(axes)
    return svg(figure, "curvature")


@styled
def ranking(
    records: Sequence[Record], chosen: Record, budget: float | None, cost: str, unit: str
) -> str:
    """Accuracy (or score) against cost of the candidates that were ranked; the chosen one stands
    out."""
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    axes.scatter(
        [r["cost"] for r in records], [r["accuracy"] for r in records],
        s=26, color=PAGE["c1"], alpha=0.55, linewidths=0, label=f"{len(records)} candidates",
    )  # fmt: skip
    axes.scatter(
        [chosen["cost"]], [chosen["accuracy"]], s=130, marker="*", color=PAGE["c2"],
        zorder=4, label="best ranked",
    )  # fmt: skip
    if budget is not None:
        axes.axvline(budget, color=PAGE["ink"], linestyle="--", linewidth=1.2, label="budget")
    score = chosen.get("unit", "%") == ""
    axes.set(xlabel=f"{cost} ({unit})", ylabel="score" if score else "accuracy (%)")
    axes.xaxis.set_major_formatter(_number(chosen["cost"]))
    axes.legend(loc="best")
    return svg(figure, "ranking")


@styled
def cost(records: Sequence[Record], budget: float | None, name: str, unit: str) -> str:
    """Expected and argmax cost against the budget, and below it the multiplier, if there is one."""
    learned = any(record.get("multiplier") is not None for record in records)
    figure = new_figure(4.6 if learned else 3.2)
    panels = figure.subplots(
        2 if learned else 1, 1, sharex=True, squeeze=False,
        height_ratios=[2.4, 1] if learned else None,
    )[:, 0]  # fmt: skip
    top = panels[0]
    _line(top, records, "expected_cost", f"expected {name}")
    _line(top, records, "argmax_cost", "most probable network", linestyle="--")
    if budget is not None:
        top.axhline(budget, color=PAGE["ink"], linewidth=1.2, linestyle=":", label="budget")
    top.set_ylabel(f"{name} ({unit})")
    top.yaxis.set_major_formatter(_number(max(_values(records, "expected_cost"), default=0.0)))
    top.legend(loc="best")
    if learned:
        _line(panels[1], records, "multiplier", "multiplier", color=PAGE["c4"])
        panels[1].set_ylabel("multiplier")
    _epochs(panels[-1])
    return svg(figure, "cost")


@styled
def accuracy(records: Sequence[Record]) -> str:
    """Accuracy on the weight half and the architecture half during the search."""
    figure = new_figure(3.0)
    axes = figure.add_subplot()
    _line(axes, records, "train_accuracy", "weight half (training)")
    _line(axes, records, "arch_accuracy", "architecture half", linestyle="--")
    warm = [record["epoch"] for record in records if record["phase"] == "warmup"]
    if warm and len(warm) < len(records):
        axes.axvspan(min(warm) - 0.5, max(warm) + 0.5, color=PAGE["grid"], alpha=0.5, zorder=0)
        axes.text(
            min(warm) - 0.4, 0.98, "warm-up", transform=axes.get_xaxis_transform(),
            va="top", fontsize=8.5, color=PAGE["muted"],
        )  # fmt: skip
    axes.set_ylabel("accuracy (%)")
    axes.legend(loc="lower right")
    _epochs(axes)
    return svg(figure, "accuracy")


@styled
def retraining(curves: Mapping[str, Sequence[Record]], best: Mapping[str, int]) -> str:
    """Validation accuracy of every retrained network; its best epoch is marked.

    Args:
        curves: epoch lines by network; the one named "derived" stands out.
        best: best epoch by network.
    """
    figure = new_figure(3.2)
    axes = figure.add_subplot()
    for i, (name, records) in enumerate(curves.items()):
        main = name == "derived"
        colour = PAGE[f"c{i % 7 + 1}"]
        _line(
            axes, records, "val_accuracy", name, color=colour, zorder=3 if main else 2,
            linewidth=2.6 if main else 1.4, linestyle="-" if main else "--",
        )  # fmt: skip
        marks = [r for r in records if r["epoch"] == best.get(name) and r.get("val_accuracy")]
        axes.scatter(
            [r["epoch"] for r in marks], [r["val_accuracy"] for r in marks],
            s=46 if main else 26, color=colour, zorder=4, linewidths=0,
        )  # fmt: skip
    axes.set_ylabel("validation accuracy (%)")
    axes.legend(loc="lower right", ncols=1 + len(curves) // 6)
    _epochs(axes)
    return svg(figure, "retraining")


@styled
def latency(networks: Sequence[Record]) -> str:
    """Measured against predicted latency, with the line on which they agree.

    Args:
        networks: with `name`, `predicted_ms` and `measured_ms`.
    """
    figure = new_figure(4.4)
    axes = figure.add_subplot()
    ends = [n["predicted_ms"] for n in networks]
    for timing in (n["measured_ms"] for n in networks):
        ends += [timing["median_ms"] + half * timing["iqr_ms"] for half in (-0.5, 0.5)]
    _agreement(axes, 0.87 * min(ends), 1.13 * max(ends), 10)  # the band fits in
    groups = {"derived": [n for n in networks if n["name"] == "derived"],
              "random": [n for n in networks if n["name"] != "derived"]}  # fmt: skip
    for (name, group), (marker, colour) in zip(
        groups.items(), (("D", PAGE["c2"]), ("o", PAGE["c1"])), strict=True
    ):
        if group:
            axes.errorbar(
                [n["predicted_ms"] for n in group],
                [n["measured_ms"]["median_ms"] for n in group],
                yerr=[n["measured_ms"]["iqr_ms"] / 2 for n in group],
                fmt=marker, color=colour, markersize=7, elinewidth=1.2, capsize=2.5, label=name,
            )  # fmt: skip
    axes.legend(loc="upper left", bbox_to_anchor=(1.04, 1.0))
    return svg(figure, "latency")


@styled
def speed(records: Sequence[Record]) -> str:
    """Steps a second, and the share of time spent waiting for data."""
    figure = new_figure(2.7)
    left, right = figure.subplots(1, 2)
    _line(left, records, "steps_per_second", "steps")
    left.set(ylabel="steps per second")
    left.set_ylim(0, 1.15 * max(_values(records, "steps_per_second")))
    _line(right, records, "wait_share", "waiting", color=PAGE["c4"])
    right.set(ylabel="time waiting for data")
    right.set_ylim(-0.005, max([0.1, *(1.15 * v for v in _values(records, "wait_share"))]))
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    _epochs(left)
    _epochs(right)
    return svg(figure, "time")


@styled
def predictions(points: Sequence[Sequence[float]]) -> str:
    """Measured against predicted latency of held-out networks, with the band of 5%.

    Args:
        points: predicted and measured ms of each.
    """
    predicted, measured = np.array(points).T
    figure = new_figure(4.4)
    axes = figure.add_subplot()
    ends = np.concatenate([predicted, measured])
    _agreement(axes, 0.95 * ends.min(), 1.05 * ends.max(), 5)
    axes.plot(predicted, measured, "o", color=PAGE["c1"], markersize=5, label="held-out network")
    axes.legend(loc="upper left", bbox_to_anchor=(1.04, 1.0))
    return svg(figure, "predictions")


@styled
def pareto(
    points: Sequence[Record],
    x: str,
    unit: str,
    front: Sequence[tuple[float, float]] | None = None,
) -> str:
    """Accuracy against cost of the networks of one search, a dashed line at each budget.

    Args:
        points: with `cost`, `accuracy` (percent) and `budget`.
        x: name of the cost.
        unit: of cost and budget.
        front: (cost, accuracy) of the best that there are, the cheapest first.
    """
    figure = new_figure(3.6)
    axes = figure.add_subplot()
    for point in points:
        axes.axvline(point["budget"], color=PAGE["muted"], linewidth=1, linestyle=(0, (4, 3)))
    line = sorted((p["cost"], p["accuracy"]) for p in points)
    axes.plot(
        *zip(*line, strict=True), marker="o", color=PAGE["c1"], markersize=6, label="derived"
    )
    if front:
        low = 0.9 * line[0][0]
        high = max(line[-1][0], *(point["budget"] for point in points))
        seen = [point for point in front if low <= point[0] <= high]
        seen.append((high, max(accuracy for cost, accuracy in front if cost <= high)))
        axes.plot(*zip(*seen, strict=True), drawstyle="steps-post", color=PAGE["c2"], label="best")
        axes.legend()
    axes.set(xlabel=f"{x} ({unit}); dashed: the budgets", ylabel="accuracy (%)")
    axes.xaxis.set_major_formatter(_number(line[-1][0]))
    return svg(figure, "pareto")


def _heat(axes: Axes, alpha: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    """A framed image of one hue; extent is left, right, bottom, top."""
    image = np.empty((*alpha.shape, 4))
    image[..., :3], image[..., 3] = HEAT, alpha
    axes.imshow(image, aspect="auto", interpolation="none", extent=extent)
    left, right, bottom, top = extent
    frame = Rectangle((left, top), right - left, bottom - top, fill=False, ec=PAGE["grid"])
    axes.add_patch(frame)


def _scale(axes: Axes, right: float, top: float) -> None:
    """What the shades of the heat maps mean."""
    style: Any = dict(va="center", fontsize=8.5, color=PAGE["muted"])
    _heat(axes, np.linspace(0, 1, 32)[None], (right - 1.2, right, top + 0.14, top))
    axes.text(right - 1.28, top + 0.07, "probability 0", ha="right", **style)
    axes.text(right + 0.08, top + 0.07, "1", **style)


def _agreement(axes: Axes, low: float, high: float, percent: int) -> None:
    """Where measured and predicted latency agree, and a band of so many percent around it."""
    line, share = np.array([low, high]), percent / 100
    axes.fill_between(line, (1 - share) * line, (1 + share) * line, color=PAGE["grid"], alpha=0.6,
                      linewidth=0, label=f"within {percent}%")  # fmt: skip
    axes.plot(line, line, color=PAGE["muted"], linewidth=1.2, label="measured = predicted")
    axes.set(xlim=line, ylim=line, xlabel="predicted latency (ms)", ylabel="measured latency (ms)")
    axes.set_box_aspect(1)


def _values(records: Sequence[Record], key: str) -> list[float]:
    return [record[key] for record in records if record.get(key) is not None]


def _line(axes: Axes, records: Sequence[Record], key: str, label: str, **style: Any) -> None:
    """A curve over the epochs that have the value; few points are shown as points."""
    points = [(r["epoch"], r[key]) for r in records if r.get(key) is not None]
    marker = "o" if len(points) <= 12 else None
    axes.plot(*zip(*points, strict=True) if points else ([], []), label=label, marker=marker,
              markersize=3.6, **style)  # fmt: skip


def _epochs(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _number(size: float) -> EngFormatter | str:
    """Tick format: 12.3 M for large costs such as MACs, plain numbers for milliseconds."""
    return EngFormatter(sep="\u202f") if size >= 10_000 else "{x:g}"
