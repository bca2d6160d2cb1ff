"""A space as its target sees it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from latency.measure import MeasuredNetwork
from latency.table import Measurement
from supernet.spaces.mnasnet import MnasNet
from supernet_scripts.measured import Measured


@pytest.mark.parametrize("number,copies", [(1, 4), (4, 4), (5, 1)])
def test_a_few_networks_are_timed_in_several_copies(
    number: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    function = "supernet_scripts.measured.measure_networks"
    monkeypatch.setattr(function, lambda *_, **settings: asked.update(settings))
    space = SimpleNamespace(in_chans=3, build_network=lambda architecture, num_classes: None)
    measured: Any = SimpleNamespace(
        num_classes=10, backend=None, target=None, network_plan=None, table=None,
        _anchors=lambda space: [],
    )  # fmt: skip
    Measured.networks(measured, space, [None] * number)  # type: ignore[arg-type, list-item]
    assert asked["copies"] == copies


def test_a_careful_measurement_is_the_mean_of_several() -> None:
    times = iter([2.0, 4.0, 9.0])

    def networks(space: Any, architectures: Any) -> list[MeasuredNetwork]:
        return [MeasuredNetwork(Measurement(next(times), 0.1, 0.1, 10), (1.0, 1.0), 1.0)]

    measured: Any = SimpleNamespace(networks=networks)
    found = Measured.carefully(measured, None, None, times=3)  # type: ignore[arg-type]
    assert (found.median_ms, found.num_runs) == (5.0, 30)


def test_peak_memory_is_refused_where_candidates_do_not_fit_each_other() -> None:
    with pytest.raises(ValueError, match="peak_memory has no rule for .*MnasNet, .*macs"):
        Measured._peak_memory(None, MnasNet())  # type: ignore[arg-type]
