from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from latency.table import Calibration, LatencyTable, Measurement, OpKey, Target

KEY = OpKey("Conv2d(3,8,3x3)", 3, 8, 2, 32)
TARGET = Target("cpu", "torch", 1, 1, "float32", 32)


SPACE = Calibration("pkg.Space", '{"a":1}', 0.5, 1.1, 0.2, 8, {"mape": 1.5, "points": [[1, 2]]})


def make_table() -> LatencyTable:
    other = replace(KEY, resolution=16)
    measurements = {
        KEY: Measurement(0.25, 0.01, 0.002, 20, 3.5, 0.008),
        other: Measurement(0.1, 0.0, 0.0, 20),
    }
    provenance = {"device_name": "a machine", "rounds": 20}
    return LatencyTable(TARGET, provenance, 0.01, 0.5, measurements, [SPACE])


def test_round_trip(tmp_path: Path) -> None:
    make_table().save(tmp_path / "table.json")
    assert LatencyTable.load(tmp_path / "table.json") == make_table()
    value = json.loads((tmp_path / "table.json").read_text())
    assert value["unit"] == "ms"
    assert value["version"] == 2
    assert (value["overhead_ms"], value["reference_ms"]) == (0.01, 0.5)
    assert value["measurements"][1] == {
        "op": "Conv2d(3,8,3x3)",
        "in_chs": 3,
        "out_chs": 8,
        "stride": 2,
        "resolution": 32,
        "median_ms": 0.25,
        "iqr_ms": 0.01,
        "ci_ms": 0.002,
        "num_runs": 20,
        "energy_mj": 3.5,
        "precision": 0.008,
    }
    assert value["measurements"][0]["energy_mj"] is None
    assert value["calibrations"] == [
        {
            "space": "pkg.Space",
            "settings": '{"a":1}',
            "call_ms": 0.5,
            "scale": 1.1,
            "weight_ms": 0.2,
            "num_networks": 8,
            "report": {"mape": 1.5, "points": [[1, 2]]},
            "anchors": [],
            "op_ms": 0.0,
        }
    ]


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(format="supernet.architecture"), "not a latency table"),
        (lambda t: t.update(version=1), "version 1 is not supported; this package reads version 2"),
        (lambda t: t.update(version=3), "version 3 is not supported"),
        (lambda t: t.pop("reference_ms"), "lacks the field 'reference_ms'"),
        (lambda t: t.update(overhead_ms=-1), "overhead_ms must be a finite number"),
        (lambda t: t.update(calibrations=None), '"calibrations" must be a list'),
        (lambda t: t["calibrations"][0].update(scale=-0.1), "scale must be a finite number"),
        (lambda t: t["calibrations"][0].update(call_ms=None), "call_ms must be a finite number"),
        (lambda t: t["calibrations"][0].update(num_networks=0), "num_networks must be a whole"),
        (lambda t: t["calibrations"][0].update(report=[]), "report must be an object"),
        (lambda t: t["calibrations"][0].pop("settings"), "lacks the field 'settings'"),
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
        (lambda t: t["measurements"][1].update(ci_ms=-0.5), "ci_ms must be a finite"),
        (lambda t: t["measurements"][1].update(precision=None), "precision must be a finite"),
        (lambda t: t["measurements"][1].update(energy_mj="1"), "energy_mj must be a finite"),
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
    assert part.measurements == {KEY: make_table().measurements[KEY]}
    assert (part.target, part.overhead_ms, part.reference_ms) == (TARGET, 0.01, 0.5)
    assert part.calibrations == [SPACE]


def test_values_are_checked_where_they_are_made() -> None:
    with pytest.raises(ValueError, match="threads must be a whole number of at least 1, not 0"):
        replace(TARGET, threads=0)
    with pytest.raises(ValueError, match="median_ms must be a finite number"):
        Measurement(float("nan"), 0.0, 0.0, 1)


# ---- arithmetic


def test_what_an_operation_stood_in_is_subtracted() -> None:
    whole = Measurement(1.0, 0.2, 0.03, 30, 8.0, 0.03)
    left = whole.without(Measurement(0.4, 0.1, 0.04, 60, 3.0, 0.1))
    assert left.median_ms == pytest.approx(0.6)
    assert left.ci_ms == pytest.approx(0.05)  # independent errors: 0.03 and 0.04
    assert (left.iqr_ms, left.num_runs, left.precision) == (0.2, 30, 0.03)
    assert left.energy_mj == 5.0


