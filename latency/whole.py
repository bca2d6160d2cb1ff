"""Latency of whole networks, for spaces in which it is no sum that a table could hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from accelerate.utils import broadcast_object_list

from latency.traced import SingleCost
from supernet.choice import Architecture
from supernet.space import SearchSpace
from supernet.tracking import Journal, read_journal


class WholeLatency(SingleCost):
    """ms of each network, measured on the target when it is first asked for, as in MnasNet's search
    (Tan et al. 2019, section 3).

    In several processes all ask in the same order, and the first one measures.

    Args:
        space: of the architectures.
        measure: of a network, in ms.
        path: of a journal that keeps what was measured, so that a search that is resumed goes on
            from the same numbers.
        main: whether this process measures.
    """

    def __init__(
        self,
        space: SearchSpace,
        measure: Callable[[Architecture], float],
        path: Path,
        main: bool = True,
    ) -> None:
        super().__init__("latency", "ms")
        self._measure, self._path, self._main = measure, path, main
        self._known = {
            space.architecture(record["architecture"]): float(record["ms"])
            for record in read_journal(path)
        }

    @property
    def first(self) -> tuple[Architecture, float] | None:
        """What was measured first: the speed that the device had then."""
        return next(iter(self._known.items()), None)

    def of(self, architecture: Architecture) -> float:
        """Of a network that was not measured yet, a measurement of some seconds."""
        if architecture not in self._known:
            ms = [self._measure(architecture) if self._main else None]
            self._known[architecture] = float(broadcast_object_list(ms)[0])
            if self._main:
                record = {"architecture": dict(architecture), "ms": self._known[architecture]}
                Journal(self._path).write(record)
        return self._known[architecture]
