from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from latency.calibration import MIN_NETWORKS, fit, report
from latency.model import LatencyModel, network_ms
from latency.sites import Site, trace, trace_architecture
from latency.table import Calibration, LatencyTable, Measurement, Target
from supernet.mixed_ops.base import MixedOp
from supernet.spaces.mbconv import MBConv

SPACE = MBConv(
    img_size=16, stem_chs=8, first_chs=8, stages=[(8, 3, 1), (16, 3, 2)], kernels=(3, 5),
    expansions=(3, 6), head_chs=24,
)  # fmt: skip
SHAPE = (1, 3, 16, 16)
OVERHEAD_MS = 0.02


@pytest.fixture(scope="module")
def sites() -> list[Site]:
    return trace(SPACE.build(MixedOp, 10, search=False), SPACE.choices, SHAPE)


@pytest.fixture(scope="module")
def table(sites: list[Site]) -> LatencyTable:
    """Random times that do not follow from the number of parameters."""
    rng = np.random.default_rng(0)
    measurements = {
        key: Measurement(float(rng.uniform(0.05, 1.0)), 0.0, 0.0, 30)
        for key in sorted({site.key for site in sites})
    }
    return LatencyTable(Target(resolution=16), {"compiled": True}, OVERHEAD_MS, 1.0, measurements)


@pytest.fixture(scope="module")
def networks() -> list[list[Site]]:
    generator = torch.Generator().manual_seed(0)
    return [trace_architecture(SPACE, SPACE.sample(generator), 10, SHAPE) for _ in range(12)]


def work(sites: list[Site], table: LatencyTable) -> float:
    return sum(table.measurements[site.key].median_ms for site in sites)


def millions(sites: list[Site]) -> float:
    return sum(site.params for site in sites) / 1e6


def coefficients(found: Calibration) -> tuple[float, float, float]:
    return found.call_ms, found.scale, found.weight_ms


@pytest.mark.parametrize(
    "true",
    [(0.3, 1.2, 40.0), (0.3, 0.8, 0.0), (0.0, 1.0, 0.0), (0.05, 0.0, 90.0), (-0.1, 1.1, 9.0)],
)
def test_known_coefficients_are_recovered(
    networks: list[list[Site]], table: LatencyTable, true: tuple[float, float, float]
) -> None:
    call_ms, scale, weight_ms = true
    measured = [
        call_ms + scale * work(sites, table) + weight_ms * millions(sites) for sites in networks
    ]
    found = fit(SPACE, networks, measured, table)
    assert coefficients(found) == pytest.approx(true, rel=1e-6, abs=1e-9)
    assert (found.space, found.settings) == (SPACE.id, SPACE.settings)
    assert (found.num_networks, found.report) == (12, {})
    predicted = [network_ms(sites, table, found) for sites in networks]
    assert predicted == pytest.approx(measured, rel=1e-9)


@pytest.mark.parametrize("true", [(0.04, 1.2, 40.0), (0.0, 0.8, 0.0)])
def test_an_eager_runtime_pays_for_each_operation(
    networks: list[list[Site]], table: LatencyTable, true: tuple[float, float, float]
) -> None:
    op_ms, scale, weight_ms = true
    eager = replace(table, provenance={})
    measured = [
        OVERHEAD_MS
        + op_ms * sum(not isinstance(site.module, nn.Identity) for site in sites)
        + scale * work(sites, eager) + weight_ms * millions(sites)
        for sites in networks
    ]  # fmt: skip
    found = fit(SPACE, networks, measured, eager)
    assert found.call_ms == OVERHEAD_MS
    assert (found.op_ms, found.scale, found.weight_ms) == pytest.approx(true, rel=1e-6, abs=1e-9)
    predicted = [network_ms(sites, eager, found) for sites in networks]
    assert predicted == pytest.approx(measured, rel=1e-9)


def test_relative_errors_are_minimised(networks: list[list[Site]], table: LatencyTable) -> None:
    """No neighbour of the fitted coefficients does better."""
    rng = np.random.default_rng(1)
    measured = np.array([0.3 + 1.2 * work(n, table) + 30 * millions(n) for n in networks])
    measured *= np.exp(0.02 * rng.standard_normal(len(measured)))
    found = fit(SPACE, networks, measured.tolist(), table)
    assert min(coefficients(found)) > 0

    def loss(candidate: Calibration) -> float:
        predicted = np.array([network_ms(sites, table, candidate) for sites in networks])
        return float(np.sum((predicted / measured - 1) ** 2))

    for name, step in itertools.product(("call_ms", "scale", "weight_ms"), (0.99, 1.01)):
        moved = replace(found, **{name: step * getattr(found, name)})
        assert loss(moved) > loss(found)


