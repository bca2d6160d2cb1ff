"""What a search ends with: the derived network judged, measured, and written down."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from latency.backends.base import Backend
from latency.measure import measure_network
from latency.model import LatencyModel
from latency.table import Target
from supernet.choice import Architecture
from supernet.derive import reachable
from supernet.estimators.shared_weights import SharedWeights
from supernet.files import write_json
from supernet.strategies.base import Problem, Run, limit_records
from supernet.tracking import read_journal


def conclude(
    problem: Problem,
    run: Run,
    architecture: Architecture,
    latency: LatencyModel | None,
    backend: Backend | None,
    target: Target,
    plan: Mapping[str, Any],
    bn_batches: int,
) -> dict[str, Any]:
    """Judge and measure the derived network; write `architecture.json` and `result.json`.

    Args:
        latency: predicts the latency; None without a table.
        backend: measures the whole network on the target; None where the target is elsewhere.
        plan: of the measurement, rounds, warmup and burst_ms.
        bn_batches: batches that recalibrate its batch norms.

    Returns:
        The content of `result.json`; `objective` is the error in percent on the architecture half,
        to be minimised by a sweeper.
    """
    accuracy, loss = SharedWeights(problem, 256, bn_batches).accuracy(architecture)
    result: dict[str, Any] = {
        "cost": {"name": problem.cost.name, "unit": problem.cost.unit},
        "budget": problem.objective.budget,
        "reachable": list(reachable(problem.space, problem.cost)),
        "predicted": problem.cost.of(architecture),
        "limits": limit_records(problem, architecture, _expected(run)),
        "predicted_ms": latency and latency.of(architecture),
        "measured_ms": None,
        "accuracy": accuracy,
        "loss": loss,
        "architecture": dict(architecture),
        "objective": 100 - accuracy if math.isfinite(loss) else 100.0,
        "seconds": {"search": time.perf_counter() - run.started},
    }
    if run.main:
        if backend is not None:
            network = problem.space.build_network(architecture, problem.data.info.num_classes)
            measured = measure_network(
                network, backend, target, in_chans=problem.space.in_chans, **plan
            )
            result["measured_ms"] = vars(measured)
        architecture.save(run.folder / "architecture.json")
        write_json(run.folder / "result.json", result)
    return result


def _expected(run: Run) -> dict[str, float]:
    """The expected value of each limited cost after the last epoch, where it has one."""
    records = read_journal(run.folder / "metrics.jsonl") if run.main else []
    limits: dict[str, Any] = next((r["limits"] for r in records[::-1] if "limits" in r), {})
    return {k: v["expected"] for k, v in limits.items() if v["expected"] is not None}


def summary(result: dict[str, Any]) -> str:
    """One line for people."""
    cost = result["cost"]
    parts = [f"{cost['name']} predicted {result['predicted']:.4g} {cost['unit']}"]
    if result["measured_ms"] is not None:
        parts.append(f"measured {result['measured_ms']['median_ms']:.4g} ms")
    if result["budget"] is not None:
        parts.insert(0, f"budget {result['budget']:.4g} {cost['unit']}")
    for name, limit in result["limits"].items():
        parts.append(f"{name} {limit['derived']:.4g} of {limit['limit']:.4g} {limit['unit']}")
    low, high = result["reachable"]
    parts.append(f"reachable {low:.4g} to {high:.4g} {cost['unit']}")
    parts.append(f"accuracy {result['accuracy']:.1f}% with inherited weights")
    return ", ".join(parts)
