from __future__ import annotations

import logging
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from latency import onnx_files
from latency.framing import framed
from latency.onnx_files import input_names, random_inputs, to_onnx
from latency.samples import Operation
from supernet.ops.mbconv import inverted_residual
from supernet.spaces.nasbench201 import NasBench201

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

IMAGE = (2, 8, 10, 10)


class Join(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b + b


def whole_network() -> nn.Module:
    space = NasBench201(widths=(4, 8), num_cells=1, img_size=8)
    return space.build_network(space.sample(torch.Generator().manual_seed(0)), 10)


OPERATIONS = {
    "conv": Operation(nn.Conv2d(8, 16, 3, stride=2), (IMAGE,), "conv"),
    "mbconv": Operation(inverted_residual(8, 12, 5, 2, 3, "relu6"), (IMAGE,), "mbconv"),
    "framed mbconv": framed(
        Operation(inverted_residual(8, 8, 3, 1, 3, "hard_swish"), (IMAGE,), "mbconv")
    ),
    "join": Operation(Join(), (IMAGE, (2, 8, 1, 1)), "join"),
    "linear": Operation(nn.Linear(8, 4), ((2, 8),), "linear"),
    "identity": Operation(nn.Identity(), ((1, 1),), "identity"),
    "network": Operation(whole_network(), ((2, 3, 8, 8),), "network"),
}


def run(model: bytes, operation: Operation) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, random_inputs(operation))]


def compute(operation: Operation) -> list[np.ndarray]:
    inputs = [torch.from_numpy(value) for value in random_inputs(operation).values()]
    with torch.no_grad():
        outputs = operation.module.eval()(*inputs)
    return [o.numpy() for o in (outputs if isinstance(outputs, tuple) else (outputs,))]


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_model_computes_what_its_module_does(name: str, unsettle_norms: None) -> None:
    operation = OPERATIONS[name]
    found, expected = run(to_onnx(operation, "float32"), operation), compute(operation)
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.fixture
def unsettle_norms() -> None:
    """Statistics as after training: folding a batch norm wrongly would show."""
    generator = torch.Generator().manual_seed(1)
    for operation in OPERATIONS.values():
        for module in operation.module.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)


def test_the_module_is_left_as_it_was() -> None:
    module = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)).half().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    model = to_onnx(Operation(module, (IMAGE,), "x"), "float32")
    assert all(part.training for part in module.modules())
    assert all(torch.equal(before[n], v) for n, v in module.state_dict().items())
    assert all(before[n].dtype == v.dtype for n, v in module.state_dict().items())
    graph = onnx.load_from_string(model).graph
    assert {i.data_type for i in graph.initializer} == {onnx.TensorProto.FLOAT}
    assert [i.type.tensor_type.elem_type for i in graph.input] == [onnx.TensorProto.FLOAT]


def node_types(model: bytes) -> list[str]:
    return [node.op_type for node in onnx.load_from_string(model).graph.node]


@pytest.mark.parametrize("name", ["conv", "mbconv", "framed mbconv", "network"])
def test_an_int8_model_is_quantised(name: str, unsettle_norms: None) -> None:
    operation = OPERATIONS[name]
    plain, model = to_onnx(operation, "float32"), to_onnx(operation, "int8")
    kinds = node_types(model)
    assert "QuantizeLinear" in kinds and "DequantizeLinear" in kinds
    assert "QuantizeLinear" not in node_types(plain)
    # folded into convolutions, but for the one that follows the cells
    assert kinds.count("BatchNormalization") == (name == "network")
    graph = onnx.load_from_string(model).graph
    weights = {i.name: i for i in graph.initializer}
    made = {output: node for node in graph.node for output in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert convolutions
    for node in convolutions:
        reader = made[node.input[1]]
        assert reader.op_type == "DequantizeLinear"
        assert weights[reader.input[0]].data_type == onnx.TensorProto.INT8
        assert len(weights[reader.input[1]].dims) == 1  # a scale a channel
    for ours, theirs in zip(run(model, operation), compute(operation), strict=True):
        assert ours.dtype == np.float32 and ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() < 0.2 * np.abs(theirs).max()


@pytest.mark.parametrize("name", ["identity", "join", "linear"])
def test_what_has_no_convolution_runs_in_int8_too(name: str) -> None:
    operation = OPERATIONS[name]
    found = run(to_onnx(operation, "int8"), operation)
    for ours, theirs in zip(found, compute(operation), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.1 * np.abs(theirs).max())


def test_quantising_is_silent(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    level = logging.getLogger().level
    with caplog.at_level(logging.NOTSET, "latency"):
        to_onnx(OPERATIONS["conv"], "int8")
    assert logging.getLogger().level == level
    out, err = capfd.readouterr()
    assert out == err == "" and not caplog.records


def test_inputs_are_random_and_reproducible() -> None:
    operation = OPERATIONS["join"]
    assert input_names(operation) == ["input0", "input1"]
    first, again, other = (random_inputs(operation, seed) for seed in (0, 0, 1))
    assert {name: value.shape for name, value in first.items()} == {
        "input0": IMAGE,
        "input1": (2, 8, 1, 1),
    }
    assert all(value.dtype == np.float32 and value.std() > 0.3 for value in first.values())
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["input0"], other["input0"])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        onnx_files, "find_spec", lambda name: None if name == "onnx" else find_spec(name)
    )
    with pytest.raises(ValueError, match=r"ONNX models need onnx: pip install 'supernet\[onnx\]'"):
        to_onnx(OPERATIONS["conv"], "float32")
