"""Random search on shared weights: the estimator's part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from supernet.checkpoint import load_checkpoint
from supernet.engine import Diverged
from supernet.estimators.inherited import Inherited
from supernet.estimators.shared_weights import SharedWeights
from supernet.evaluate import evaluate, recalibrate_bn
from supernet.mixed_ops.base import one_hot
from supernet.mixed_ops.one_shot import OneShot
from supernet.mixed_ops.single_path import SinglePath
from supernet.mixed_ops.softmax import Softmax
from supernet.strategies import base
from supernet.strategies.base import Problem, Run
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.random_search import RandomSearch
from supernet.tracking import read_journal

EPOCHS, STEPS, TRIED = 2, 5, 4


class Killed(Exception):
    pass


@pytest.fixture
def make_shared(make_tried) -> Callable[..., Problem]:
    """A problem with the estimator, by default of single paths."""

    def make(relaxation: Any = None, **changes: Any) -> Problem:
        settings: dict[str, Any] = {
            "epochs": EPOCHS, "batch_size": 12,
            "weight_optimizer": {"opt": "sgd", "lr": 0.05, "momentum": 0.9},
            "scheduler": {"sched": "cosine", "min_lr": 1e-3}, "clip_grad": 5.0,
            "channels_last": False, "judge_batch_size": 25, "bn_batches": 2,
        }  # fmt: skip
        estimator = SharedWeights(**{**settings, **changes})
        return make_tried(relaxation or SinglePath(), estimator, share=1.0)

    return make


def search(problem: Problem, run: Run, number: int = TRIED) -> dict[str, Any]:
    """What the checkpoint holds in the end."""
    RandomSearch(num_evaluations=number).search(problem, run)
    return load_checkpoint(run.checkpoint)["search"]


@pytest.mark.parametrize("relaxation", [SinglePath, OneShot])
def test_each_is_judged_by_the_supernets_own_path(relaxation, make_shared, make_run) -> None:
    """Its batch norms recalibrated on the weight half, on all of the architecture half."""
    problem, run = make_shared(relaxation()), make_run()
    before = {name: p.detach().clone() for name, p in problem.supernet.named_parameters()}
    saved = search(problem, run)
    after = dict(problem.supernet.named_parameters())
    fixed = [name for name in before if ".candidates." not in name]
    assert fixed and all(not torch.equal(before[name], after[name]) for name in fixed)
    assert saved["step"] == EPOCHS * STEPS and len(saved["ranked"]) == TRIED
    halves, supernet = Inherited(problem, 25, 2), problem.supernet
    for record in saved["ranked"]:
        path = one_hot(problem.space.architecture(record["architecture"]), problem.space.choices)
        recalibrate_bn(supernet, [halves.weight_loader.batch(0, i) for i in (0, 1)], path)
        accuracy, loss = evaluate(supernet, halves.arch_loader, weights=path)
        assert record["accuracy"] == pytest.approx(accuracy, abs=1e-9)
        assert record["loss"] == pytest.approx(loss, abs=1e-5)
        assert record["judge"] == "inherited weights"


def test_the_journal_goes_on_where_the_training_ended(make_shared, make_run) -> None:
    run = make_run()
    search(make_shared(), run)
    records = read_journal(run.folder / "metrics.jsonl")
    phases = [(r["phase"], r["step"]) for r in records]
    trained = [("search", STEPS * (epoch + 1)) for epoch in range(EPOCHS)]
    assert phases == trained + [("rank", EPOCHS * STEPS + i + 1) for i in range(TRIED)]


@pytest.mark.parametrize("kill_at", [1, 7, "estimate 0", "estimate 2"])
def test_an_interrupted_one_ends_as_one_that_is_not(
    kill_at: int | str, make_shared, make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = search(make_shared(), make_run("whole"))
    judged: list[Any] = []

    def die_training(self: FirstOrder, state: Any, progress: float) -> None:
        if state.step == kill_at:
            raise Killed
        step(self, state, progress)

    def die_judging(self: SharedWeights, architecture: Any) -> Any:
        if f"estimate {len(judged)}" == kill_at:
            raise Killed
        judged.append(architecture)
        return estimate(self, architecture)

    step, estimate = FirstOrder.weight_step, SharedWeights.estimate
    with monkeypatch.context() as patch:
        patch.setattr(base, "SAVING_SHARE", float("inf"))  # save after each, however quick it is
        patch.setattr(FirstOrder, "weight_step", die_training)
        patch.setattr(SharedWeights, "estimate", die_judging)
        with pytest.raises(Killed):
            search(make_shared(), make_run("cut", checkpoint_every=3))
        kill_at = "no more"
        resumed = search(make_shared(), make_run("cut", resume=True, checkpoint_every=3))
    assert len(judged) == TRIED  # none twice
    lines = [(make_run(name).folder / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert lines[0] == lines[1]
    assert resumed["ranked"] == whole["ranked"] and resumed["step"] == whole["step"]
    for key in ("supernet", "logits"):
        for name, value in whole[key].items():
            assert torch.equal(value, resumed[key][name]), name
    for key in ("generator", "weight_stream", "weight_optimizer"):
        torch.testing.assert_close(resumed[key], whole[key], rtol=0, atol=0)
    torch.testing.assert_close(resumed["rng"]["torch"], whole["rng"]["torch"], rtol=0, atol=0)


def test_a_second_search_in_the_problem_trains_nothing(
    make_shared, make_run, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_shared()
    first = search(problem, make_run("first"))
    steps, step = [], FirstOrder.weight_step
    monkeypatch.setattr(FirstOrder, "weight_step", lambda *a: (steps.append(1), step(*a)))
    second = search(problem, make_run("second"))
    assert not steps and second["ranked"] == first["ranked"]
    other = make_shared()
    search(replace(other, estimator=problem.estimator), make_run("third"))
    assert len(steps) == EPOCHS * STEPS  # another supernet is trained


@pytest.mark.parametrize(
    ("num_images", "judging"), [(None, 60), (1, 25), (25, 25), (26, 50), (1000, 60)]
)
def test_a_part_of_the_architecture_half_may_judge(
    num_images: int | None, judging: int, make_problem
) -> None:
    problem = make_problem(SinglePath())
    weight_half, half = problem.data.search_splits(0)
    by_class = half.indices[half.labels.argsort(stable=True).numpy()]
    halves = weight_half, replace(half, indices=by_class)
    data = SimpleNamespace(search_splits=lambda _: halves)
    judge = Inherited(replace(problem, data=data), 25, 2, num_images=num_images)
    batches = [list(judge._judges()) for _ in range(2)]
    labels = [torch.cat([y for _, y in found]).tolist() for found in batches]
    assert labels[0] == labels[1] and len(labels[0]) == judging
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*batches, strict=True))
    assert len(set(labels[0])) == 10  # though the half is sorted


def test_logits_are_refused_before_anything_is_trained(make_shared, make_run) -> None:
    run = make_run()
    with pytest.raises(ValueError, match="mixed_op=single_path or mixed_op=one_shot; Softmax has"):
        search(make_shared(Softmax()), run)
    assert not run.checkpoint.exists()


@pytest.mark.parametrize("name", ["epochs", "judge_batch_size", "bn_batches", "num_images"])
def test_settings_of_zero_are_refused(name: str, make_shared) -> None:
    with pytest.raises(ValueError, match=f"estimator.{name} must be 1 or more; got 0"):
        make_shared(**{name: 0})


def test_a_training_that_diverges_says_so(make_shared, make_run) -> None:
    optimizer = {"opt": "sgd", "lr": 1e30}
    with pytest.raises(Diverged, match="lower weight_optimizer.lr or set clip_grad"):
        search(make_shared(weight_optimizer=optimizer, clip_grad=None), make_run())
