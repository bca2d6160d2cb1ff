"""How well a calibrated table predicts whole networks: one JSON line a setting, then a table.

    python scripts/benchmark_latency.py mbconv:96:onnxruntime nasbench201:32:torch_cpu

A setting is space:resolution:backend or space:resolution:backend:dtype. Operations, 8 networks to
fit on and 60 others are measured in the same rounds; figures are of the 60.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from latency.backends.base import Backend
from latency.backends.onnxruntime import OnnxRuntime
from latency.backends.torch_cpu import TorchCPU
from latency.backends.torch_cuda import TorchCUDA
from latency.runner import Plan
from latency.sites import trace, trace_architecture, trace_compiled
from latency.table import Target
from latency.validate import calibrate, draw, measure_with_networks
from supernet.mixed_ops.base import MixedOp
from supernet.space import SearchSpace
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201

SPACES: dict[str, tuple[Callable[..., SearchSpace], int]] = {
    "mbconv": (MBConv, 1000),
    "nasbench201": (NasBench201, 10),
}
BACKENDS: dict[str, Callable[[], Backend]] = {
    "onnxruntime": OnnxRuntime,
    "torch_cpu": TorchCPU,
    "torch_cuda": TorchCUDA,
}
COLUMNS = ("mape", "worst", "within_5", "within_10", "rmse_ms", "kendall_tau", "spearman", "noise")


def benchmark(setting: str, plan: Plan, num_fit: int, num_held_out: int) -> dict[str, Any]:
    """Measure, calibrate and report one setting."""
    name, resolution, backend_name, *rest = setting.split(":")
    make_space, num_classes = SPACES[name]
    backend, space = BACKENDS[backend_name](), make_space(img_size=int(resolution))
    dtype = rest[0] if rest else "float32"
    target = Target(backend.device, backend.runtime, 1, 1, dtype, int(resolution))
    shape = (1, space.in_chans, space.img_size, space.img_size)
    sites = trace(space.build(MixedOp, num_classes, search=False), space.choices, shape)
    compiled = trace_compiled(space, num_classes, shape) if backend.framed else []
    fitted, held_out = draw(space, sites, num_fit, num_held_out, plan.seed)
    drawn = [*fitted, *held_out]
    began = time.perf_counter()
    table, networks = measure_with_networks(
        [*sites, *compiled],
        [space.build_network(architecture, num_classes) for architecture in drawn],
        backend,
        target,
        plan,
        in_chans=space.in_chans,
    )
    seconds = time.perf_counter() - began
    cut = [trace_architecture(space, a, num_classes, shape, backend.framed) for a in drawn]
    found = calibrate(space, table, drawn, cut, networks, len(fitted))
    return {
        "setting": setting,
        "seconds": round(seconds, 1),
        "ended": table.provenance["ended"],
        "rounds": max(network.measurement.num_runs for network in networks),
        "call_ms": found.call_ms,
        "op_ms": found.op_ms,
        "scale": found.scale,
        "weight_ms": found.weight_ms,
        **found.report,
        "device": backend.describe(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("settings", nargs="+")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--precision", type=float, default=0.003)
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds a setting")
    parser.add_argument("--fit", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=60)
    args = parser.parse_args()
    plan = Plan(rounds=args.rounds, precision=args.precision, time_limit_s=args.time_limit)
    rows = []
    for setting in args.settings:
        rows.append(benchmark(setting, plan, args.fit, args.held_out))
        print(json.dumps(rows[-1]), flush=True)
    print("| setting | " + " | ".join(COLUMNS) + " | plain sum |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for row in rows:
        cells = [f"{row[column]:.3g}" for column in COLUMNS]
        plain = f"{row['uncalibrated']['mape']:.3g}"
        print(f"| {row['setting']} | " + " | ".join([*cells, plain]) + " |")


if __name__ == "__main__":
    main()
