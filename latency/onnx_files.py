"""Modules as ONNX models, for runtimes other than PyTorch."""

from __future__ import annotations

import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from latency.samples import Operation
from supernet.mixed_ops.base import compact

OPSET = 17
DTYPES = ("float32", "int8")
PATTERN = 1021  # numbers; a prime, so that the rows of a matrix differ
NUM_CALIBRATION = 4  # random inputs: ranges of activations do not change the time


def to_onnx(operation: Operation, dtype: str) -> bytes:
    """A module in evaluation mode with inputs `input0`, `input1`, ..., and one or more outputs.

    Args:
        dtype: "float32", or "int8": quantised by onnxruntime (static, QDQ, weights by channel),
            with ranges from random inputs.

    Raises:
        ValueError: the packages of the extra `onnx` are missing.
    """
    needed = ("onnx", "onnxruntime")
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ValueError(f"ONNX models need {', '.join(missing)}: pip install 'supernet[onnx]'")
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(shape, generator=generator) for shape in operation.input_shapes)
    file: Any = io.BytesIO()
    module = copy.deepcopy(operation.module).float().cpu().eval()
    compact(module)  # as exported networks are
    with torch.no_grad(), warnings.catch_warnings():
        # The TorchScript exporter is deprecated, and a hundred times faster than its successor.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module, inputs, file, dynamo=False, opset_version=OPSET,
            input_names=input_names(operation),
        )  # fmt: skip
    model = file.getvalue()
    return quantized(model, operation) if dtype == "int8" else model


def with_plain_weights(operation: Operation) -> Operation:
    """A copy whose weights repeat a short pattern of random numbers, always the same one.

    The file compresses well and is the same every time; no runtime is faster or slower for it,
    since there are no zeros, equal neighbours or denormal numbers among them. Parameters that
    hold one value throughout, as new batch norms do, keep it.
    """
    module = copy.deepcopy(operation.module)
    pattern = torch.randn(PATTERN, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for tensor in module.parameters():
            if tensor.min() < tensor.max():
                fan_in = tensor.numel() // len(tensor)
                repeated = pattern.repeat(tensor.numel() // PATTERN + 1)[: tensor.numel()]
                tensor.copy_(repeated.view_as(tensor) * (2 / fan_in) ** 0.5)
    return replace(operation, module=module)


def input_names(operation: Operation) -> list[str]:
    return [f"input{index}" for index in range(len(operation.input_shapes))]


def random_inputs(operation: Operation, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        name: rng.standard_normal(shape, dtype=np.float32)
        for name, shape in zip(input_names(operation), operation.input_shapes, strict=True)
    }


def quantized(model: bytes, operation: Operation) -> bytes:
    """The model with 8-bit weights and activations; inputs and outputs stay float32."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.seeds = iter(range(NUM_CALIBRATION))

        def get_next(self) -> dict[str, np.ndarray] | None:
            seed = next(self.seeds, None)
            return None if seed is None else random_inputs(operation, seed)

    with tempfile.TemporaryDirectory() as folder, _quiet():
        source, prepared, result = (Path(folder) / name for name in ("a.onnx", "b.onnx", "c.onnx"))
        source.write_bytes(model)
        # Folds batch norms into convolutions, as the runtime would before it quantises.
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        quantize_static(
            prepared, result, Reader(), per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
        )  # fmt: skip
        found: bytes = onnx.load(result).SerializeToString()
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantiser advises by log message on what is done already."""
    import onnxruntime

    root: Any = logging.getLogger()
    before = root.level
    root.setLevel(logging.ERROR)
    onnxruntime.set_default_logger_severity(3)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        root.setLevel(before)
        onnxruntime.set_default_logger_severity(2)
