"""A space as its target sees it: costs, limits, and whole networks measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from latency.backends.base import Backend
from latency.measure import MeasuredNetwork, measure_networks
from latency.memory import PeakMemory
from latency.model import LatencyModel, energy_cost, macs_cost, network_ms, params_cost
from latency.runner import Plan
from latency.sites import Site, trace_architecture
from latency.table import Calibration, LatencyTable, Measurement, Target
from latency.traced import TracedCost
from latency.whole import WholeLatency
from supernet.choice import Architecture
from supernet.limits import Cost, Limit
from supernet.network import Network
from supernet.objective import Objective
from supernet.outcome import OnTarget
from supernet.space import SearchSpace
from supernet_scripts.common import NETWORKS

FEW, NUM_COPIES = 4, 4  # up to so many networks are timed in so many copies each
NUM_ANCHORS = 8  # networks of the calibration that are measured beside others


@dataclass
class Measured:
    """A space seen from its target.

    Attributes:
        sites: of the supernet, without those of excluded candidates.
        compiled: what compiled networks run besides; empty where the runtime compiles no graphs.
        num_classes: of the networks.
        plan, network_plan: of measuring operations, and whole networks.
        whole: latency of networks that no table tells (`measure_whole`).
        cached: file that keeps the table among others, where it came from the cache.
    """

    sites: list[Site]
    compiled: list[Site]
    num_classes: int
    backend: Backend
    target: Target
    plan: Plan
    network_plan: Plan
    table: LatencyTable | None = None
    cached: Path | None = None
    whole: WholeLatency | None = None

    def measure_whole(self, space: SearchSpace, folder: Path, main: bool = True) -> None:
        """Where costs are not additive: have networks measured as they are asked for, and kept in
        a run folder.

        Raises:
            ValueError: the target is not at hand.
        """
        if not self.is_here:
            raise ValueError(
                f"{space.id} has no latency table, as a layer's cost depends on several choices "
                "at once: each network is measured when the search comes upon it, which backend "
                f"{type(self.backend).__name__} cannot do here; give a budget and limits of macs, "
                "params or peak_memory (objective.cost=params)"
            )

        def measure(architecture: Architecture) -> float:
            return self.networks(space, [architecture], copies=1)[0].measurement.median_ms

        self.whole = WholeLatency(space, measure, folder / NETWORKS, main)

    @property
    def needed(self) -> list[Site]:
        """What a latency table has to hold."""
        return [*self.sites, *self.compiled]

    @property
    def is_here(self) -> bool:
        """Whether the backend can measure the target now."""
        device, runtime = self.target.device, self.target.runtime
        accepts = self.backend.accepts_device(device) and self.backend.accepts_runtime(runtime)
        return self.backend.is_here and accepts

    def latency(self, space: SearchSpace) -> LatencyModel | None:
        """None without a table: MACs and parameters do without one."""
        if self.table is None:
            return None
        calibration = self.table.calibration(space.id, space.settings)
        return LatencyModel(
            space.choices, self.sites, self.table, calibration, excluded=space.excluded
        )

    def sites_of(self, space: SearchSpace, architecture: Architecture) -> list[Site]:
        """What the network of one architecture runs on the target."""
        shape = input_shape(space, self.target)
        compiled = compiles(self.backend, self.table)
        return trace_architecture(space, architecture, self.num_classes, shape, compiled)

    def networks(
        self,
        space: SearchSpace,
        architectures: Sequence[Architecture],
        copies: int | None = None,
    ) -> list[MeasuredNetwork]:
        """Measure whole networks, at the table's speed where there is one.

        Args:
            copies: of each network; by default more of a few networks.
        """
        return measure_networks(
            [space.build_network(a, self.num_classes) for a in architectures],
            self.backend,
            self.target,
            self.network_plan,
            in_chans=space.in_chans,
            reference_ms=None if self.table is None else self.table.reference_ms,
            anchors=self._anchors(space),
            copies=copies or (NUM_COPIES if len(architectures) <= FEW else 1),
        )

    def carefully(
        self, space: SearchSpace, architecture: Architecture, times: int = 2
    ) -> Measurement:
        """The mean of several measurements of a whole network, its anchors loaded anew for each."""
        measured = [self.networks(space, [architecture])[0].measurement for _ in range(times)]
        return Measurement.mean(measured)

    def _anchors(self, space: SearchSpace) -> list[tuple[Network, float]]:
        """Some networks of the calibration, from the fastest to the slowest; where networks are
        measured as they are asked for, the first of them."""
        if self.whole is not None and self.whole.first is not None:
            architecture, ms = self.whole.first
            return [(space.build_network(architecture, self.num_classes), ms)]
        calibration = self.table and self.table.calibration(space.id, space.settings)
        found = calibration.anchors if calibration else []
        chosen = found[:: max(1, (len(found) - 1) // (NUM_ANCHORS - 1))]
        return [
            (space.build_network(space.architecture(a["architecture"]), self.num_classes), a["ms"])
            for a in chosen
        ]

    def on_target(self, space: SearchSpace, may_measure: bool = True) -> OnTarget:
        """What can be said of derived networks: predicted with a table, measured where it is."""
        table = self.table

        def predict(calibration: Calibration | None, architecture: Architecture) -> float:
            assert table is not None
            return network_ms(self.sites_of(space, architecture), table, calibration)

        def measure(architecture: Architecture) -> Measurement:
            return self.carefully(space, architecture)

        calibration = table.calibration(space.id, space.settings) if table else None
        predicted = partial(predict, calibration) if table else None
        return OnTarget(
            predicted if self.whole is None else self.whole.of,
            partial(predict, None) if table else None,
            measure if self.is_here and may_measure else None,
        )

    def cost(self, space: SearchSpace, name: str) -> Cost:
        """The cost an objective asks for: latency, macs, params or energy."""
        if not space.additive and name == "latency":
            assert self.whole is not None
            return self.whole
        if not space.additive and name == "energy":
            raise ValueError(
                f"{space.id} has no table of energies, as a layer's cost depends on several "
                "choices at once: give a budget and limits of latency, macs, params or peak_memory"
            )
        if not space.additive:
            return self._traced(space, name)
        if name == "latency":
            model = self.latency(space)
            assert model is not None
            return model
        if name == "energy":
            assert self.table is not None
            return energy_cost(space.choices, self.sites, self.table, space.excluded)
        make = {"macs": macs_cost, "params": params_cost}[name]
        return make(space.choices, self.sites, space.excluded)

    def costs(self, space: SearchSpace) -> tuple[Cost, ...]:
        """All costs that objectives and limits can be about, as far as they are known: latency and
        energy where they are measured."""
        names = ["macs", "params"]
        if self.whole is not None:
            names.append("latency")
        if self.table is not None:
            names.append("latency")
            measured = self.table.measurements
            if all(measured[site.key].energy_mj is not None for site in self.sites):
                names.append("energy")
        return (*(self.cost(space, name) for name in names), self._traced(space, "peak_memory"))

    def limits(self, space: SearchSpace, objective: Objective) -> tuple[Limit, ...]:
        """The limits of an objective, on its kinds of cost and on peak memory."""
        return tuple(
            Limit(
                self._peak_memory(space) if name == "peak_memory" else self.cost(space, name), upper
            )
            for name, upper in objective.limits.items()
        )

    def _traced(self, space: SearchSpace, name: str) -> TracedCost:
        shape = input_shape(space, self.target)
        return TracedCost(name, self.num_classes, shape, self.target.dtype)

    def _peak_memory(self, space: SearchSpace) -> Cost:
        if not space.additive:
            return self._traced(space, "peak_memory")
        if not space.interchangeable:
            raise ValueError(
                f"objective.limits.peak_memory has no rule for {space.id}, where layers of several "
                "widths follow each other; limit macs, params or latency instead"
            )
        shape = input_shape(space, self.target)
        return PeakMemory(space, self.num_classes, shape, self.target.dtype)


def compiles(backend: Backend, table: LatencyTable | None) -> bool:
    """Whether the target's runtime compiles graphs: a table measured elsewhere knows better."""
    return backend.framed if table is None else table.provenance.get("compiled", backend.framed)


def input_shape(space: SearchSpace, target: Target) -> tuple[int, int, int, int]:
    return target.batch, space.in_chans, target.resolution, target.resolution
