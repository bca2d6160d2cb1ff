"""The page of one run: its sections, each with figures or with the reason why it has none."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from supernet.files import write_text
from supernet.report import figures, progress
from supernet.report.diagram import Drawing, draw
from supernet.report.page import number, percent, render
from supernet.report.pages import predictions_caption
from supernet.report.run import Record, Run
from supernet.report.summary import cards, network_rows, networks_caption, subtitle, verdict
from supernet.tracking import last_epoch

_NO_EPOCHS = "This search had no epochs: it tried architectures one by one."
_NO_RETRAINING = "This run did not retrain: run supernet-retrain run={}."


@dataclass(frozen=True)
class Figure:
    """An SVG element and what one sees in it."""

    svg: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the page; without anything to show, `missing` says why."""

    id: str
    title: str
    figures: tuple[Figure, ...] = ()
    missing: str = ""


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write `report.html` into a run folder: self-contained, it loads nothing from anywhere.

    Returns:
        Its path.

    Raises:
        ValueError: the folder holds no run, or a damaged file.
    """
    run = Run(run_dir)
    drawing = draw(run.space, run.architecture) if run.space and run.architecture else None
    sections = [
        Section("summary", "Summary"),
        Section("architecture", "Derived architecture", missing=_no_drawing(run, drawing)),
        _probabilities(run),
        _cost(run),
        _accuracy(run),
        _latency(run),
        _time(run),
        Section("config", "Configuration",
                missing="" if run.config else "The run folder has no config.yaml."),
    ]  # fmt: skip
    page = render(
        "report.html.j2",
        title=f"Run {run.folder.resolve().name}",
        subtitle=subtitle(run),
        sections=sections,
        verdict=verdict(run),
        cards=cards(run),
        networks=network_rows(run.networks),
        networks_caption=networks_caption(run.networks),
        networks_missing=_NO_RETRAINING.format(run.folder),
        drawing=drawing,
        drawing_caption=_CHAIN if drawing and drawing.chain else _GRAPH,
        config_lines=[_yaml_line(line) for line in run.config.splitlines()],
    )
    path = run.folder / "report.html"
    write_text(path, page)
    return path


def _no_drawing(run: Run, drawing: Drawing | None) -> str:
    if drawing is not None:
        return ""
    if run.retraining is not None and run.result is None:
        return "This is a retraining; the architecture is drawn in the report of its search."
    return "The search has not derived an architecture: it is still running, or was interrupted."


def _probabilities(run: Run) -> Section:
    title = "Probabilities over time"
    records = [r for r in run.epochs if r.get("probabilities")]
    if records and run.space and run.architecture:
        options = {name: run.space.by_name[name].options for name in records[0]["probabilities"]}
        heat = figures.probabilities(records, options, dict(run.architecture))
        caption = (
            "One panel a choice, one row an option, epochs from left to right; the stronger the "
            "blue, the more probable. The derived network has the options in bold."
        )
        found = [Figure(heat, caption)]
        if any(r.get("entropy") is not None for r in records):
            caption = (
                "Mean entropy of the choices, as a share of the entropy of a uniform choice, and "
                "the share of choices whose most probable option computes nothing, carries "
                "nothing, or has no parameters." + _collapse(run)
            )
            found.append(Figure(figures.decided(records), caption))
        if any(r.get("curvature") is not None for r in records):
            caption = (
                "Largest eigenvalue of the Hessian of the loss on the architecture half in the "
                "logits: where it grows fast, derived networks are often bad."
            )
            found.append(Figure(figures.curvature(records), caption))
        return Section("probabilities", title, tuple(found))
    if run.ranked:
        best = _best_ranked(run)
        found_in_it = percent(best["accuracy"]) + best.get("unit", "%")
        figure = figures.ranking(run.ranked, best, run.budget, *run.cost)
        caption = (
            f"This method has no logits: it judges single networks instead. Each point is one of "
            f"{len(run.ranked)} candidates, judged {_how_judged(best)}; the star is the one "
            f"chosen, {found_in_it} at {number(best['cost'])} {run.cost[1]}."
        )
        found = [Figure(figure, caption), *_progress(run)]
        return Section("probabilities", "Ranking of candidates", tuple(found))
    if records:
        reason = "The search has not ended: its options are known once architecture.json is there."
    elif run.result is None and run.retraining is not None:
        reason = "This is a retraining; the probabilities are in the report of its search."
    else:
        reason = "No epoch recorded probabilities: the search has not passed its warm-up."
    return Section("probabilities", title, missing=reason)


def _progress(run: Run) -> list[Figure]:
    """How a search went that tried architectures one by one."""
    if not run.tries:
        return []
    course = progress.read_course(run.folder, "search")
    taken = f"{len(course.best)} took {number(course.seconds[-1])} s"
    caption = f"The best so far, by evaluations and by seconds; {taken}."
    notes = [r for r in run.metrics if r["phase"] == "surrogate"]
    if notes:
        ranks = ", ".join(
            f"{'none' if r['rank_correlation'] is None else format(r['rank_correlation'], '.2f')} "
            f"for {r['judged']} of {r['num_blocks']} blocks"
            for r in notes
        )
        caption += (
            " Rank correlation of what the surrogate predicted, fitted to cells of fewer blocks, "
            f"with what was then found: {ranks}."
        )
    return [Figure(progress.draw(progress.group([course])), caption)]


def _collapse(run: Run) -> str:
    """What the monitor saw, in sentences."""
    acts = {"warn": "warned", "stop": "stopped the search", "rollback": "went back"}
    text = ""
    for record in run.collapse:
        text += f" After epoch {record['epoch']} the monitor {acts[record['action']]}"
        if record["good_epoch"] is not None:
            text += f" to epoch {record['good_epoch']}"
        text += f": {record['why']}."
    return text


def _how_judged(record: Record) -> str:
    if (judge := record.get("judge")) is not None:
        return f"by {judge}"
    steps = record.get("steps")
    how = "with the shared weights" if steps is None else f"after {steps} steps of its own"
    return f"{how} on the architecture half"


def _best_ranked(run: Run) -> Record:
    derived = (run.result or {}).get("architecture")
    same = [r for r in run.ranked if r.get("architecture") == derived]
    return same[-1] if same else max(run.ranked, key=lambda r: r["accuracy"])


def _cost(run: Run) -> Section:
    name, unit = run.cost
    title = f"Expected {name} against the budget"
    records = [r for r in run.epochs if r.get("expected_cost") is not None]
    if not records:
        reason = (
            f"This method has no logits, and so no expected {name}; the ranking above shows the "
            f"{name} of every candidate."
            if run.ranked
            else f"No epoch recorded an expected {name}."
        )
        return Section("cost", title, missing=reason)
    last = last_epoch(run.metrics) or records[-1]
    goal = "there was no budget" if run.budget is None else f"budget {number(run.budget)} {unit}"
    caption = (
        f"Expected {name} under the probabilities, and {name} of the most probable network, after "
        f"every epoch; at the end {number(last['expected_cost'])} and "
        f"{number(last.get('argmax_cost'))} {unit}, {goal}."
    )
    if last.get("multiplier") is not None:
        caption += " The multiplier grows while the expectation is above the budget."
    return Section("cost", title, (Figure(figures.cost(records, run.budget, name, unit), caption),))


def _accuracy(run: Run) -> Section:
    found = []
    if any(r.get("train_accuracy") is not None for r in run.epochs):
        caption = (
            "Search: accuracy with the shared weights in training mode, on the half that trains "
            "the weights and on the half that trains the architecture."
        )
        found.append(Figure(figures.accuracy(run.epochs), caption))
    if run.curves:
        best = {n["name"]: n["best_epoch"] for n in run.networks}
        caption = (
            "Retraining: accuracy on the part of the training set held out to choose the best "
            "epoch (the dot); where averaged weights are kept, the better of the two."
        )
        found.append(Figure(figures.retraining(run.curves, best), caption))
    missing = _NO_EPOCHS if run.tries else "No epoch has ended yet."
    return Section("accuracy", "Accuracy", tuple(found), "" if found else missing)


def _latency(run: Run) -> Section:
    title = "Predicted against measured latency"
    found = _whole_networks(run)
    calibration = run.calibration
    if calibration is not None and calibration.report:
        figure = figures.predictions(calibration.report["points"])
        found.append(Figure(figure, predictions_caption(calibration)))
    if found:
        return Section("latency", title, tuple(found))
    reason = "No network of this run has both a predicted and a measured latency: "
    reason += "the search ran without a latency table." if run.table is None else (
        "nothing was measured whole."
    )  # fmt: skip
    return Section("latency", title, missing=reason)


def _whole_networks(run: Run) -> list[Figure]:
    """The networks of this run, where they were measured."""
    networks = [n for n in run.networks if _has_both(n)]
    if run.result and _has_both(run.result) and all(n["name"] != "derived" for n in networks):
        networks.insert(0, {**run.result, "name": "derived"})
    if not networks:
        return []
    errors = [n["measured_ms"]["median_ms"] / n["predicted_ms"] - 1 for n in networks]
    what = f"Of {len(networks)} networks" if len(networks) > 1 else "Of one network"
    caption = (
        f"{what}, the measured median differs from the prediction by {100 * min(errors):+.1f}% to "
        f"{100 * max(errors):+.1f}%; bars are the interquartile range."
        if len(networks) > 1
        else f"{what}: the measured median differs from the prediction by {100 * errors[0]:+.1f}%; "
        "the bar is the interquartile range."
    )
    return [Figure(figures.latency(networks), caption)]


def _has_both(network: Record) -> bool:
    return bool(network.get("predicted_ms")) and network.get("measured_ms") is not None


def _time(run: Run) -> Section:
    records = [r for r in run.timing if r.get("steps_per_second") is not None]
    if not records:
        missing = _NO_EPOCHS if run.tries else "The run folder has no timing.jsonl with epochs."
        return Section("time", "Time", missing=missing)
    seconds = sum(r["seconds"] for r in run.timing if r.get("seconds"))
    caption = (
        f"Steps a second and share of time spent waiting for data, by epoch; {len(records)} epochs "
        f"took {number(seconds)} s together."
    )
    return Section("time", "Time", (Figure(figures.speed(records), caption),))


_CHAIN = (
    "One box a layer, from the image to the classifier; grey ones are the same in every network "
    "of the space. Small print: output channels, and /2 where the resolution halves."
)
_GRAPH = "The cell that the network repeats: boxes are feature maps, arrows are operations."


def _yaml_line(line: str) -> tuple[str, str]:
    """A line of YAML as its key, with the indentation, and what follows the key."""
    key, colon, value = line.partition(":")
    return (key + colon, value) if colon else ("", line)
