"""Steps per second, peak memory and share of time waiting for data, by space and mixed op.

    python scripts/benchmark_step.py --batch 64 --steps 12

Each line is a process of its own: peak memory is its largest resident size less what it held after
importing and building the data. A step is one weight step and, where there are logits, one
architecture step. `one network` is the largest derived network, trained in the same way: what a
weight step of `binary_gate` is to be compared with. Prints a table and, last, JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from latency.model import params_cost
from latency.sites import trace
from supernet.data.digits import Digits
from supernet.derive import derive
from supernet.engine import make_accelerator
from supernet.mixed_ops.base import MixedOp, PathWeights, Relaxation
from supernet.mixed_ops.binary_gate import BinaryGate
from supernet.mixed_ops.one_shot import OneShot
from supernet.mixed_ops.softmax import Softmax
from supernet.objective import TaskOnly
from supernet.space import SearchSpace
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201
from supernet.strategies.base import Problem
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.ranking import Ranking
from supernet.strategies.state import SearchState

SMALL: dict[str, Any] = {
    "stem_chs": 16,
    "stem_stride": 1,
    "first_chs": 8,
    "stages": ((16, 3, 2), (24, 3, 2), (40, 3, 2)),
    "head_chs": 128,
}
SPACES: dict[str, Callable[[], SearchSpace]] = {
    "nasbench201": lambda: NasBench201(in_chans=1),
    "mbconv_small": lambda: MBConv(in_chans=1, img_size=32, **SMALL),
}
MIXED_OPS: dict[str, Callable[[], Relaxation]] = {
    "one_shot": OneShot,
    "softmax": Softmax,
    "binary_gate": BinaryGate,
}
ONE_NETWORK = "one network"


class Cycle(BinaryGate):
    """Weight steps that take every option of every choice in turn: all get their momentum."""

    turn = 0

    def for_weight_step(self, logits: Any, generator: Any, progress: float) -> Any:
        self.turn += 1
        return {name: PathWeights((self.turn % len(v),)) for name, v in logits.items()}


def peak_mib() -> float:
    """Largest resident size of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage starts from what the parent process held
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes


def make_strategy(batch: int) -> FirstOrder:
    return FirstOrder(
        epochs=1,
        warmup_epochs=0,
        arch_every=1,
        batch_size=batch,
        weight_optimizer={"opt": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 3e-4},
        arch_optimizer={"opt": "adam", "lr": 1e-3, "betas": (0.0, 0.999), "weight_decay": 0.0},
        scheduler={"sched": "cosine"},
        clip_grad=5.0,
        init_std=1e-3,
        channels_last=True,
        ranking=Ranking(1, 1, batch),
    )


def work(space_name: str, mixed_op: str, batch: int, steps: int, weights_only: bool) -> dict:
    """Measure in this process; `weights_only` takes no architecture steps."""
    data = Digits(img_size=32)
    data.search_splits(0)
    before = peak_mib()
    space, relaxation = SPACES[space_name](), MIXED_OPS.get(mixed_op, BinaryGate)()
    sites = trace(space.build(MixedOp, 10, search=False), space.choices, (1, 1, 32, 32))
    cost = params_cost(space.choices, sites)
    largest = derive(space, cost.per_option)
    if mixed_op == ONE_NETWORK:
        supernet, weights_only = space.build_network(largest, 10), True
    else:
        relaxation = Cycle() if weights_only and mixed_op == "binary_gate" else relaxation
        supernet = space.build_supernet(10, relaxation.build)
    problem = Problem(
        space, supernet, relaxation, TaskOnly(), cost, data, make_accelerator("no", "cpu"), 0
    )
    strategy = make_strategy(batch)
    state = SearchState(
        problem,
        batch,
        strategy.weight_optimizer,
        strategy.arch_optimizer,
        strategy.init_std,
        strategy.memory_format,
    )
    supernet.train()
    seconds, waited = [], 0.0
    for step in range(steps):
        start, waits = time.perf_counter(), state.weight_stream.wait_seconds
        strategy.weight_step(state, step / steps)
        if state.logits_optimizer is not None and not weights_only:
            strategy.architecture_step(state)
        seconds.append(time.perf_counter() - start)
        waited += state.weight_stream.wait_seconds - waits
    return {
        "space": space_name,
        "mixed_op": mixed_op,
        "weights_only": weights_only,
        "batch": batch,
        "median_s": statistics.median(seconds[2:]),
        "peak_mib": peak_mib() - before,
        "wait_share": waited / sum(seconds),
    }


def spawn(*arguments: Any) -> dict[str, Any]:
    """`work` in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--worker", json.dumps(arguments)]
        done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(*options.worker)))
        return
    rows = []
    print(f"{'space':12} {'mixed op':12} {'step':8} {'steps/s':>8} {'peak MiB':>9} {'waiting':>8}")
    for space in SPACES:
        for mixed_op in (ONE_NETWORK, *MIXED_OPS):
            for weights_only in (True, False):
                if not weights_only and mixed_op in (ONE_NETWORK, "one_shot"):
                    continue
                row = spawn(space, mixed_op, options.batch, options.steps, weights_only)
                rows.append(row)
                kind = "weights" if weights_only else "both"
                print(
                    f"{space:12} {mixed_op:12} {kind:8} {1 / row['median_s']:8.2f} "
                    f"{row['peak_mib']:9.0f} {row['wait_share']:8.1%}",
                    flush=True,
                )
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps({"machine": machine, "rows": rows}))


if __name__ == "__main__":
    main()
