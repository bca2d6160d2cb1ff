from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latency.table import LatencyTable, Measurement, OpKey, Target

KEY = OpKey("Conv2d(3,8,3x3)", 3, 8, 2, 32)
TARGET = Target("cpu", "torch", 1, 1, "float32", 32)


def make_table() -> LatencyTable:
    other = replace(KEY, resolution=16)
    measurements = {KEY: Measurement(0.25, 0.01, 20), other: Measurement(0.1, 0.0, 20)}
    return LatencyTable(TARGET, {"device_name": "a machine", "rounds": 20}, measurements)


def test_round_trip(tmp_path: Path) -> None:
    make_table().save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == make_table()
    value = json.loads((tmp_path / "table.json").read_text())
    assert value["unit"] == "ms"
    assert value["version"] == 1
    assert value["measurements"][1] == {
        "op": "Conv2d(3,8,3x3)",
        "in_chs": 3,
        "out_chs": 8,
        "stride": 2,
        "resolution": 32,
        "median_ms": 0.25,
        "iqr_ms": 0.01,
        "num_runs": 20,
    }


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(format="supernet.architecture"), "not a latency table"),
        (lambda t: t.update(version=2), "version 2 is not supported"),
        (lambda t: t.update(unit="s"), "the unit of a latency table is \"ms\", not 's'"),
        (lambda t: t.pop("target"), "lacks the field 'target'"),
        (lambda t: t.update(extra=1), "no field 'extra'"),
        (lambda t: t["target"].pop("batch"), "lacks the field 'batch'"),
        (lambda t: t["target"].update(batch=0), "batch must be a whole number"),
        (lambda t: t["target"].update(dtype=None), "dtype must be text"),
        (lambda t: t.update(provenance=[]), '"provenance" must be an object'),
        (lambda t: t.update(measurements={}), '"measurements" must be a list'),
        (lambda t: t["measurements"].append(3), "measurement 2: .* must be an object"),
        (lambda t: t["measurements"][1].update(median_ms=-1.0), "measurement 1: median_ms"),
        (lambda t: t["measurements"][1].update(median_ms=float("nan")), "finite number"),
        (lambda t: t["measurements"][1].update(iqr_ms=float("inf")), "iqr_ms must be a finite"),
        (lambda t: t["measurements"][1].update(median_ms=10**400), "finite number"),
        (lambda t: t["measurements"][1].update(median_ms="1"), "finite number"),
        (lambda t: t["measurements"][1].update(median_ms=True), "finite number"),
        (lambda t: t["measurements"][1].update(num_runs=0), "num_runs must be a whole"),
        (lambda t: t["measurements"][1].update(num_runs=1.5), "num_runs must be a whole"),
        (lambda t: t["measurements"][1].update(stride=0), "stride must be a whole number"),
        (lambda t: t["measurements"][1].update(op=""), "op must be text"),
        (lambda t: t["measurements"][1].pop("stride"), "lacks the field 'stride'"),
        (lambda t: t["measurements"].append(t["measurements"][0]), "measurement 2: listed twice"),
    ],
)
def test_bad_content_is_refused_by_path(tmp_path: Path, change: Change, message: str) -> None:
    value = make_table().to_dict()
    change(value)
    path = tmp_path / "table.json"
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=message) as caught:
        LatencyTable.load(path)
    assert str(path) in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    make_table().save(path)
    text = path.read_text().rstrip()
    for end in range(0, len(text), 37):
        path.write_text(text[:end])
        with pytest.raises(ValueError, match="truncated or not JSON"):
            LatencyTable.load(path)


def test_no_file_and_no_object(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no latency table at"):
        LatencyTable.load(tmp_path / "none.json")
    with pytest.raises(ValueError, match="not a latency table"):
        LatencyTable.from_dict([1])


def test_missing_keys_are_all_listed_with_the_command() -> None:
    table = make_table()
    absent = [replace(KEY, stride=3), replace(KEY, op="Conv2d(3,8,5x5)"), replace(KEY, stride=3)]
    assert table.missing([KEY, *absent]) == sorted(set(absent))
    table.require([KEY], "unused")
    with pytest.raises(ValueError, match="no measurement of 2 operations") as caught:
        table.require([KEY, *absent], "supernet-measure space=toy")
    for key in absent:
        assert str(key) in str(caught.value)
    assert str(caught.value).endswith("measure them with: supernet-measure space=toy")
    assert str(KEY) not in str(caught.value).splitlines()


@pytest.mark.parametrize(
    "other",
    [
        {"device": "cuda"},
        {"runtime": "other"},
        {"threads": 2},
        {"batch": 8},
        {"dtype": "bfloat16"},
        {"resolution": 64},
    ],
)
def test_another_target_is_refused(other: dict[str, Any]) -> None:
    make_table().check_target(TARGET)
    (name,) = other
    with pytest.raises(ValueError, match="latency.allow_other_target=true") as caught:
        make_table().check_target(replace(TARGET, **other))
    assert f"{name}={getattr(TARGET, name)!r} instead of {other[name]!r}" in str(caught.value)


def test_another_machine_is_refused_where_the_name_matters() -> None:
    make_table().check_target(TARGET, "a machine")
    with pytest.raises(ValueError, match="device_name='a machine' instead of 'mine'"):
        make_table().check_target(TARGET, "mine")


def test_restrict() -> None:
    part = make_table().restrict([KEY])
    assert part.measurements == {KEY: Measurement(0.25, 0.01, 20)}
    assert part.target == TARGET


def test_values_are_checked_where_they_are_made() -> None:
    with pytest.raises(ValueError, match="threads must be a whole number of at least 1, not 0"):
        replace(TARGET, threads=0)
    with pytest.raises(ValueError, match="median_ms must be a finite number"):
        Measurement(float("nan"), 0.0, 1)
