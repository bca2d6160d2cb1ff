from __future__ import annotations

import pytest
import torch
from torch import nn

from latency.runner import Plan
from latency.samples import Operation
from latency.table import Target

pytest.importorskip("openvino")

from latency.backends.openvino import OpenVINO  # noqa: E402


def test_more_work_takes_longer() -> None:
    backend, target = OpenVINO(), Target("cpu", "openvino", 1, 1, "float32", 32)
    backend.check(target)
    operations = {
        name: Operation(nn.Conv2d(8, width, 3, padding=1), ((1, 8, 64, 64),), name)
        for name, width in (("narrow", 8), ("wide", 1024))
    }
    samples = backend.sample(operations, target, Plan(rounds=15, min_rounds=15, burst_ms=0.5))
    narrow, wide = (samples.measurement(name).median_ms for name in operations)
    assert samples.overhead_ms < narrow < wide
    assert torch.get_num_threads() == 1


def test_an_unknown_device_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="backend.device='TPU'.*valid: .*CPU"):
        OpenVINO(device="TPU")
