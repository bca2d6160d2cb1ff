from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from latency.model import (
    AdditiveCost,
    LatencyModel,
    energy_cost,
    macs_cost,
    network_ms,
    params_cost,
)
from latency.sites import Site, trace, trace_architecture, trace_compiled
from latency.table import Calibration, LatencyTable, Measurement, Target
from supernet.choice import Architecture
from supernet.mixed_ops.base import MixedOp
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201

SPACES = {
    "nasbench201": NasBench201(widths=(4, 8), num_cells=2, img_size=8),
    "darts": Darts(width=4, num_cells=3, img_size=8),
    "mbconv": MBConv(
        img_size=16, stem_chs=8, first_chs=8, stages=[(8, 2, 1), (16, 2, 2)], kernels=(3, 5),
        expansions=(3,), head_chs=24,
    ),
}  # fmt: skip
OVERHEAD_MS = 0.0625


@pytest.fixture(params=SPACES)
def space(request: pytest.FixtureRequest) -> SearchSpace:
    return SPACES[request.param]


def trace_space(space: SearchSpace) -> list[Site]:
    network = space.build(MixedOp, 10, search=False)
    return trace(network, space.choices, (1, 3, space.img_size, space.img_size))


def random_table(sites: list[Site], seed: int = 0) -> LatencyTable:
    """Times over seven orders of magnitude."""
    keys = sorted({site.key for site in sites})
    powers = torch.rand(len(keys), generator=torch.Generator().manual_seed(seed)) * 7 - 4
    times = (10.0 ** powers.double()).tolist()
    measurements = {key: Measurement(ms, 0.0, 0.0, 1) for key, ms in zip(keys, times, strict=True)}
    return LatencyTable(Target(), {}, OVERHEAD_MS, 1.0, measurements)


def brute_force(sites: list[Site], table: LatencyTable, architecture: Architecture) -> float:
    pairs = {(None, None), *architecture}
    return OVERHEAD_MS + sum(
        table.measurements[site.key].median_ms
        for site in sites
        if (site.choice, site.option) in pairs
    )


def one_hot(architecture: Architecture, space: SearchSpace) -> dict[str, torch.Tensor]:
    return {
        choice.name: torch.eye(len(choice.options))[choice.index(architecture[choice.name])]
        for choice in space.choices
    }


def test_one_hot_is_the_tables_sum(space: SearchSpace) -> None:
    sites = trace_space(space)
    table = random_table(sites)
    model = LatencyModel(space.choices, sites, table)
    assert (model.name, model.unit) == ("latency", "ms")
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        architecture = space.sample(generator)
        total = brute_force(sites, table, architecture)
        assert abs(model.of(architecture) - total) < 1e-9
        assert abs(model.expected(one_hot(architecture, space)).item() - total) < 1e-9


