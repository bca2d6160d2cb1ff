"""Costs that are no sum over choices: each architecture's network is traced."""

from __future__ import annotations

from functools import lru_cache

import torch

from latency.memory import peak_memory
from latency.sites import trace_architecture
from supernet.choice import Architecture
from supernet.limits import Membership
from supernet.space import LinearConstraint, SearchSpace

UNITS = {"macs": "MACs", "params": "parameters", "peak_memory": "bytes"}
Shape = tuple[int, int, int, int]


class TracedCost:
    """Multiply-accumulates of one image, parameters or peak memory, exactly, of any space.

    An integer program learns nothing of it but which architecture is out.

    Args:
        name: "macs", "params" or "peak_memory".
        num_classes: outputs of the classifier.
        input_shape: (batch, in_chs, height, width).
        dtype: of all activations.
    """

    def __init__(
        self, name: str, num_classes: int, input_shape: Shape, dtype: str = "float32"
    ) -> None:
        self.name, self.unit = name, UNITS[name]
        self.num_classes, self.input_shape = num_classes, input_shape
        self.itemsize = getattr(torch, dtype).itemsize

    def of(self, architecture: Architecture) -> float:
        if self.name == "peak_memory":
            return _peak(architecture, self.num_classes, self.input_shape) * self.itemsize // 4
        macs, params = _totals(architecture, self.num_classes, self.input_shape)
        return macs if self.name == "macs" else params

    def rows(self, upper: float) -> list[LinearConstraint]:
        return []

    def cut(self, architecture: Architecture, upper: float) -> LinearConstraint:
        """Forbids one architecture."""
        return Membership([architecture]).cut(architecture, upper)


@lru_cache(maxsize=1024)
def _totals(architecture: Architecture, num_classes: int, input_shape: Shape) -> tuple[int, int]:
    """(multiply-accumulates, parameters), of a network without content."""
    with torch.device("meta"):
        space = SearchSpace.of(architecture)
        sites = trace_architecture(space, architecture, num_classes, input_shape)
    return sum(site.macs for site in sites), sum(site.params for site in sites)


@lru_cache(maxsize=1024)
def _peak(architecture: Architecture, num_classes: int, input_shape: Shape) -> int:
    """Bytes where activations have four each."""
    with torch.device("meta"):
        network = SearchSpace.of(architecture).build_network(architecture, num_classes)
    return peak_memory(network, input_shape)
