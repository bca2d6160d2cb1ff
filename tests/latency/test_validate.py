from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from latency.calibration import report
from latency.measure import MeasuredNetwork
from latency.model import macs_cost, network_ms
from latency.runner import Plan
from latency.sites import Site, trace, trace_architecture
from latency.table import LatencyTable, Measurement, Target
from latency.validate import calibrate, describe, draw, measure_with_networks
from supernet.choice import Architecture
from supernet.derive import derive
from supernet.mixed_ops.base import MixedOp
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201

SPACES: dict[str, SearchSpace] = {
    "mbconv": MBConv(
        img_size=16, stem_chs=8, first_chs=8, stages=[(8, 3, 1), (16, 3, 2)], kernels=(3, 5),
        expansions=(3,), head_chs=24,
    ),
    "nasbench201": NasBench201(widths=(4, 8), num_cells=1, img_size=8),
    "darts": Darts(width=4, num_cells=3, img_size=8),
}  # fmt: skip


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return SPACES[request.param]


@cache
def trace_space(space: SearchSpace) -> list[Site]:
    shape = (1, 3, space.img_size, space.img_size)
    return trace(space.build(MixedOp, 10, search=False), space.choices, shape)


def everything(space: SearchSpace) -> list[Architecture]:
    """All there is; of what cannot be listed, a sample and the two ends of its MACs."""
    if space.size > 10**6:
        generator = torch.Generator().manual_seed(9)
        macs = macs_cost(space.choices, trace_space(space))
        ends = [derive(space, {n: s * v for n, v in macs.per_option.items()}) for s in (-1, 1)]
        return ends + [space.sample(generator) for _ in range(300)]
    names = [choice.name for choice in space.choices]
    options = itertools.product(*(choice.options for choice in space.choices))
    every = [space.architecture(dict(zip(names, chosen, strict=True))) for chosen in options]
    return [architecture for architecture in every if space.is_valid(architecture)]


# ---- which networks


def test_networks_are_the_same_for_a_seed_and_all_distinct(space: SearchSpace) -> None:
    sites = trace_space(space)
    fitted, held_out = draw(space, sites, 8, 20, seed=3)
    assert (fitted, held_out) == draw(space, sites, 8, 20, seed=3)
    assert (len(fitted), len(held_out)) == (8, 20)
    assert len({*fitted, *held_out}) == 28
    assert all(space.is_valid(architecture) for architecture in (*fitted, *held_out))
    others = draw(space, sites, 8, 20, seed=4)
    assert fitted != others[0] and held_out != others[1]


def test_the_fitted_networks_are_spread_over_the_range_of_macs(space: SearchSpace) -> None:
    """One in each of eight bands of even ratio that holds any; random ones crowd in the middle."""
    sites = trace_space(space)
    cost = macs_cost(space.choices, sites)
    macs = np.array([cost.of(architecture) for architecture in everything(space)])
    edges = np.geomspace(macs.min(), macs.max(), 9)
    for seed in range(5):
        fitted, held_out = draw(space, sites, 8, 8, seed)
        found = np.array([cost.of(architecture) for architecture in fitted])
        for low, high in itertools.pairwise(edges):
            if ((macs > low) & (macs < high)).any():
                assert ((found >= low) & (found <= high)).any()
        assert np.ptp(found) > 0.7 * np.ptp(macs)


def test_a_small_space_gives_what_it_has() -> None:
    space = MBConv(img_size=16, stages=[(8, 2, 2)], kernels=(3,), expansions=(3,), head_chs=8)
    assert space.size == 2
    fitted, held_out = draw(space, trace_space(space), 8, 8, seed=0)
    assert len(fitted) == 2 and held_out == []
    fitted, held_out = draw(space, trace_space(space), 0, 8, seed=0)
    assert fitted == [] and len(held_out) == 2


# ---- measured beside the operations


def test_operations_and_networks_share_their_rounds(
    scripted: Any, make_sites: Any, named: Any, target: Target
) -> None:
    clock = {"a": 1.0, "b": 2.0, "x": 3.5, "y": 4.5}
    backend = scripted(lambda name, _: clock[name])
    plan = Plan(rounds=4, min_rounds=4, burst_ms=0.0)
    table, (x, y) = measure_with_networks(
        make_sites("ab"), [named("x"), named("y")], backend, target, plan, in_chans=3
    )
    assert {key.op: m.median_ms for key, m in table.measurements.items()} == {
        "a": 0.875,
        "b": 1.875,
    }
    assert (x.measurement.median_ms, y.measurement.median_ms) == (3.5, 4.5)  # with their calls
    assert (x.halves, x.speed) == ((3.5, 3.5), 1.0)
    rounds = [backend.bursts[i : i + 4] for i in range(0, 16, 4)]
    assert all(sorted(names) == list("abxy") for names in rounds)