@pytest.mark.parametrize("seed", range(10))
def test_no_operation_makes_a_network_faster(
    networks: list[list[Site]], table: LatencyTable, sites: list[Site], seed: int
) -> None:
    """Whatever is measured, here what has nothing to do with the operations, or the contrary."""
    rng = np.random.default_rng(seed)
    measured = rng.uniform(1.0, 10.0, len(networks))
    if seed % 2:  # the more work, the faster
        measured = np.array([20 - work(n, table) - millions(n) for n in networks])
    found = fit(SPACE, networks, measured.tolist(), table)
    assert min(found.scale, found.weight_ms, found.op_ms) >= 0 and max(coefficients(found)) > 0
    before = [network_ms(n, table, found) for n in networks]
    for key in table.measurements:
        slower = replace(
            table, measurements={**table.measurements, key: Measurement(2.0, 0.0, 0.0, 30)}
        )
        assert all(
            after >= ms
            for after, ms in zip(
                (network_ms(n, slower, found) for n in networks), before, strict=True
            )
        )
    heavier = [[*n, replace(n[0], params=n[0].params + 10**6)] for n in networks]
    assert all(network_ms(n, table, found) >= ms for n, ms in zip(heavier, before, strict=True))
    model = LatencyModel(SPACE.choices, sites, table, found)
    assert all((v >= 0).all() for v in model.per_option.values())
    assert min(before) > 0


def test_a_space_without_parameters_has_no_weights_to_fetch(
    networks: list[list[Site]], table: LatencyTable
) -> None:
    bare = [[replace(site, params=0) for site in sites] for sites in networks]
    measured = [0.3 + 1.2 * work(sites, table) for sites in bare]
    found = fit(SPACE, bare, measured, table)
    assert coefficients(found) == pytest.approx((0.3, 1.2, 0.0), rel=1e-6)


def test_too_few_networks(networks: list[list[Site]], table: LatencyTable) -> None:
    with pytest.raises(ValueError, match=f"needs {MIN_NETWORKS} networks or more; got 1"):
        fit(SPACE, networks[:1], [1.0], table)


# ---- figures


def test_figures_by_hand() -> None:
    measured = np.array([1.0, 2.0, 4.0, 5.0])
    predicted = np.array([1.03125, 2.15625, 3.0, 5.0])
    halves = np.array([[1.0, 1.0], [2.02, 2.0], [3.96, 4.0], [5.1, 5.0]])
    found = report(predicted, measured, halves)
    assert found.num_networks == 4
    assert found.mape == pytest.approx((3.125 + 7.8125 + 25 + 0) / 4)
    assert found.worst == pytest.approx(25)
    assert (found.within_5, found.within_10) == (0.5, 0.75)
    assert found.rmse_ms == pytest.approx(((0.03125**2 + 0.15625**2 + 1.0) / 4) ** 0.5)
    assert (found.kendall_tau, found.spearman) == (1.0, 1.0)
    assert found.noise == pytest.approx((0 + 1 + 1 + 2) / 4)


def concordance(a: np.ndarray, b: np.ndarray) -> float:
    pairs = list(itertools.combinations(range(len(a)), 2))
    return sum(np.sign((a[i] - a[j]) * (b[i] - b[j])) for i, j in pairs) / len(pairs)


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlations_from_their_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    measured = rng.uniform(1, 2, 15)
    predicted = measured + rng.normal(0, 0.2, 15)
    found = report(predicted, measured, np.ones((15, 2)))
    assert 0.2 < found.kendall_tau < 1
    assert found.kendall_tau == pytest.approx(concordance(predicted, measured))
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, measured)]
    distance = float(np.sum((ranks[0] - ranks[1]) ** 2))
    assert found.spearman == pytest.approx(1 - 6 * distance / (15 * (15**2 - 1)))


def test_no_ranks_where_nothing_varies() -> None:
    for predicted in (np.array([2.0, 2.0, 2.0]), np.array([2.0])):
        measured = np.linspace(1.0, 3.0, len(predicted))
        found = report(predicted, measured, np.ones((len(predicted), 2)))
        assert (found.kendall_tau, found.spearman) == (0.0, 0.0)
