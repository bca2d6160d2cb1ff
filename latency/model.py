"""Additive costs of an architecture: latency and energy from a table, MACs and parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial

import torch
from torch import Tensor, nn

from latency.sites import Site
from latency.table import Calibration, LatencyTable
from supernet.choice import Architecture, Choice
from supernet.space import LinearConstraint


class AdditiveCost:
    """cost = fixed + sum over choices of the cost of the chosen option.

    Args:
        choices: the space's choices.
        fixed: what every architecture pays.
        per_option: by choice, float64 of shape (num_options,): what the option costs at all the
            positions that share the choice.
        name: "latency", "macs", "params" or "energy".
        unit: of all the numbers.

    Attributes:
        uncalibrated: the same cost before a calibration, where there is one.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        fixed: float,
        per_option: Mapping[str, Tensor],
        name: str,
        unit: str,
    ) -> None:
        self.choices = tuple(choices)
        self.fixed = fixed
        self.per_option = {choice.name: per_option[choice.name] for choice in self.choices}
        self.name, self.unit = name, unit
        self.uncalibrated: AdditiveCost = self
        self._values: dict[str, dict[str, float]] = {}  # plain numbers: sums of them are fast
        for choice in self.choices:
            vector = self.per_option[choice.name]
            assert vector.dtype == torch.float64 and vector.shape == (len(choice.options),), choice
            self._values[choice.name] = dict(zip(choice.options, vector.tolist(), strict=True))

    def expected(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Expected cost, sum_i sum_j p_ij F(o_ij) (Cai et al. 2019, equation 2), summed in float64.

        Args:
            weights: by choice, probabilities of shape (num_options,), of any float dtype.

        Returns:
            Scalar, float64, on the weights' device; differentiable in the weights.
        """
        assert weights.keys() == self.per_option.keys(), "weights of other choices than the cost's"
        if not self.choices:
            return torch.tensor(self.fixed, dtype=torch.float64)
        for choice in self.choices:
            assert weights[choice.name].shape == (len(choice.options),), choice
        probabilities = torch.cat([weights[c.name].double() for c in self.choices])
        costs = torch.cat([self.per_option[c.name] for c in self.choices])
        return probabilities @ costs.to(probabilities.device) + self.fixed

    def of(self, architecture: Architecture) -> float:
        """Cost of one architecture of the space."""
        values = self._values
        return math.fsum([self.fixed, *(values[name][option] for name, option in architecture)])

    def negative(self) -> AdditiveCost:
        """The cost times -1: an upper bound on it is a lower bound on this one."""
        per_option = {name: -vector for name, vector in self.per_option.items()}
        return AdditiveCost(self.choices, -self.fixed, per_option, self.name, self.unit)

    def rows(self, upper: float) -> list[LinearConstraint]:
        """The row of an integer program that bounds the cost by `upper`."""
        terms = {
            (name, option): value
            for name, values in self._values.items()
            for option, value in values.items()
        }
        return [LinearConstraint(terms, upper=upper - self.fixed)]

    def cut(self, architecture: Architecture, upper: float) -> LinearConstraint:
        """Forbids an architecture that a solver's tolerance let through by a hair."""
        return LinearConstraint(dict.fromkeys(architecture, 1.0), upper=len(self.choices) - 1.0)


class LatencyModel(AdditiveCost):
    """Latency in ms: the sum of the table's medians, calibrated where the space was validated.

    Where an option makes others idle (a `none` in a cell), a network is faster than the sum over
    its options; `network_ms` predicts it from the operations it really runs.

    Args:
        choices: the space's choices.
        sites: of its supernet, as `trace` lists them.
        table: measured for the target that is asked for (`LatencyTable.check_target`).
        calibration: of the space; None leaves the plain sum.
        command: measures what the table lacks, for the error.
        excluded: candidates that may not be chosen, and so have no sites.

    Raises:
        ValueError: the table lacks operations; all are listed.
    """

    def __init__(
        self,
        choices: Sequence[Choice],
        sites: Sequence[Site],
        table: LatencyTable,
        calibration: Calibration | None = None,
        command: str = "supernet-measure",
        excluded: Set[tuple[str, str]] = frozenset(),
    ) -> None:
        table.require((site.key for site in sites), command)
        ms = partial(_site_ms, table, calibration)
        fixed, per_option = _totals(choices, sites, ms, excluded)
        call_ms = table.overhead_ms if calibration is None else calibration.call_ms
        super().__init__(choices, fixed + call_ms, per_option, name="latency", unit="ms")
        if calibration is not None:
            self.uncalibrated = LatencyModel(choices, sites, table, excluded=excluded)


def network_ms(
    sites: Sequence[Site], table: LatencyTable, calibration: Calibration | None = None
) -> float:
    """Latency of one network from the operations it runs (`trace_architecture`)."""
    call_ms = table.overhead_ms if calibration is None else calibration.call_ms
    return math.fsum([call_ms, *(_site_ms(table, calibration, site) for site in sites)])


def _site_ms(table: LatencyTable, calibration: Calibration | None, site: Site) -> float:
    work = table.measurements[site.key].median_ms
    if calibration is None:
        return work
    each = calibration.op_ms if works(site) else 0.0
    return each + calibration.scale * work + calibration.weight_ms * site.params / 1e6


def works(site: Site) -> bool:
    """Whether the operation does anything."""
    return type(site.module) is not nn.Identity


def macs_cost(
    choices: Sequence[Choice],
    sites: Sequence[Site],
    excluded: Set[tuple[str, str]] = frozenset(),
) -> AdditiveCost:
    """Multiply-accumulates of one image."""
    totals = _totals(choices, sites, lambda site: float(site.macs), excluded)
    return AdditiveCost(choices, *totals, name="macs", unit="MACs")


def params_cost(
    choices: Sequence[Choice],
    sites: Sequence[Site],
    excluded: Set[tuple[str, str]] = frozenset(),
) -> AdditiveCost:
    """Number of parameters."""
    totals = _totals(choices, sites, lambda site: float(site.params), excluded)
    return AdditiveCost(choices, *totals, name="params", unit="parameters")


def energy_cost(
    choices: Sequence[Choice],
    sites: Sequence[Site],
    table: LatencyTable,
    excluded: Set[tuple[str, str]] = frozenset(),
) -> AdditiveCost:
    """Energy in mJ: the sum of the table's energies; the table has every site.

    Raises:
        ValueError: operations were measured without their energy; they are listed, unless none
            has one.
    """
    energies = {key: measurement.energy_mj for key, measurement in table.measurements.items()}
    if missing := sorted({site.key for site in sites if energies[site.key] is None}):
        lines = "".join(f"  {key}\n" for key in missing)
        none = not any(energy is not None for energy in energies.values())
        which = "any operation; " if none else f"{len(missing)} operations:\n{lines}"
        raise ValueError(
            f"device {table.target.device!r} with runtime {table.target.runtime!r} gave no energy "
            f"of {which}measure where the device tells it, or limit another cost"
        )
    totals = _totals(choices, sites, lambda site: energies[site.key] or 0.0, excluded)
    return AdditiveCost(choices, *totals, name="energy", unit="mJ")


def _totals(
    choices: Sequence[Choice],
    sites: Sequence[Site],
    value: Callable[[Site], float],
    excluded: Set[tuple[str, str]],
) -> tuple[float, dict[str, Tensor]]:
    """The sum over fixed sites, and by choice the sum over the sites of each option.

    An excluded option counts as the dearest other one, so that no cost pulls towards it.
    """
    values: dict[tuple[str | None, str | None], list[float]] = {}
    for site in sites:
        values.setdefault((site.choice, site.option), []).append(value(site))
    needed = [
        (choice.name, option)
        for choice in choices
        for option in choice.options
        if (choice.name, option) not in excluded
    ]
    free = {(c.name, o) for c in choices for o in c.options if c.free or o == c.absent}
    if unused := [f"{n}={o}" for n, o in needed if (n, o) not in values and (n, o) not in free]:
        raise ValueError(
            f"the network never runs the candidates {', '.join(unused)}: their cost is unknown"
        )
    totals = {pair: math.fsum(values.get(pair, [])) for pair in needed}
    per_option = {}
    for choice in choices:
        own = [totals.get((choice.name, option)) for option in choice.options]
        dearest = max(total for total in own if total is not None)
        per_option[choice.name] = torch.tensor(
            [dearest if total is None else total for total in own], dtype=torch.float64
        )
    return math.fsum(values.get((None, None), [])), per_option
