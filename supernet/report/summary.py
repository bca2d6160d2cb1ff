"""The report's numbers at a glance: verdict, cards and the table of retrained networks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from supernet.report.page import number, percent, target_text
from supernet.report.run import Record, Run

_SUPERSCRIPT = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Card:
    label: str
    value: str
    unit: str = ""
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A line of the table; `style` is a CSS class."""

    name: str
    cells: tuple[str, ...]
    style: str = ""


def subtitle(run: Run) -> str:
    """Space and target, as far as the folder tells."""
    parts = []
    if run.space is not None:
        parts.append(f"{type(run.space).__name__}, {_size(run.space.size)} architectures")
    if run.table is not None:
        parts.append(target_text(run.table.target))
    return " · ".join(parts) or "A retraining"


def _size(size: int) -> str:
    exponent = len(str(size)) - 1
    if exponent < 9:
        return f"{size:,}"
    return f"{size / 10**exponent:.1f} × 10{str(exponent).translate(_SUPERSCRIPT)}"


def verdict(run: Run) -> tuple[str, str] | None:
    """CSS class and sentence: does the network meet the budget, as predicted and as measured?"""
    if run.result is None or run.budget is None:
        return None
    (name, unit), predicted = run.cost, run.result["predicted"]
    kept = predicted <= run.budget
    text = (
        f"The derived network {'meets' if kept else 'misses'} its budget of {number(run.budget)} "
        f"{unit} with a predicted {name} of {number(predicted)} {unit}"
    )
    limits = run.result.get("limits", {})
    if over := [key for key, limit in limits.items() if limit["derived"] > limit["limit"]]:
        text += f", above its limit of {' and '.join(over)}"
        kept = False
    elif limits:
        text += f", within its limit of {' and '.join(limits)}"
    measured = run.result.get("measured_ms")
    if name == "latency" and measured is not None:
        share = measured["median_ms"] / run.budget - 1
        where = f"{abs(100 * share):.1f}% {'under' if share <= 0 else 'over'} the budget"
        text += f"; measured whole, it takes {number(measured['median_ms'])} ms, {where}"
        kept = kept and share <= 0
    return ("good" if kept else "bad"), text + "."


def cards(run: Run) -> list[Card]:
    """The derived network's numbers, of the search and of the retraining."""
    found = _search_cards(run) if run.result is not None else []
    derived = next((n for n in run.networks if n["name"] == "derived"), None)
    if derived is not None:
        note = f"retrained, best epoch {derived['best_epoch']}"
        found += [
            Card("Test accuracy", percent(derived["accuracy"]), "%", note),
            Card("Parameters", number(derived["params"]), "", "of the derived network"),
            Card("MACs", number(derived["macs"]), "", "an image"),
        ]
    return found


def _search_cards(run: Run) -> list[Card]:
    assert run.result is not None
    result, (name, unit) = run.result, run.cost
    predicted, reach = result["predicted"], result["reachable"]
    span = f"reachable {number(reach[0])} to {number(reach[1])} {unit}"
    note = "no budget was set"
    if run.budget:
        note = f"{100 * predicted / run.budget:.1f}% of the budget"
        note += ", which does not bind" if result["binding"] is False else ""
    if (plain := result["uncalibrated_ms"]) is not None and name == "latency":
        note += f"; {number(plain)} ms before calibration"
    found = [
        Card("Budget", number(run.budget), unit if run.budget is not None else "", span),
        Card(f"Predicted {name}", number(predicted), unit, note),
    ]
    found += [_limit_card(*item) for item in result.get("limits", {}).items()]
    measured, predicted_ms = result.get("measured_ms"), result.get("predicted_ms")
    if measured is not None:
        note = f"median of {measured['num_runs']} runs, IQR {number(measured['iqr_ms'], 2)} ms"
        if predicted_ms:
            note += f", {100 * (measured['median_ms'] / predicted_ms - 1):+.1f}% from predicted"
        found.append(Card("Measured latency", number(measured["median_ms"]), "ms", note))
    note, unit = result.get("judged_by", "inherited weights"), result.get("accuracy_unit", "%")
    note = f"architecture half, {note}" if unit and not result.get("oracle") else note
    title = "Accuracy in the search" if unit else "Score in the search"
    return [*found, Card(title, percent(result["accuracy"]), unit, note)]


def _limit_card(name: str, limit: Record) -> Card:
    share = 100 * limit["derived"] / limit["limit"]
    note = f"{share:.1f}% of the limit of {number(limit['limit'])} {limit['unit']}"
    if limit["multiplier"] is not None:
        note += f", multiplier {number(limit['multiplier'])}"
    label = f"Predicted {name.replace('_', ' ')}"
    return Card(label, number(limit["derived"]), limit["unit"], note)


def network_rows(networks: Sequence[Record]) -> list[Row]:
    """A row a retrained network, and one for the mean of the random ones."""
    rows = [
        Row(n["name"], (
            percent(n["accuracy"]), percent(n["val_accuracy"]), number(n["predicted_ms"]),
            _measured(n), number(n["params"]), number(n["macs"]),
        ), "main" if n["name"] == "derived" else "")
        for n in networks
    ]  # fmt: skip
    if random := _random(networks):
        medians = [{**n, "measured": n["measured_ms"] and n["measured_ms"]["median_ms"]}
                   for n in random]  # fmt: skip
        means = [
            _mean(medians, key)
            for key in ("accuracy", "val_accuracy", "predicted_ms", "measured", "params", "macs")
        ]
        cells = (*map(percent, means[:2]), *map(number, means[2:]))
        rows.append(Row(f"mean of random (n = {len(random)})", cells, "mean"))
    return rows


def networks_caption(networks: Sequence[Record]) -> str:
    """What the table compares, and how far apart the two sides are."""
    text = "Test accuracy was read once, at the end; measured latency is median and IQR."
    random = [n["accuracy"] for n in _random(networks)]
    derived = next((n["accuracy"] for n in networks if n["name"] == "derived"), None)
    if not random or derived is None:
        return text + " To compare with random networks: supernet-retrain baseline=random."
    gap = derived - statistics.fmean(random)
    text += f" Derived minus mean of random (n = {len(random)}): {gap:+.2f} points of test accuracy"
    if len(random) > 1:
        text += f"; the random ones have a standard deviation of {statistics.stdev(random):.2f}"
    return text + ". One retraining each: small differences are noise."


def _random(networks: Sequence[Record]) -> list[Record]:
    return [n for n in networks if n["name"].startswith("random")]


def _mean(networks: Sequence[Record], key: str) -> float | None:
    values = [n[key] for n in networks if n[key] is not None]
    return statistics.fmean(values) if values else None


def _measured(network: Record) -> str:
    measured = network["measured_ms"]
    if measured is None:
        return number(None)
    return f"{number(measured['median_ms'])} (IQR {number(measured['iqr_ms'], 2)})"
