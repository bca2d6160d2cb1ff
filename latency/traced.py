"""Costs that are no sum over choices, counted in the network of each architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import lru_cache

import torch

from latency.memory import peak_memory
from latency.sites import trace
from supernet.choice import Architecture
from supernet.limits import Membership
from supernet.network import Network
from supernet.space import LinearConstraint, SearchSpace

UNITS = {"macs": "MACs", "params": "parameters", "peak_memory": "bytes"}
Shape = tuple[int, int, int, int]


class SingleCost(ABC):
    """A cost of which an integer program learns nothing but which architecture is out."""

    def __init__(self, name: str, unit: str) -> None:
        self.name, self.unit = name, unit

    @abstractmethod
    def of(self, architecture: Architecture) -> float:
        """The cost of one architecture."""

    def rows(self, upper: float) -> list[LinearConstraint]:
        return []

    def cut(self, architecture: Architecture, upper: float) -> LinearConstraint:
        """Forbids one architecture."""
        return Membership([architecture]).cut(architecture, upper)


class TracedCost(SingleCost):
    """Multiply-accumulates of one image, parameters or peak memory, exactly, of any space.

    Args:
        name: "macs", "params" or "peak_memory".
        num_classes: outputs of the classifier.
        input_shape: (batch, in_chs, height, width).
        dtype: of all activations.
    """

    def __init__(
        self, name: str, num_classes: int, input_shape: Shape, dtype: str = "float32"
    ) -> None:
        super().__init__(name, UNITS[name])
        self.num_classes, self.input_shape = num_classes, input_shape
        self.itemsize = getattr(torch, dtype).itemsize

    def of(self, architecture: Architecture) -> float:
        if self.name == "params":
            return _params(architecture, self.num_classes)
        if self.name == "macs":
            return _macs(architecture, self.num_classes, self.input_shape)
        return _peak(architecture, self.num_classes, self.input_shape) * self.itemsize // 4


def _network(architecture: Architecture, num_classes: int) -> Network:
    """Without content."""
    space = SearchSpace.of(architecture)
    with torch.device("meta"):
        return space.build_network(architecture, num_classes)


@lru_cache(maxsize=1024)
def _params(architecture: Architecture, num_classes: int) -> int:
    return sum(parameter.numel() for parameter in _network(architecture, num_classes).parameters())


@lru_cache(maxsize=1024)
def _macs(architecture: Architecture, num_classes: int, input_shape: Shape) -> int:
    sites = trace(_network(architecture, num_classes), (), input_shape)
    return sum(site.macs for site in sites)


@lru_cache(maxsize=1024)
def _peak(architecture: Architecture, num_classes: int, input_shape: Shape) -> int:
    """Bytes where activations have four each."""
    return peak_memory(_network(architecture, num_classes), input_shape)
