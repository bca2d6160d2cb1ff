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
    network_operations,
    networks_of,
    table_of,
    work_of,
)
from latency.model import AdditiveCost, macs_cost, network_ms
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

    The first are spread over the space's range of MACs in even ratios, so that a budget anywhere
    in it is an interpolation; the others are uniformly random. Fewer where the space has fewer.
    """
    generator = torch.Generator().manual_seed(seed)
    cost = macs_cost(space.choices, sites, space.excluded)
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
    """Distinct architectures, one from each of so many bands of the cost's range, all as wide in
    relation to where they lie."""
    low, high = reachable(space, cost)
    edges = np.geomspace(low, high, count + 1).tolist() if low > 0 else []
    found: dict[Architecture, None] = {}
    for lower, upper in zip(edges, edges[1:], strict=False):
        try:
            sampler = RangeSampler(space, cost, lower, upper)
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
    work = work_of(sites, backend, target)
    whole = network_operations(networks, target, in_chans)
    with machine_lock():
        samples = backend.sample({**work.operations, **whole}, target, plan, journal, progress)
    return table_of(samples, work, target), networks_of(samples, list(whole))


def calibrate(
    space: SearchSpace,
    table: LatencyTable,
    architectures: Sequence[Architecture],
    networks: Sequence[Sequence[Site]],
    measured: Sequence[MeasuredNetwork],
    num_fit: int,
) -> Calibration:
    """Fit on the first networks, report on the others, and put the calibration into the table.

    Args:
        architectures: the networks.
        networks: sites of each (`trace_architecture`).
        measured: the same networks whole, at the table's speed.
        num_fit: how many to fit on.

    Returns:
        The calibration. Its report has the figures of `latency.calibration.Report`, those of the
        plain sum under `uncalibrated`, and `points`: predicted and measured ms of each held-out
        network. It is empty where nothing was held out.
    """
    times = np.array([m.measurement.median_ms for m in measured])
    found = fit(space, networks[:num_fit], times[:num_fit].tolist(), table)
    anchors = [
        {"architecture": dict(architecture), "ms": ms}
        for architecture, ms in zip(architectures[:num_fit], times.tolist(), strict=False)
    ]
    found = replace(found, anchors=sorted(anchors, key=lambda anchor: anchor["ms"]))
    held_out = networks[num_fit:]
    if held_out:
        predicted, sums = (
            np.array([network_ms(sites, table, how) for sites in held_out]) for how in (found, None)
        )
        halves = np.array([m.halves for m in measured[num_fit:]])
        values = asdict(report(predicted, times[num_fit:], halves))
        values["uncalibrated"] = asdict(report(sums, times[num_fit:], halves))
        values["points"] = np.stack([predicted, times[num_fit:]], axis=1).tolist()
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