def test_expectation_is_the_mean_over_all_architectures() -> None:
    space = SPACES["mbconv"]
    sites = trace_space(space)
    table = random_table(sites)
    model = LatencyModel(space.choices, sites, table)
    generator = torch.Generator().manual_seed(1)
    weights = {
        choice.name: torch.rand(len(choice.options), generator=generator).double().softmax(0)
        for choice in space.choices
    }
    expectation = 0.0
    for options in itertools.product(*(choice.options for choice in space.choices)):
        pairs = dict(zip((choice.name for choice in space.choices), options, strict=True))
        probability = 1.0
        for choice in space.choices:
            index = choice.index(pairs[choice.name])
            probability *= weights[choice.name][index].item()
        expectation += probability * brute_force(sites, table, space.architecture(pairs))
    assert model.expected(weights).item() == pytest.approx(expectation, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_is_the_cost_of_each_option(space: SearchSpace, dtype: torch.dtype) -> None:
    sites = trace_space(space)
    model = LatencyModel(space.choices, sites, random_table(sites))
    weights = {
        choice.name: torch.full((len(choice.options),), 0.25, dtype=dtype, requires_grad=True)
        for choice in space.choices
    }
    value = model.expected(weights)
    assert value.dtype == torch.float64 and value.shape == ()
    value.backward()
    for choice in space.choices:
        gradient = weights[choice.name].grad
        assert gradient is not None
        assert torch.equal(gradient, model.per_option[choice.name].to(dtype))


def test_missing_operations_are_all_listed() -> None:
    space = SPACES["nasbench201"]
    sites = trace_space(space)
    table = random_table(sites)
    dropped = sorted(table.measurements)[::5]
    for key in dropped:
        del table.measurements[key]
    with pytest.raises(ValueError, match="measure them with: supernet-measure space=x") as caught:
        LatencyModel(space.choices, sites, table, None, "supernet-measure space=x")
    assert all(str(key) in str(caught.value) for key in dropped)


def test_macs_and_params_need_no_table(space: SearchSpace) -> None:
    sites = trace_space(space)
    macs, params = macs_cost(space.choices, sites), params_cost(space.choices, sites)
    assert (macs.name, params.name) == ("macs", "params")
    architecture = space.sample(torch.Generator().manual_seed(3))
    network = space.build_network(architecture, 10)
    assert params.of(architecture) == sum(p.numel() for p in network.parameters())
    pairs = {(None, None), *architecture}
    assert macs.of(architecture) == sum(s.macs for s in sites if (s.choice, s.option) in pairs)


def test_tied_cells_count_every_time() -> None:
    def per_option(num_cells: int) -> AdditiveCost:
        space = NasBench201(widths=(4,), num_cells=num_cells, img_size=8)
        return params_cost(space.choices, trace_space(space))

    one, three = per_option(1), per_option(3)
    for name, vector in one.per_option.items():
        assert torch.equal(3 * vector, three.per_option[name])
    # none, skip, 1x1 and 3x3 with its norm, average pool
    assert one.per_option["edge_0_1"].tolist() == [0, 0, 16 + 8, 144 + 8, 0]


def test_a_candidate_that_never_runs_is_an_error() -> None:
    space = SPACES["mbconv"]
    sites = [site for site in trace_space(space) if site.option != "zero"]
    with pytest.raises(ValueError, match="never runs the candidates stage1_0=zero, stage1_1=zero"):
        macs_cost(space.choices, sites)
    renamed = [replace(s, choice="other") if s.choice else s for s in sites]
    with pytest.raises(ValueError, match="stage2_1=k3_e3"):
        macs_cost(space.choices, renamed)


def test_no_choices_cost_what_is_fixed() -> None:
    cost = AdditiveCost((), 2.5, {}, "latency", "ms")
    assert cost.expected({}).item() == 2.5


def test_energy_is_the_sum_of_the_tables() -> None:
    space = SPACES["nasbench201"]
    sites = trace_space(space)
    keys = sorted({site.key for site in sites})
    measurements = {k: Measurement(1.0, 0.0, 0.0, 1, energy_mj=0.5 * i) for i, k in enumerate(keys)}
    cost = energy_cost(space.choices, sites, LatencyTable(Target(), {}, 0.0, 1.0, measurements))
    assert (cost.name, cost.unit) == ("energy", "mJ")
    architecture = space.sample(torch.Generator().manual_seed(3))
    pairs = {(None, None), *architecture}
    by_hand = [0.5 * keys.index(s.key) for s in sites if (s.choice, s.option) in pairs]
    assert cost.of(architecture) == pytest.approx(sum(by_hand))


def test_operations_without_energy_are_named() -> None:
    space = SPACES["nasbench201"]
    sites = trace_space(space)
    table = random_table(sites)
    with pytest.raises(ValueError, match="'cpu' with runtime 'torch' gave no energy of any operat"):
        energy_cost(space.choices, sites, table)
    first, second, *rest = sorted(table.measurements)
    for key in rest:
        table.measurements[key] = replace(table.measurements[key], energy_mj=1.0)
    with pytest.raises(ValueError, match="no energy of 2 operations") as caught:
        energy_cost(space.choices, sites, table)
    assert f"{first}\n" in str(caught.value) and f"{second}\n" in str(caught.value)
    assert str(rest[0]) not in str(caught.value)


def test_an_excluded_candidate_needs_no_site_and_costs_as_the_dearest_other() -> None:
    space = SPACES["mbconv"]
    excluded = frozenset({("stage1_0", "k5_e3"), ("stage1_1", "zero")})
    sites = trace_space(space)
    some = [site for site in sites if (site.choice, site.option) not in excluded]
    table = random_table(sites).restrict(site.key for site in some)
    whole, part = macs_cost(space.choices, sites), macs_cost(space.choices, some, excluded)
    costs = [part, LatencyModel(space.choices, some, table, excluded=excluded)]
    for cost in costs:
        for choice in space.choices:
            own = cost.per_option[choice.name]
            others = [
                value
                for option, value in zip(choice.options, own.tolist(), strict=True)
                if (choice.name, option) not in excluded
            ]
            for option, value in zip(choice.options, own.tolist(), strict=True):
                if (choice.name, option) in excluded:
                    assert value == max(others)
    assert part.fixed == whole.fixed
    for name, vector in part.per_option.items():
        same = [(name, o) not in excluded for o in space.by_name[name].options]
        assert torch.equal(vector[same], whole.per_option[name][same])


# ---- whole networks


CALIBRATIONS = [None, Calibration("s", "{}", 0.375, 1.25, 3.5, 8, {}, [])]


def trace_one(
    space: SearchSpace, architecture: Architecture, compiled: bool = True
) -> list[Site]:
    shape = (1, 3, space.img_size, space.img_size)
    return trace_architecture(space, architecture, 10, shape, compiled)


@pytest.mark.parametrize("calibration", CALIBRATIONS, ids=["sum", "calibrated"])
def test_of_an_mbconv_network_is_what_its_operations_take(calibration: Calibration | None) -> None:
    space = SPACES["mbconv"]
    sites = trace_space(space)
    table = random_table(sites)
    model = LatencyModel(space.choices, sites, table, calibration)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        architecture = space.sample(generator)
        own = trace_one(space, architecture)
        total = network_ms(own, table, calibration)
        assert abs(model.of(architecture) - total) < 1e-9
        assert abs(model.expected(one_hot(architecture, space)).item() - total) < 1e-9
        # by hand
        work = sum(table.measurements[site.key].median_ms for site in own)
        params = sum(p.numel() for p in space.build_network(architecture, 10).parameters())
        by_hand = OVERHEAD_MS + work
        if calibration is not None:
            by_hand = 0.375 + 1.25 * work + 3.5 * params / 1e6
        assert abs(total - by_hand) < 1e-9
        uncalibrated = brute_force(sites, table, architecture)
        assert abs(model.uncalibrated.of(architecture) - uncalibrated) < 1e-9


def test_the_gradient_includes_the_calibration(space: SearchSpace) -> None:
    """Against differences of whole predictions, one choice changed."""
    sites = trace_space(space)
    table = random_table(sites)
    model = LatencyModel(space.choices, sites, table, CALIBRATIONS[1])
    plain = LatencyModel(space.choices, sites, table)
    weights = {
        choice.name: torch.full((len(choice.options),), 0.25, requires_grad=True)
        for choice in space.choices
    }
    model.expected(weights).backward()
    architecture = space.sample(torch.Generator().manual_seed(0))
    for choice in space.choices:
        gradient = weights[choice.name].grad
        assert gradient is not None
        values = [
            model.of(space.architecture({**dict(architecture), choice.name: option}))
            for option in choice.options
        ]
        differences = torch.tensor(values, dtype=torch.float64) - values[0]
        gradient = gradient.double()
        torch.testing.assert_close(gradient - gradient[0], differences, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(gradient, plain.per_option[choice.name])


@pytest.mark.parametrize("calibration", CALIBRATIONS, ids=["sum", "calibrated"])
def test_of_a_cell_in_eager_mode_is_what_its_options_take(calibration: Calibration | None) -> None:
    space = SPACES["nasbench201"]
    sites = trace_space(space)
    table = random_table(sites)
    model = LatencyModel(space.choices, sites, table, calibration)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        cell = space.sample(generator)
        total = network_ms(trace_one(space, cell, compiled=False), table, calibration)
        assert abs(total - model.of(cell)) < 1e-9


def test_of_a_compiled_cell_is_what_its_sums_take() -> None:
    """One cell, by hand: node 1 leads nowhere, node 2 is node 0, and two pools read it."""
    space = NasBench201(widths=(4,), num_cells=1, img_size=8)
    sites = [*trace_space(space), *trace_compiled(space, 10, (1, 3, 8, 8))]
    table = random_table(sites)

    def ms(kind: str) -> float:
        keys = {site.key for site in sites if kind in site.key.op}
        assert len(keys) == 1, keys
        return table.measurements[keys.pop()].median_ms

    cell = "|nor_conv_3x3~0|+|skip_connect~0|none~1|+|avg_pool_3x3~0|none~1|avg_pool_3x3~2|"
    fixed = sum(
        table.measurements[s.key].median_ms
        for s in trace_space(space)
        if s.choice is None and "Sum" not in s.key.op
    )
    pooled = ms("AvgPool2d(3") + ms("FusedSum(2,False)[convs:ModuleList]")
    total = network_ms(trace_one(space, space.from_string(cell)), table)
    assert total == pytest.approx(OVERHEAD_MS + fixed + pooled)
