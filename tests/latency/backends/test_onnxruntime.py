from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latency import runner
from latency.backends.onnxruntime import OnnxRuntime
from latency.measure import measure, measure_networks
from latency.runner import Plan, session_timer
from latency.samples import EMPTY, Operation, Unmeasurable
from latency.sites import Site
from latency.table import OpKey, Target

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")

TARGET = Target(runtime="onnxruntime", resolution=8)
PLAN = Plan(rounds=2, min_rounds=2, warmup=1, burst_ms=0.2)
SHAPE = (1, 8, 16, 16)


class Unexportable(nn.Module):
    """PyTorch runs it; ONNX has no name for it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


def make_site(module: nn.Module, choice: str | None = None, option: str | None = None) -> Site:
    key = OpKey(type(module).__name__, 8, 8, 1, 16)
    return Site(key, choice, option, module, (SHAPE,), SHAPE, 0, 0)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_operations_are_measured_in_frames(dtype: str) -> None:
    conv = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    backend, target = OnnxRuntime(), replace(TARGET, dtype=dtype)
    plan = replace(PLAN, rounds=9, min_rounds=9)  # so that a disturbed one does not decide
    samples = backend.sample({"conv": Operation(conv, (SHAPE,), "a=b")}, target, plan)
    assert samples.overhead_ms > 0 and samples.reference_ms > 0
    assert samples.measurement("conv").median_ms > samples.measurement(EMPTY).median_ms
    table = measure([make_site(conv), make_site(nn.Identity())], backend, target, PLAN)
    assert [m.num_runs for m in table.measurements.values()] == [2, 2]
    assert table.target.dtype == dtype
    assert table.provenance["onnxruntime"] == onnxruntime.__version__
    (found,) = measure_networks([conv], backend, replace(target, resolution=16), PLAN, in_chans=8)
    assert found.measurement.median_ms > 0


@pytest.mark.parametrize("framed", [False, True])
def test_a_candidate_that_cannot_be_exported_is_named(
    framed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxRuntime, "framed", framed)
    sites = [make_site(nn.ReLU()), make_site(Unexportable(), "stage2_1", "bessel")]
    with pytest.raises(Unmeasurable, match="^stage2_1=bessel cannot be measured .Unexportable"):
        measure(sites, OnnxRuntime(), TARGET, PLAN)


def test_a_candidate_that_does_not_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exported model that the runtime refuses, and one that fails when it is called."""

    class Session(onnxruntime.InferenceSession):
        def run(self, *args: Any, **kwargs: Any) -> Any:
            if any(meta.shape == [2, 3] for meta in self.get_inputs()):
                raise RuntimeError("no such kernel")
            return super().run(*args, **kwargs)

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    operations = {
        "relu": Operation(nn.ReLU(), ((1, 3),), "a=relu"),
        "tanh": Operation(nn.Tanh(), ((2, 3),), "a=tanh, b=tanh"),
    }
    with pytest.raises(Unmeasurable, match="^a=tanh, b=tanh cannot .*tanh.: no such kernel"):
        OnnxRuntime().sample(operations, TARGET, PLAN)

    monkeypatch.setattr("latency.backends.onnxruntime.to_onnx", lambda *_: b"no model")
    with pytest.raises(Unmeasurable, match="^an empty call cannot be measured"):
        OnnxRuntime().sample(operations, TARGET, PLAN)


def test_the_timer_counts_milliseconds_and_threads_are_the_targets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Session:
        def __init__(self, model: Any, options: Any, providers: Any) -> None:
            seen.append((model, options.intra_op_num_threads, providers))

        def get_inputs(self) -> list[Any]:
            return [SimpleNamespace(name="input0")]

        def run(self, names: None, feeds: dict[str, np.ndarray]) -> None:
            assert list(feeds) == ["input0"]  # what has no effect is left out
            clock[0] += 0.002

    seen: list[Any] = []
    clock = [5.0]
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(runner, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    inputs = {"input0": np.zeros(1), "input1": np.zeros(1)}
    timer = session_timer(b"model", inputs, 3, [("CPUExecutionProvider", {})])
    assert seen == [(b"model", 3, [("CPUExecutionProvider", {})])]
    assert timer(1) == pytest.approx(2.0)
    assert timer(10) == pytest.approx(2.0)
    assert clock[0] == pytest.approx(5.0 + 11 * 0.002)


def test_description_names_the_device_the_provider_and_the_versions() -> None:
    found = OnnxRuntime(provider_options={"use_arena": "1"}).describe()
    assert found["onnxruntime"] == onnxruntime.__version__
    assert found["provider"] == "CPUExecutionProvider use_arena=1"
    assert {"device_name", "torch", "python", "platform"} <= found.keys()
    assert OnnxRuntime().describe()["provider"] == "CPUExecutionProvider"
    assert all(isinstance(value, str) and value for value in found.values())


def test_an_unknown_provider_is_refused() -> None:
    with pytest.raises(ValueError, match="backend.provider='NoProvider' here; valid: .*CPUExec"):
        OnnxRuntime("NoProvider")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float16"}, "'float16'; valid: float32, int8"),
        ({"device": "cuda"}, "'cuda' here; valid: cpu"),
        ({"runtime": "torch"}, "'torch'; valid: onnxruntime"),
    ],
)
def test_what_it_cannot_measure(change: dict[str, str], message: str) -> None:
    OnnxRuntime().check(TARGET)
    with pytest.raises(ValueError, match=message):
        OnnxRuntime().check(replace(TARGET, **change))
