"""onnxruntime on this machine, with any of its execution providers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from latency.backends.base import LocalBackend, cpu_name, torch_versions
from latency.onnx_files import DTYPES, random_inputs, to_onnx
from latency.runner import Timer, session_timer
from latency.samples import Operation
from latency.table import Target


class OnnxRuntime(LocalBackend):
    """ONNX models, optimised (batch norms folded) and run by onnxruntime.

    Args:
        provider: an execution provider, as onnxruntime names it.
        provider_options: of the provider.
    """

    runtime = "onnxruntime"
    dtypes = DTYPES
    framed = True

    def __init__(
        self,
        provider: str = "CPUExecutionProvider",
        provider_options: Mapping[str, Any] | None = None,
    ) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise ValueError(
                "backend=onnxruntime needs onnxruntime: pip install 'supernet[onnx]'"
            ) from None
        if provider not in (available := onnxruntime.get_available_providers()):
            raise ValueError(
                f"onnxruntime has no backend.provider={provider!r} here; "
                f"valid: {', '.join(available)}"
            )
        self.version = onnxruntime.__version__
        self.provider, self.options = provider, dict(provider_options or {})
        self.device = self.devices = provider.removesuffix("ExecutionProvider").lower()

    def accepts_device(self, device: str) -> bool:
        return device == self.device

    def describe(self) -> dict[str, str]:
        options = " ".join(f"{k}={v}" for k, v in sorted(self.options.items()))
        return {
            "device_name": cpu_name(),
            "onnxruntime": self.version,
            "provider": f"{self.provider} {options}".strip(),
            **torch_versions(),
        }

    def prepare(self, operation: Operation, target: Target) -> Timer:
        model = to_onnx(operation, target.dtype)
        providers = [(self.provider, self.options)]
        return session_timer(model, random_inputs(operation), target.threads, providers)
