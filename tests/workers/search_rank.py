"""One rank of a search on two processes; prints what must be alike, and what must not."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from latency.model import macs_cost
from latency.sites import trace
from latency.whole import WholeLatency
from supernet.choice import Architecture
from supernet.data.digits import Digits
from supernet.derive import reachable
from supernet.engine import make_accelerator
from supernet.estimators.from_scratch import FromScratch
from supernet.estimators.shared_weights import SharedWeights
from supernet.mixed_ops.base import MixedOp
from supernet.mixed_ops.binary_gate import BinaryGate
from supernet.mixed_ops.one_shot import OneShot
from supernet.mixed_ops.single_path import SinglePath
from supernet.mixed_ops.softmax import Softmax
from supernet.objective import Budget
from supernet.recipe import Recipe
from supernet.spaces.mbconv import MBConv
from supernet.strategies.base import Problem, Run
from supernet.strategies.enas import ENAS
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.random_search import RandomSearch
from supernet.strategies.ranking import Ranking
from supernet.strategies.reinforce import Reinforce
from supernet.tracking import NoTracker

SPACE = {
    "in_chans": 1, "img_size": 8, "stem_chs": 8, "stem_stride": 1, "first_chs": 8,
    "stages": [[8, 2, 2]], "kernels": [3, 5], "expansions": [2], "head_chs": 16,
}  # fmt: skip
RELAXATIONS = {
    "binary_gate": BinaryGate, "softmax": Softmax, "one_shot": OneShot, "enas": SinglePath,
    "shared_weights": SinglePath, "from_scratch": SinglePath,
}  # fmt: skip


def digest(tensors: dict[str, torch.Tensor]) -> str:
    content = hashlib.sha256()
    for name in sorted(tensors):
        content.update(name.encode() + tensors[name].detach().contiguous().numpy().tobytes())
    return content.hexdigest()


RECIPE = Recipe(  # much of it draws
    epochs=1, batch_size=8, mixup=0.2, drop_rate=0.3, ema_decay=0.9, clip_grad=1.0,
    optimizer={"opt": "sgd", "lr": 0.1, "momentum": 0.9},
)  # fmt: skip
COMMON = {
    "epochs": 2,
    "batch_size": 6,
    "weight_optimizer": {"opt": "sgd", "lr": 0.05, "momentum": 0.9},
    "scheduler": {"sched": "cosine"},
    "clip_grad": 5.0,
    "channels_last": True,
}


def make_first_order(cls: type[FirstOrder], **more: Any) -> FirstOrder:
    return cls(
        **COMMON,
        arch_every=1,
        arch_optimizer={"opt": "adam", "lr": 0.05, "betas": (0.0, 0.999), "weight_decay": 0.0},
        init_std=1e-3,
        ranking=Ranking(num_candidates=3, bn_batches=2, batch_size=30),
        **more,
    )


def make_enas() -> FirstOrder:
    controller = Reinforce(
        batch=2, optimizer={"opt": "adam", "lr": 0.05}, hidden=8, num_layers=1, shared=True,
        temperature=1.0, tanh_constant=None, baseline_decay=0.9, power=1.0, entropy_weight=0.0,
        skip_weight=0.0, skip_rate=0.4,
    )  # fmt: skip
    return make_first_order(ENAS, warmup_epochs=0, controller=controller, controller_steps=4)


def finish(result: dict[str, Any], folder: Path, accelerator: Accelerator) -> None:
    (folder / f"rank{accelerator.process_index}.json").write_text(json.dumps(result))
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


def try_some(problem: Problem, run: Run, folder: Path) -> dict[str, Any]:
    """Architectures that are trained, each in one process, and measured in the first."""

    def measure(architecture: Architecture) -> float:
        assert run.main
        return problem.cost.of(architecture) / 7

    latency = WholeLatency(problem.space, measure, folder / "known.jsonl", run.main)
    estimator = FromScratch(recipe=RECIPE, num_images=60, steps=3)
    problem = replace(problem, estimator=estimator, costs=(latency,))
    return {"ranked": RandomSearch(num_evaluations=3).search(problem, run).ranked}


def main(folder: Path, name: str) -> None:
    accelerator = make_accelerator("no", "cpu")
    torch.manual_seed(accelerator.process_index)  # the weights must be agreed on all the same
    space, relaxation = MBConv(**SPACE), RELAXATIONS[name]()
    sites = trace(space.build(MixedOp, 10, search=False), space.choices, (1, 1, 8, 8))
    cost = macs_cost(space.choices, sites)
    objective = Budget(cost="macs", budget_share=1.0 if name == "from_scratch" else 0.8)
    objective.prepare(reachable(space, cost), cost.unit)
    data = Digits(img_size=8, pad=1, train_limit=120)
    supernet = space.build_supernet(10, relaxation.build)
    run = Run(folder / "run", accelerator.is_main_process, NoTracker())
    problem = Problem(space, supernet, relaxation, objective, cost, data, accelerator, 0)
    if name == "from_scratch":
        finish(try_some(problem, run, folder), folder, accelerator)
        return
    if name == "shared_weights":
        estimator = SharedWeights(**COMMON, judge_batch_size=30, bn_batches=2)
        problem = replace(problem, estimator=estimator)
        strategy, trainer = RandomSearch(num_evaluations=3), estimator.training
    else:
        strategy = trainer = (
            make_enas() if name == "enas" else make_first_order(FirstOrder, warmup_epochs=1)
        )
    states = []
    original = trainer.weight_step
    labels = []

    def watch(state, progress):
        states[:] = [state]
        position = state.weight_stream.position
        labels.append(state.weight_stream.loader.batch(0, position)[1].tolist())
        original(state, progress)

    trainer.weight_step = watch
    answer = strategy.search(problem, run)
    policy = states[0].parts.get("policy")
    result = {
        "weights": digest(dict(supernet.named_parameters())),
        "buffers": digest(dict(supernet.named_buffers())),
        "logits": digest(dict(states[0].parameters.named_parameters())),
        "controller": policy and digest(dict(policy.controller.named_parameters())),
        "multiplier": objective.multiplier,
        "architecture": dict(answer.best(objective.budget)),
        "ranked": getattr(answer, "ranked", None),
        "labels": labels[:3],
    }
    finish(result, folder, accelerator)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
