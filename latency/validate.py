"""Compare a latency table with whole networks, and calibrate it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from latency.backends.base import Backend
from latency.cache import machine_lock
from latency.calibration import fit, report
from latency.measure import (
    MeasuredNetwork,
    distinct_operations,
    network_operations,
    networks_of,
    table_of,
)
from latency.model import AdditiveCost, LatencyModel, macs_cost, params_cost
from latency.runner import Plan
from latency.sites import Site
from latency.table import Calibration, LatencyTable, Target
from supernet.choice import Architecture
from supernet.derive import reachable
from supernet.sampling import RangeSampler
from supernet.space import SearchSpace

MAX_TRIES = 50  # draws for a distinct architecture


def draw(
    space: SearchSpace, sites: Sequence[Site], num_fit: int, num_held_out: int, seed: int
) -> tuple[list[Architecture], list[Architecture]]:
    """Networks to fit a calibration on, and others to judge it by; the same for the same seed.

    The first are spread evenly over the space's range of MACs, so that a budget anywhere in it is
    an interpolation; the others are uniformly random. Fewer where the space has fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    cost = macs_cost(space.choices, sites)
    fitted = _spread(space, cost, num_fit, generator)
    held_out: dict[Architecture, None] = {}
    for _ in range(MAX_TRIES * num_held_out):
        if len(held_out) == num_held_out:
            break
        found = space.sample(generator)
        if found not in fitted:
            held_out[found] = None
    return fitted, list(held_out)


def _spread(
    space: SearchSpace, cost: AdditiveCost, count: int, generator: torch.Generator
) -> list[Architecture]:
    """Distinct architectures, one from each of so many equal bands of the cost's range."""
    low, high = reachable(space, cost)
    width = (high - low) / max(count, 1)
    found: dict[Architecture, None] = {}
    for band in range(count):
        try:
            sampler = RangeSampler(space, cost, low + band * width, low + (band + 1) * width)
            found[sampler.sample(generator)] = None
        except ValueError:  # an empty band
            pass
    for _ in range(MAX_TRIES * count):
        if len(found) == count:
            break
        found[space.sample(generator)] = None
    return list(found)


def measure_with_networks(
    sites: Sequence[Site],
    networks: Sequence[nn.Module],
    backend: Backend,
    target: Target,
    plan: Plan,
    *,
    in_chans: int,
    journal: Path | None = None,
    progress: bool = True,
) -> tuple[LatencyTable, list[MeasuredNetwork]]:
    """Measure operations and whole networks in the same rounds; see `latency.measure.measure`.

    Args:
        networks: called as `network(x)`.
        in_chans: channels of the image.
    """
    backend.check(target)
    operations = distinct_operations(sites, target)
    whole = network_operations(networks, target, in_chans)
    every = {**{str(key): operation for key, operation in operations.items()}, **whole}
    with machine_lock():
        samples = backend.sample(every, target, plan, journal, progress)
    return table_of(samples, operations, target), networks_of(samples, list(whole), None)


def calibrate(
    space: SearchSpace,
    sites: Sequence[Site],
    table: LatencyTable,
    fitted: Sequence[Architecture],
    held_out: Sequence[Architecture],
    measured: Sequence[MeasuredNetwork],
) -> Calibration:
    """Fit on some networks, report on the others, and put the calibration into the table.

    Args:
        measured: first the fitted networks, then the held-out ones, at the table's speed.

    Returns:
        The calibration. Its report has the figures of `latency.calibration.Report`, those of the
        plain sum under `uncalibrated`, and `points`: predicted and measured ms of each held-out
        network. It is empty where nothing was held out.
    """
    times = np.array([m.measurement.median_ms for m in measured])
    plain = LatencyModel(space.choices, sites, table)
    params = params_cost(space.choices, sites)
    count = len(fitted)
    found = fit(space, fitted, times[:count].tolist(), plain, params, table.overhead_ms)
    if held_out:
        model = LatencyModel(space.choices, sites, table, found)
        predicted = np.array([model.of(a) for a in held_out])
        sums = np.array([plain.of(a) for a in held_out])
        halves = np.array([m.halves for m in measured[count:]])
        values = asdict(report(predicted, times[count:], halves))
        values["uncalibrated"] = asdict(report(sums, times[count:], halves))
        values["points"] = np.stack([predicted, times[count:]], axis=1).tolist()
        found = replace(found, report=values)
    table.calibrate(found)
    return found


def describe(calibration: Calibration) -> str:
    """One line for people."""
    found = calibration.report
    text = f"calibrated on {calibration.num_networks} networks"
    if not found:
        return text
    return (
        f"{text}; on {found['num_networks']} others the prediction is off by {found['mape']:.2f}% "
        f"on average (the plain sum by {found['uncalibrated']['mape']:.2f}%, noise "
        f"{found['noise']:.2f}%) and by {found['worst']:.2f}% at worst, Kendall's tau "
        f"{found['kendall_tau']:.3f}"
    )
