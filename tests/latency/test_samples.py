from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from torch import nn

from latency.runner import Row, digest
from latency.samples import EMPTY, Operation, Samples, Unmeasurable, header
from latency.table import Target


def make_samples(conv: list[float], energy: bool = False) -> Samples:
    """One round for each time of the operation, on a steady device."""
    rows: list[Row] = [
        {"order": [-1, 1, 0, -1], "ms": [4.0, ms, 0.25, 4.0], "seconds": float(index)}
        | ({"mj": [8.0, 6.0, 2.0, 8.0]} if energy else {})
        for index, ms in enumerate(conv)
    ]
    return Samples([EMPTY, "conv"], rows, "rounds", {"device_name": "a machine"}, {"rounds": 9})


def test_operations_by_name_beside_the_reference_and_an_empty_call() -> None:
    times = [1.0, 1.02, 1.01, 0.99, 1.0, 1.03, 0.98]
    samples = make_samples(times, energy=True)
    assert samples.reference_ms == 4.0
    assert samples.overhead_ms == 0.25
    found = samples.measurement("conv")
    assert found.median_ms == np.median(times)
    assert found.iqr_ms == pytest.approx(np.subtract(*np.quantile(times, [0.75, 0.25])))
    assert found.ci_ms == pytest.approx((1.03 - 0.98) / 2)  # of seven the extremes
    assert found.precision == pytest.approx(found.ci_ms / found.median_ms)
    assert found.num_runs == 7
    assert (found.energy_mj, samples.measurement(EMPTY).energy_mj) == (6.0, 2.0)
    assert make_samples(times).measurement("conv").energy_mj is None


def test_halves_are_the_even_and_the_odd_rounds() -> None:
    assert make_samples([1.0, 2.0, 1.0, 2.0, 1.0, 2.0]).halves("conv") == (1.0, 2.0)
    assert make_samples([1.0, 5.0, 3.0]).halves("conv") == (2.0, 5.0)


def test_one_round_is_both_halves() -> None:
    assert make_samples([3.0]).halves("conv") == (3.0, 3.0)


def test_a_header_tells_targets_devices_and_operations_apart() -> None:
    target, device = Target(), {"device_name": "a", "torch": "1"}
    same = header(["a", "b"], target, device)
    others = [
        header(["b", "a"], target, device),
        header(["a"], target, device),
        header(["a", "b"], Target(threads=2), device),
        header(["a", "b"], target, {**device, "torch": "2"}),
    ]
    assert same["target"] == asdict(target)
    assert digest(same) == digest(header(["a", "b"], Target(), dict(device)))
    assert len({digest(value) for value in [same, *others]}) == 5


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        (RuntimeError("no kernel\nfor this"), r"\(conv 5x5\): no kernel; to search"),
        (KeyError(), r"\(conv 5x5\): KeyError; to search"),
    ],
)
def test_what_cannot_be_measured_is_named_with_the_way_around_it(
    reason: Exception, words: str
) -> None:
    operation = Operation(nn.Identity(), ((1, 1),), "stage1_0=k5_e3, stage1_1=k5_e3")
    error = Unmeasurable(operation.where, "conv 5x5", reason)
    assert isinstance(error, ValueError)
    with pytest.raises(ValueError, match=words) as caught:
        raise error
    assert str(caught.value).startswith("stage1_0=k5_e3, stage1_1=k5_e3 cannot be measured")
    assert "exclude=['CHOICE=OPTION']" in str(caught.value)
