from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from latency.energy import energy_counter, rapl
from latency.runner import Plan
from latency.samples import Operation
from latency.table import Target

RANGE = 1000_000  # a counter of RANGE + 1 values, in uJ


def set_zone(folder: Path, name: str, energy: int | str, highest: int = RANGE) -> None:
    zone = folder / name
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{energy}\n")
    (zone / "max_energy_range_uj").write_text(f"{highest}\n")


def test_the_sum_over_packages_in_millijoules(tmp_path: Path) -> None:
    set_zone(tmp_path, "intel-rapl:0", 5_000)
    set_zone(tmp_path, "intel-rapl:0:0", 1)  # the cores: a part of the package
    set_zone(tmp_path, "intel-rapl:1", 9_000)
    set_zone(tmp_path, "intel-rapl", 1)
    read = rapl(tmp_path)
    assert read is not None
    assert read() == 0.0
    set_zone(tmp_path, "intel-rapl:0", 7_000)
    set_zone(tmp_path, "intel-rapl:0:0", 1_000)
    set_zone(tmp_path, "intel-rapl:1", 9_500)
    assert read() == pytest.approx(2.5)


def test_a_counter_that_wraps_goes_on_growing(tmp_path: Path) -> None:
    set_zone(tmp_path, "intel-rapl:0", RANGE - 1_000)
    set_zone(tmp_path, "intel-rapl:1", 300, highest=499)
    read = rapl(tmp_path)
    assert read is not None
    true, values = 0.0, [read()]
    for step in range(1, 40):
        spent = 70_000 * step
        set_zone(tmp_path, "intel-rapl:0", (RANGE - 1_000 + spent) % (RANGE + 1))
        set_zone(tmp_path, "intel-rapl:1", (300 + 400 * step) % 500, highest=499)
        true = (spent + 400 * step) / 1e3
        values.append(read())
        assert values[-1] == pytest.approx(true)
    assert values == sorted(values)


def test_without_a_counter_that_can_be_read_there_is_none(tmp_path: Path) -> None:
    assert rapl(tmp_path / "none") is None
    assert rapl(tmp_path) is None
    set_zone(tmp_path, "intel-rapl:0:0", 1)
    assert rapl(tmp_path) is None  # a part of a package alone
    set_zone(tmp_path, "intel-rapl:0", "secret")
    assert rapl(tmp_path) is None
    set_zone(tmp_path, "intel-rapl:0", 5)
    assert rapl(tmp_path) is not None
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()  # cannot be read, even by root
    assert rapl(tmp_path) is None


def test_devices_have_counters_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_zone(tmp_path, "intel-rapl:0", 5)
    monkeypatch.setattr("latency.energy.RAPL", tmp_path)
    assert energy_counter("cpu") is not None
    if not torch.cuda.is_available():
        assert energy_counter("cuda") is None


def test_a_call_costs_what_the_counter_grew_in_its_burst(
    scripted: Any, named: Any, target: Target, plan: Plan, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every call costs 4 mJ, those of `b` 10 mJ; the counter wraps many times."""
    spent = [0]

    class Spending(scripted):  # type: ignore[misc]
        def prepare(self, operation: Operation, target: Target) -> Any:
            timer = super().prepare(operation, target)
            is_b = getattr(operation.module, "name", "") == "b"

            def spend(num_calls: int) -> float:
                spent[0] += num_calls * (10_000 if is_b else 4_000)
                set_zone(tmp_path, "intel-rapl:0", spent[0] % 200_001, highest=200_000)
                return float(timer(num_calls))

            return spend

    set_zone(tmp_path, "intel-rapl:0", 0, highest=200_000)
    monkeypatch.setattr("latency.energy.RAPL", tmp_path)
    operations = {x: Operation(named(x), ((1, 1),), x) for x in "ab"}
    for each in (plan, replace(plan, burst_ms=3.0)):
        samples = Spending().sample(operations, target, each)
        found = {x: samples.measurement(x).energy_mj for x in ("an empty call", "a", "b")}
        assert found == pytest.approx({"an empty call": 4.0, "a": 4.0, "b": 10.0})
