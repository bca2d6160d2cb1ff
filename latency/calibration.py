"""From sums of operations to whole networks: fit a few coefficients, report on other networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls
from scipy.stats import kendalltau, spearmanr

from latency.model import network_ms, works
from latency.sites import Site
from latency.table import Calibration, LatencyTable
from supernet.space import SearchSpace

MIN_NETWORKS = 2


@dataclass(frozen=True)
class Report:
    """Predicted against measured latency of networks that took no part in a fit.

    Attributes:
        num_networks: how many.
        mape, worst: mean and largest absolute error, in percent of the measured latency.
        within_5, within_10: share of the networks with at most so many percent of error.
        rmse_ms: root mean square error.
        kendall_tau, spearman: rank correlations.
        noise: mean difference of two halves of the same measurements, in percent: what no
            prediction can be better than.
    """

    num_networks: int
    mape: float
    worst: float
    within_5: float
    within_10: float
    rmse_ms: float
    kendall_tau: float
    spearman: float
    noise: float


def report(predicted: np.ndarray, measured: np.ndarray, halves: np.ndarray) -> Report:
    """Compare, both in ms, shape (num_networks,).

    Args:
        halves: medians of two halves of the measurements, shape (num_networks, 2).
    """
    error = 100 * np.abs(predicted / measured - 1)
    varied = len(measured) > 1 and np.ptp(predicted) > 0 and np.ptp(measured) > 0
    return Report(
        num_networks=len(measured),
        mape=float(error.mean()),
        worst=float(error.max()),
        within_5=float((error <= 5).mean()),
        within_10=float((error <= 10).mean()),
        rmse_ms=float(np.sqrt(np.mean((predicted - measured) ** 2))),
        kendall_tau=float(kendalltau(predicted, measured).statistic) if varied else 0.0,
        spearman=float(spearmanr(predicted, measured).statistic) if varied else 0.0,
        noise=float(100 * np.abs(halves[:, 0] / halves[:, 1] - 1).mean()),
    )


def fit(
    space: SearchSpace,
    networks: Sequence[Sequence[Site]],
    measured_ms: Sequence[float],
    table: LatencyTable,
) -> Calibration:
    """Least squares of the relative error, by a sum that never falls when an operation is added.

    A runtime that compiles graphs pays a constant for each call. It may be negative: what all
    networks run, stem and head, is often predicted better alone than what is searched. Any other
    pays one for each operation.

    Args:
        networks: sites of each, all measured in the table.
        measured_ms: of each network, whole.

    Raises:
        ValueError: too few networks.
    """
    if len(networks) < MIN_NETWORKS:
        raise ValueError(
            f"a calibration needs {MIN_NETWORKS} networks or more; got {len(networks)}"
        )
    measured = np.array(measured_ms)
    columns = np.array(
        [
            [
                1.0,
                sum(works(site) for site in sites),
                network_ms(sites, table) - table.overhead_ms,
                sum(site.params for site in sites) / 1e6,
            ]
            for sites in networks
        ]
    )
    calls, operations, work, weights = columns.T
    if table.provenance.get("compiled"):
        least = work.min() / 2  # a constant below zero leaves this much work its time
        rest, scale, weight_ms = _solve([calls, work - least, weights], measured, measured)
        call_ms, op_ms = rest - scale * least, 0.0
    else:
        call_ms = table.overhead_ms
        op_ms, scale, weight_ms = _solve([operations, work, weights], measured - call_ms, measured)
    return Calibration(
        space.id,
        space.settings,
        call_ms=call_ms,
        scale=scale,
        weight_ms=weight_ms,
        num_networks=len(networks),
        report={},
        op_ms=op_ms,
    )


def _solve(columns: Sequence[np.ndarray], wanted: np.ndarray, measured: np.ndarray) -> list[float]:
    """Factors of at least 0 of the columns with the least squares of (sum - wanted) / measured."""
    weighted = np.column_stack(columns) / measured[:, None]
    lengths = np.linalg.norm(weighted, axis=0)  # the columns' units differ by orders of magnitude
    lengths[lengths == 0] = 1.0  # a space without parameters
    found, _ = nnls(weighted / lengths, wanted / measured)
    solution: list[float] = (found / lengths).tolist()
    return solution
