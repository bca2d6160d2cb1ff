"""One rank of a search on two processes; prints what must be alike, and what must not."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

from latency.model import macs_cost
from latency.sites import trace
from supernet.data.digits import Digits
from supernet.derive import reachable
from supernet.engine import make_accelerator
from supernet.mixed_ops.base import MixedOp
from supernet.mixed_ops.binary_gate import BinaryGate
from supernet.mixed_ops.one_shot import OneShot
from supernet.mixed_ops.softmax import Softmax
from supernet.objective import Budget
from supernet.spaces.mbconv import MBConv
from supernet.strategies.base import Problem, Run
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.ranking import Ranking
from supernet.tracking import NoTracker

SPACE = {
    "in_chans": 1, "img_size": 8, "stem_chs": 8, "stem_stride": 1, "first_chs": 8,
    "stages": [[8, 2, 2]], "kernels": [3, 5], "expansions": [2], "head_chs": 16,
}  # fmt: skip
RELAXATIONS = {"binary_gate": BinaryGate, "softmax": Softmax, "one_shot": OneShot}


def digest(tensors: dict[str, torch.Tensor]) -> str:
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return content.hexdigest()


def main(folder: Path, name: str) -> None:
    accelerator = make_accelerator("no", "cpu")
    torch.manual_seed(accelerator.process_index)  # the weights must be agreed on all the same
    space, relaxation = MBConv(**SPACE), RELAXATIONS[name]()
    sites = trace(space.build(MixedOp, 10, search=False), space.choices, (1, 1, 8, 8))
    cost = macs_cost(space.choices, sites)
    objective = Budget(cost="macs", budget_share=0.8)
    objective.prepare(reachable(space, cost), cost.unit)
    data = Digits(img_size=8, pad=1, train_limit=120)
    supernet = space.build_supernet(10, relaxation.build)
    problem = Problem(space, supernet, relaxation, objective, cost, data, accelerator, 0)
    strategy = FirstOrder(
        epochs=2,
        warmup_epochs=1,
        arch_every=1,
        batch_size=6,
        weight_optimizer={"opt": "sgd", "lr": 0.05, "momentum": 0.9},
        arch_optimizer={"opt": "adam", "lr": 0.05, "betas": (0.0, 0.999), "weight_decay": 0.0},
        scheduler={"sched": "cosine"},
        clip_grad=5.0,
        init_std=1e-3,
        channels_last=True,
        ranking=Ranking(num_candidates=3, bn_batches=2, batch_size=30),
    )
    states = []
    original = strategy.weight_step
    labels = []

    def watch(state, progress):
        states[:] = [state]
        position = state.weight_stream.position
        labels.append(state.weight_stream.loader.batch(0, position)[1].tolist())
        original(state, progress)

    strategy.weight_step = watch
    rank = accelerator.process_index
    run = Run(folder / "run", accelerator.is_main_process, NoTracker())
    architecture = strategy.search(problem, run).best(objective.budget)
    result = {
        "weights": digest(dict(supernet.named_parameters())),
        "buffers": digest(dict(supernet.named_buffers())),
        "logits": digest(dict(states[0].parameters.named_parameters())),
        "multiplier": objective.multiplier,
        "architecture": dict(architecture),
        "labels": labels[:3],
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