def test_a_difference_is_never_below_zero() -> None:
    left = Measurement(1.0, 0.2, 0.0, 30, 2.0).without(Measurement(1.5, 0.1, 0.0, 60, 3.0))
    assert (left.median_ms, left.energy_mj) == (0.0, 0.0)


def test_energy_that_one_of_two_lacks_is_not_known() -> None:
    known, unknown = Measurement(2.0, 0.0, 0.0, 1, 2.0), Measurement(1.0, 0.0, 0.0, 1)
    assert known.without(unknown).energy_mj is None
    assert unknown.without(known).energy_mj is None


# ---- merging


def other_table(**changes: Any) -> LatencyTable:
    """Measured when the device was half as fast; `KEY` again, and one more operation."""
    new = replace(KEY, op="ReLU")
    measurements = {
        KEY: Measurement(0.6, 0.02, 0.004, 40, 3.0, 0.01),
        new: Measurement(4.0, 0.2, 0.1, 40, 9.0, 0.02),
    }
    calibration = replace(SPACE, space="pkg.Other", call_ms=2.0, scale=1.3, weight_ms=0.6)
    table = LatencyTable(
        TARGET, {"device_name": "a machine", "rounds": 40}, 0.02, 1.0, measurements, [calibration]
    )
    return replace(table, **changes)


def test_merging_brings_the_other_table_to_this_ones_speed() -> None:
    table = make_table()
    merged = table.merge(other_table())
    new, small = replace(KEY, op="ReLU"), replace(KEY, resolution=16)
    assert merged.measurements == {
        small: table.measurements[small],
        KEY: Measurement(0.3, 0.01, 0.002, 40, 3.0, 0.01),
        new: Measurement(2.0, 0.1, 0.05, 40, 9.0, 0.02),
    }
    assert (merged.overhead_ms, merged.reference_ms) == (0.01, 0.5)
    assert merged.provenance == table.provenance
    # twice the speed halves what is in ms, and leaves the factor of a sum of halved times
    assert merged.calibration("pkg.Other", '{"a":1}') == replace(
        SPACE, space="pkg.Other", call_ms=1.0, scale=1.3, weight_ms=0.3
    )
    assert merged.calibration("pkg.Space", '{"a":1}') == SPACE
    assert table == make_table()


def test_merging_tables_of_one_speed_forgets_nothing() -> None:
    merged = make_table().merge(make_table())
    assert merged == make_table()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"target": replace(TARGET, threads=2)}, "threads=1 instead of 2"),
        ({"target": replace(TARGET, dtype="int8")}, "dtype='float32' instead of 'int8'"),
        ({"provenance": {"device_name": "mine"}}, "different devices .*'a machine' and 'mine'"),
        ({"provenance": {}}, "different devices .*'a machine' and None"),
    ],
)
def test_tables_of_other_targets_or_devices_are_not_merged(
    other: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_table().merge(other_table(**other))


def test_one_calibration_a_space() -> None:
    table = make_table()
    settings = replace(SPACE, settings='{"a":2}')
    table.calibrate(settings)
    assert table.calibrations == [SPACE, settings]
    better = replace(SPACE, scale=1.2)
    table.calibrate(better)
    assert table.calibrations == [settings, better]
    assert table.calibration("pkg.Space", '{"a":1}') == better
    assert table.calibration("pkg.Space", '{"a":3}') is None
    merged = make_table().merge(replace(make_table(), calibrations=[better]))
    assert merged.calibrations == [better]


def test_the_mean_of_independent_measurements() -> None:
    first, second = Measurement(2.0, 0.5, 0.3, 10, 5.0), Measurement(4.0, 0.25, 0.4, 20, 7.0)
    mean = Measurement.mean([first, second])
    assert mean == Measurement(3.0, 0.375, 0.25, 30, 6.0, 0.25 / 3)
    assert Measurement.mean([first, replace(second, energy_mj=None)]).energy_mj is None
    assert Measurement.mean([first]) == replace(first, precision=0.15)