def test_a_network_that_fails_is_named(
    scripted: Any, make_sites: Any, named: Any, target: Target, plan: Plan
) -> None:
    def clock(name: str, burst: int) -> float:
        if name == "y":
            raise RuntimeError("out of memory")
        return 1.0

    with pytest.raises(ValueError, match="network 1 cannot be measured .*out of memory"):
        measure_with_networks(
            make_sites("a"), [named("x"), named("y")], scripted(clock), target, plan, in_chans=3
        )


# ---- calibrated and judged


def simulate(
    num_networks: int, noise: float
) -> tuple[
    SearchSpace, LatencyTable, list[Architecture], list[list[Site]], list[MeasuredNetwork]
]:
    """Networks that take 0.3 ms and 1.2 times their operations, with noise."""
    space, rng = SPACES["mbconv"], np.random.default_rng(0)
    keys = sorted({site.key for site in trace_space(space)})
    times = {key: Measurement(float(rng.uniform(0.1, 1)), 0.0, 0.0, 30) for key in keys}
    table = LatencyTable(Target(resolution=16), {"compiled": True}, 0.02, 1.0, times)
    generator = torch.Generator().manual_seed(0)
    drawn = [space.sample(generator) for _ in range(num_networks)]
    networks = [trace_architecture(space, a, 10, (1, 3, 16, 16)) for a in drawn]
    measured = []
    for sites in networks:
        ms = 0.3 + 1.2 * sum(times[site.key].median_ms for site in sites)
        ms *= float(np.exp(noise * rng.standard_normal()))
        halves = (ms * (1 + noise), ms)
        measured.append(MeasuredNetwork(Measurement(ms, 0.0, 0.0, 30), halves, 1.0))
    return space, table, drawn, networks, measured


def test_a_calibration_is_fitted_on_some_and_judged_by_the_others() -> None:
    space, table, drawn, networks, measured = simulate(30, noise=0.02)
    # what is found for the held-out ones has no influence on the fit
    another = [replace(m, measurement=measured[0].measurement) for m in measured[10:]]
    other = calibrate(space, table, drawn, networks, [*measured[:10], *another], 10)
    found = calibrate(space, table, drawn, networks, measured, 10)
    assert table.calibration(space.id, space.settings) == found
    assert len(table.calibrations) == 1
    names = ("call_ms", "scale", "weight_ms", "num_networks")
    assert [getattr(found, n) for n in names] == [getattr(other, n) for n in names]
    assert found.num_networks == 10
    times = {a: m.measurement.median_ms for a, m in zip(drawn[:10], measured, strict=False)}
    anchors = {space.architecture(a["architecture"]): a["ms"] for a in found.anchors}
    assert anchors == times and [a["ms"] for a in found.anchors] == sorted(times.values())

    true = np.array([m.measurement.median_ms for m in measured[10:]])
    predicted = np.array([network_ms(sites, table, found) for sites in networks[10:]])
    sums = np.array([network_ms(sites, table) for sites in networks[10:]])
    halves = np.array([m.halves for m in measured[10:]])
    assert found.report["num_networks"] == 20
    assert found.report["mape"] == pytest.approx(100 * np.mean(np.abs(predicted - true) / true))
    assert found.report["noise"] == pytest.approx(2.0)
    assert found.report["uncalibrated"] == asdict(report(sums, true, halves))
    assert found.report["mape"] < 4 < 10 < found.report["uncalibrated"]["mape"]
    np.testing.assert_allclose(found.report["points"], np.stack([predicted, true], axis=1))
    assert json.loads(json.dumps(found.report)) == found.report
    assert LatencyTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table


def test_in_words() -> None:
    space, table, drawn, networks, measured = simulate(12, noise=0.0)
    found = calibrate(space, table, drawn, networks, measured, 8)
    text = describe(found)
    assert text.startswith("calibrated on 8 networks; on 4 others the prediction is off by 0.00%")
    assert f"the plain sum by {found.report['uncalibrated']['mape']:.2f}%" in text
    assert "Kendall's tau 1.000" in text
    alone = calibrate(space, table, drawn, networks, measured, 12)
    assert alone.report == {} and describe(alone) == "calibrated on 12 networks"
