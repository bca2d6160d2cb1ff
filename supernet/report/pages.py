"""Pages of one figure and one table: a validated latency table, one search under many budgets."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from latency.table import Calibration, LatencyTable
from supernet.files import write_text
from supernet.report import figures
from supernet.report.page import number, percent, render, target_text

_COLUMNS = {
    "mape": "mean error (%)",
    "worst": "worst (%)",
    "within_5": "within 5%",
    "within_10": "within 10%",
    "rmse_ms": "RMSE (ms)",
    "kendall_tau": "Kendall's tau",
    "spearman": "Spearman's rho",
}


def write_validation(
    table: LatencyTable, calibration: Calibration, path: str | os.PathLike[str]
) -> Path:
    """Predicted against measured latency of networks that took no part in the calibration.

    Args:
        calibration: of the table, with a report.
    """
    found = calibration.report
    rows = [
        [name, *(number(values[key]) for key in _COLUMNS)]
        for name, values in (("calibrated", found), ("plain sum", found["uncalibrated"]))
    ]
    page = render(
        "figures.html.j2",
        title="Predicted against measured latency",
        subtitle=f"{table.provenance.get('device_name', '')} · {target_text(table.target)}",
        figure=figures.predictions(found["points"]),
        caption=predictions_caption(calibration),
        columns=["", *_COLUMNS.values()],
        rows=rows,
        note=f"latency = {calibration.call_ms:.4g} ms + {calibration.op_ms:.4g} ms an operation + "
        f"{calibration.scale:.4g} × sum of "
        f"operations + {calibration.weight_ms:.4g} ms a million parameters.",
    )
    path = Path(path)
    write_text(path, page)
    return path


def predictions_caption(calibration: Calibration) -> str:
    found = calibration.report
    return (
        f"{found['num_networks']} random networks, predicted by a table that was calibrated on "
        f"{calibration.num_networks} others: {percent(found['mape'])}% off on average, "
        f"{percent(found['worst'])}% at worst. Two halves of the same measurements differ by "
        f"{percent(found['noise'])}%."
    )


def write_pareto(
    results: Sequence[Mapping[str, Any]],
    title: str,
    path: str | os.PathLike[str],
    front: Sequence[tuple[float, float]] | None = None,
) -> Path:
    """One search under several budgets.

    Args:
        results: as `result.json` of each budget; with `front`, all have `benchmark`.
        front: (predicted cost, accuracy) of the best architectures of a benchmark table, which is
            drawn beside the derived ones, as the table has them.
    """
    name, unit = (results[0]["cost"][key] for key in ("name", "unit"))
    columns = [f"budget ({unit})", f"predicted ({unit})", "measured (ms)", "binding",
               "accuracy (%)", "architecture"]  # fmt: skip
    rows, points = [], []
    for result in results:
        measured = result["measured_ms"] and result["measured_ms"]["median_ms"]
        cost = result["predicted"] if measured is None or unit != "ms" else measured
        points.append({"cost": cost, "accuracy": result["accuracy"], "budget": result["budget"]})
        rows.append(
            [
                number(result["budget"]),
                number(result["predicted"]),
                number(measured),
                {True: "yes", False: "no", None: "–"}[result["binding"]],
                percent(result["accuracy"]),
                " ".join(result["architecture"].values()),
            ]
        )
    judges = " or ".join(dict.fromkeys(result["judged_by"] for result in results))
    caption = (
        f"Accuracy in the search, by {judges}: what ranks networks of one search, not what "
        "retraining gives."
    )
    note = ""
    if front is not None:
        caption, note = _FRONT_CAPTION, f"Accuracy: {caption}"
        columns[5:5] = ["benchmark (%)", "best within budget (%)"]
        for row, point, result in zip(rows, points, results, strict=True):
            judged = result["benchmark"]
            row[5:5] = [percent(judged["accuracy"]), percent(judged["best_within"])]
            point.update(cost=result["predicted"], accuracy=judged["accuracy"])
    page = render(
        "figures.html.j2",
        title=title,
        subtitle=f"{len(results)} budgets, one search",
        figure=figures.pareto(points, name, unit, front),
        caption=caption,
        columns=columns,
        rows=rows,
        note=note,
    )
    path = Path(path)
    write_text(path, page)
    return path


_FRONT_CAPTION = (
    "Accuracy by the benchmark's table against predicted cost: what one search derived for each "
    "budget, and the best architectures that the table holds."
)
