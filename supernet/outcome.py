"""What a search ends with: the derived network measured, judged, and written down."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from accelerate.utils import broadcast_object_list

from latency.model import LatencyModel
from latency.table import Measurement
from supernet.answer import Answer
from supernet.choice import Architecture
from supernet.derive import reachable
from supernet.estimators.shared_weights import SharedWeights
from supernet.files import write_json
from supernet.meet import Met, meet
from supernet.strategies.base import Problem, Run

Measure = Callable[[Architecture], Measurement]


def conclude(
    problem: Problem,
    run: Run,
    answer: Answer,
    latency: LatencyModel | None,
    measure: Measure | None,
    bn_batches: int,
) -> dict[str, Any]:
    """Derive, measure and judge; write `architecture.json` and `result.json`.

    A budget of latency holds for the measured network: see `meet`.

    Args:
        latency: predicts the latency; None without a table.
        measure: the whole network on the target; None where the target is elsewhere.
        bn_batches: batches that recalibrate its batch norms.

    Returns:
        The content of `result.json`; `objective` is the error in percent on the architecture half,
        to be minimised by a sweeper.
    """
    met = _meet(problem, answer, measure) if run.main else None
    found = met.best.architecture if met else None
    if met is None:
        found = answer.best(problem.objective.budget)
    assert found is not None
    found = problem.space.architecture(broadcast_object_list([dict(found)])[0])
    judged = judge(problem, found, latency, bn_batches)
    measured = None
    if run.main and measure is not None:
        measured = met.best.measured if met else measure(found)
    result = {
        **judged,
        "budget": problem.objective.budget,
        "reachable": list(reachable(problem.space, problem.cost)),
        "measured_ms": measured and asdict(measured),
        "binding": met.binding if met else found != answer.best(None),
        "attempts": [attempt.to_dict() for attempt in met.attempts] if met else [],
        "objective": 100 - judged["accuracy"] if math.isfinite(judged["loss"]) else 100.0,
        "seconds": {"search": time.perf_counter() - run.started},
    }
    if run.main:
        found.save(run.folder / "architecture.json")
        write_json(run.folder / "result.json", result)
    return result


def _meet(problem: Problem, answer: Answer, measure: Measure | None) -> Met | None:
    """None where the budget is not of latency, or nothing can be measured here."""
    if measure is None or problem.cost.name != "latency":
        return None
    return meet(answer, problem.objective.budget, problem.cost, measure)


def judge(
    problem: Problem, architecture: Architecture, latency: LatencyModel | None, bn_batches: int
) -> dict[str, Any]:
    """Predicted costs, and the accuracy with inherited weights, as `result.json` has them."""
    accuracy, loss = SharedWeights(problem, 256, bn_batches).accuracy(architecture)
    return {
        "cost": {"name": problem.cost.name, "unit": problem.cost.unit},
        "predicted": problem.cost.of(architecture),
        "predicted_ms": latency and latency.of(architecture),
        "uncalibrated_ms": latency and latency.uncalibrated.of(architecture),
        "accuracy": accuracy,
        "loss": loss,
        "architecture": dict(architecture),
    }


def summary(result: dict[str, Any]) -> str:
    """One line for people."""
    cost = result["cost"]
    parts = [f"{cost['name']} predicted {result['predicted']:.4g} {cost['unit']}"]
    if result["measured_ms"] is not None:
        parts.append(f"measured {result['measured_ms']['median_ms']:.4g} ms")
    if result["budget"] is not None:
        binds = "" if result["binding"] else " (does not bind)"
        parts.insert(0, f"budget {result['budget']:.4g} {cost['unit']}{binds}")
    low, high = result["reachable"]
    parts.append(f"reachable {low:.4g} to {high:.4g} {cost['unit']}")
    parts.append(f"accuracy {result['accuracy']:.1f}% with inherited weights")
    return ", ".join(parts)
