"""OpenVINO on this machine: Intel CPUs, GPUs and NPUs."""

from __future__ import annotations

from time import perf_counter_ns

from latency.backends.base import LocalBackend, torch_versions
from latency.onnx_files import random_inputs, to_onnx
from latency.runner import Timer
from latency.samples import Operation
from latency.table import Target


class OpenVINO(LocalBackend):
    """ONNX models compiled by OpenVINO.

    Args:
        device: as OpenVINO names it: CPU, GPU, NPU, ...
    """

    runtime = "openvino"
    dtypes = ("float32", "int8")
    framed = True

    def __init__(self, device: str = "CPU") -> None:
        try:
            import openvino
        except ImportError:
            raise ValueError(
                "backend=openvino needs openvino: pip install 'supernet[openvino]'"
            ) from None
        self.core, self.version = openvino.Core(), openvino.__version__
        if device not in self.core.available_devices:
            raise ValueError(
                f"OpenVINO has no backend.device={device!r} here; "
                f"valid: {', '.join(self.core.available_devices)}"
            )
        self.name = device
        self.device = self.devices = device.lower()

    def accepts_device(self, device: str) -> bool:
        return device == self.device

    def describe(self) -> dict[str, str]:
        name = self.core.get_property(self.name, "FULL_DEVICE_NAME")
        return {"device_name": str(name), "openvino": self.version, **torch_versions()}

    def prepare(self, operation: Operation, target: Target) -> Timer:
        settings = {"PERFORMANCE_HINT": "LATENCY"}
        if self.name == "CPU":
            settings["INFERENCE_NUM_THREADS"] = str(target.threads)
            settings["INFERENCE_PRECISION_HINT"] = "f32"
        model = self.core.read_model(to_onnx(operation, target.dtype))
        request = self.core.compile_model(model, self.name, settings).create_infer_request()
        inputs = list(random_inputs(operation).values())

        def timer(num_calls: int) -> float:
            start = perf_counter_ns()
            for _ in range(num_calls):
                request.infer(inputs)
            return (perf_counter_ns() - start) / num_calls / 1e6

        return timer
