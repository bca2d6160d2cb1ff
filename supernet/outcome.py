"""What a search ends with: the derived network measured, judged, and written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from accelerate.utils import broadcast_object_list

from latency.table import Measurement
from supernet.answer import Answer, Judge
from supernet.choice import Architecture
from supernet.derive import reachable
from supernet.estimators.inherited import Inherited
from supernet.files import write_json
from supernet.meet import meet
from supernet.strategies.base import Problem, Run, limit_records
from supernet.tracking import last_epoch, read_journal

RANDOM_SEARCH = "random_search"  # folder of that baseline in the folder of a search
BEST_AT_RANDOM = "best_at_random"  # its network among those that are retrained


@dataclass(frozen=True)
class OnTarget:
    """A derived network seen from its target; what is not known there is None.

    Attributes:
        predict: latency in ms.
        add_up: the uncalibrated sum, in ms.
        measure: the whole network.
    """

    predict: Callable[[Architecture], float] | None
    add_up: Callable[[Architecture], float] | None
    measure: Callable[[Architecture], Measurement] | None


def conclude(
    problem: Problem, run: Run, answer: Answer, target: OnTarget, bn_batches: int
) -> dict[str, Any]:
    """Derive, measure and judge; write `architecture.json` and `result.json`.

    Args:
        bn_batches: batches that recalibrate the network's batch norms.

    Returns:
        The content of `result.json`.
    """
    seconds, budget = run.seconds, problem.objective.budget
    result = resolve(problem, answer, target, bn_batches, budget, _expected(run))
    result["seconds"] = {"search": seconds}
    result["evaluations"] = answer.num_judged
    if run.main:
        problem.space.architecture(result["architecture"]).save(run.folder / "architecture.json")
        write_json(run.folder / "result.json", result)
    return result


def resolve(
    problem: Problem,
    answer: Answer,
    target: OnTarget,
    bn_batches: int,
    budget: float | None,
    expected: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The best network under a budget, measured and judged: with inherited weights, unless the
    search trained it on its own.

    A budget of latency holds for the measured network (`meet`) where it can be measured. In several
    processes the first one measures, and all judge its architecture.

    Args:
        expected: what the search expected of limited costs at its end.

    Returns:
        As `result.json` has it; `objective` is the error in percent on the architecture half, to be
        minimised by a sweeper.

    Raises:
        Infeasible: no architecture meets the budget.
    """
    space, cost = problem.space, problem.cost
    found, measured, attempts = answer.best(budget), None, []
    if target.measure is not None and problem.accelerator.is_main_process:
        if cost.name == "latency":
            assert target.predict is not None
            met = meet(answer, budget, problem.cost, target.predict, target.measure)
            found, measured = met.best.architecture, met.best.measured
            attempts = [attempt.to_dict() for attempt in met.attempts]
        else:
            measured = target.measure(found)
    found = space.architecture(broadcast_object_list([dict(found)])[0])
    judged = answer.judged(found)
    accuracy, loss = judged or Inherited(
        problem, 256, bn_batches, answer.inputs
    ).accuracy(found)
    judge = answer.judge(found) if judged else _judge(problem)
    predicted_ms = target.predict and target.predict(found)
    return {
        "cost": {"name": cost.name, "unit": cost.unit},
        "budget": budget,
        "reachable": list(reachable(space, cost)),
        "predicted": predicted_ms if cost.name == "latency" else cost.of(found),
        "limits": limit_records(problem, found, expected or {}),
        "costs": {cost.name: cost.of(found) for cost in problem.costs},
        "predicted_ms": predicted_ms,
        "uncalibrated_ms": target.add_up and target.add_up(found),
        "measured_ms": measured and asdict(measured),
        "binding": found != answer.best(None) or answer.binds(budget),
        "attempts": attempts,
        "accuracy": accuracy,
        "judged_by": judge.name,
        "accuracy_unit": judge.unit,
        "oracle": judge.oracle,
        "loss": loss,
        "architecture": dict(found),
        "objective": 100 - accuracy if math.isfinite(loss) else 100.0,
    }


def _judge(problem: Problem) -> Judge:
    """Of the supernet."""
    inherited = problem.relaxation.inheritable
    return Judge("inherited weights" if inherited else "the supernet's weights")


def _expected(run: Run) -> dict[str, float]:
    """The expected value of each limited cost where the search ended, where it has one."""
    record = last_epoch(read_journal(run.folder / "metrics.jsonl")) if run.main else None
    limits = (record or {}).get("limits", {})
    return {k: v["expected"] for k, v in limits.items() if v["expected"] is not None}


def summary(result: dict[str, Any]) -> str:
    """One line for people."""
    cost = result["cost"]
    parts = [f"{cost['name']} predicted {result['predicted']:.4g} {cost['unit']}"]
    if result["measured_ms"] is not None:
        parts.append(f"measured {result['measured_ms']['median_ms']:.4g} ms")
    if result["budget"] is not None:
        binds = " (not binding)" if result["binding"] is False else ""
        parts.insert(0, f"budget {result['budget']:.4g} {cost['unit']}{binds}")
    for name, limit in result["limits"].items():
        parts.append(f"{name} {limit['derived']:.4g} of {limit['limit']:.4g} {limit['unit']}")
    low, high = result["reachable"]
    parts.append(f"reachable {low:.4g} to {high:.4g} {cost['unit']}")
    name, unit = ("accuracy", "%") if result["accuracy_unit"] else ("score", "")
    parts.append(f"{name} {result['accuracy']:.1f}{unit} with {result['judged_by']}")
    return ", ".join(parts)
