"""Retraining: it learns, chooses by validation, tests once, and resumes to the bit."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor, nn

from supernet import retrain as retrain_module
from supernet.checkpoint import load_checkpoint
from supernet.choice import Architecture
from supernet.data import Loader, Split
from supernet.data.digits import Digits
from supernet.engine import Diverged, make_accelerator
from supernet.evaluate import evaluate, recalibrate_bn
from supernet.learner import Learner
from supernet.network import Network
from supernet.recipe import BatchAugmentation, Recipe, seeded
from supernet.retrain import retrain
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201
from supernet.tracking import read_journal
from supernet.weights_file import load_network

SPACE = NasBench201(in_chans=1, img_size=8, widths=[8, 16], num_cells=1)
CELL = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|skip_connect~0|none~1|nor_conv_1x1~2|"
ARCHITECTURE = SPACE.from_string(CELL)
EVERYTHING = Recipe(
    epochs=3,
    batch_size=40,
    optimizer={"opt": "sgd", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
    scheduler={"sched": "cosine", "warmup_epochs": 1, "min_lr": 1e-4},
    label_smoothing=0.1,
    mixup=0.2,
    cutmix=1.0,
    erasing=0.3,
    ema_decay=0.9,
    clip_grad=1.0,
    drop_rate=0.2,
    val_share=0.25,
)  # four steps an epoch on 220 images


def digits(**kwargs: Any) -> Digits:
    return Digits(img_size=8, pad=1, **kwargs)


def small() -> Digits:
    return digits(train_limit=220, test_limit=60)


def small_network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return SPACE.build_network(ARCHITECTURE, 10)


def without_clock(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "seconds"}


def artifacts(folder: Path) -> dict[str, Any]:
    """All that must not depend on interruptions."""
    files: dict[str, Any] = {"metrics": (folder / "metrics.jsonl").read_bytes()}
    for name in ("best", "last"):
        files[name] = {
            key: value.numpy().tobytes()
            for key, value in load_file(folder / f"{name}.safetensors").items()
        }
        files[f"{name} meta"] = load_network(folder / f"{name}.safetensors")[1]
    return files


# ---- training


def test_learns_digits_and_reports_what_was_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="supernet.retrain")
    recipe = Recipe(4, 64, optimizer={"opt": "sgd", "lr": 0.2}, ema_decay=0.95)
    entry = retrain(ARCHITECTURE, digits(), recipe, tmp_path, name="derived", seed=1)
    assert entry["accuracy"] > 70  # chance is 10
    assert entry["val_accuracy"] > 70
    assert entry["name"] == "derived" and entry["architecture"] == dict(ARCHITECTURE)
    assert entry["params"] == sum(p.numel() for p in small_network().parameters())
    assert entry["init"] == "scratch" and entry["init_val_accuracy"] is None
    json.dumps(entry, allow_nan=False)
    lines = read_journal(tmp_path / "metrics.jsonl")
    steps = (1437 - 144) // 64
    assert [(line["epoch"], line["step"]) for line in lines] == [
        (epoch, epoch * steps) for epoch in (1, 2, 3, 4)
    ]
    assert {line["phase"] for line in lines} == {"retrain"}
    assert lines[-1]["train_loss"] < lines[0]["train_loss"]
    chosen = lines[entry["best_epoch"] - 1]
    key = "val_accuracy" if entry["weights"] == "network" else "ema_val_accuracy"
    assert chosen[key] == entry["val_accuracy"]
    assert entry["val_accuracy"] == max(
        max(line["val_accuracy"], line["ema_val_accuracy"]) for line in lines
    )
    epoch_lines = [r.message for r in caplog.records if "/4: train loss" in r.message]
    assert len(epoch_lines) == 4
    timings = read_journal(tmp_path / "timing.jsonl")
    assert [timing["epoch"] for timing in timings] == [1, 2, 3, 4]
    assert all(timing["steps_per_second"] > 0 for timing in timings)


@pytest.mark.parametrize("file", ["best", "last"])
def test_saved_reloaded_evaluated_is_identical(tmp_path: Path, file: str) -> None:
    data = small()
    entry = retrain(ARCHITECTURE, data, EVERYTHING, tmp_path)
    network, meta = load_network(tmp_path / f"{file}.safetensors")
    loader = Loader(data.test_split(), batch_size=40, seed=0, train=False)
    result = evaluate(network, loader)
    if file == "best":
        assert result == (entry["accuracy"], entry["test_loss"])
        val = data.retrain_splits(0, EVERYTHING.val_share)[1]
        again = evaluate(network, Loader(val, batch_size=40, seed=0, train=False))
        assert again == (entry["val_accuracy"], entry["val_loss"])
        assert meta["best_epoch"] == entry["best_epoch"]
    assert meta["data"] == data.info.to_dict()


def test_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    recipe = replace(
        EVERYTHING,
        epochs=4,
        scheduler={"sched": "cosine", "min_lr": 0.01, "cooldown_epochs": 1},
        optimizer={"opt": "adamw", "lr": 0.05},
    )
    retrain(ARCHITECTURE, small(), recipe, tmp_path)
    rates = [line["learning_rate"] for line in read_journal(tmp_path / "metrics.jsonl")]
    cosine = [0.01 + 0.02 * (1 + math.cos(math.pi * epoch / 4)) for epoch in range(4)]
    assert rates == pytest.approx([*cosine, 0.01])


def test_diverged_training_says_where_and_what_to_do(tmp_path: Path) -> None:
    recipe = Recipe(epochs=2, batch_size=40, optimizer={"opt": "sgd", "lr": 1e30}, val_share=0.25)
    with pytest.raises(Diverged, match=r"loss is (nan|inf) at step \d.*lower recipe.optimizer.lr"):
        retrain(ARCHITECTURE, small(), recipe, tmp_path)


def test_mbconv_in_channels_last_and_bfloat16(tmp_path: Path) -> None:
    space = MBConv(
        in_chans=1,
        img_size=8,
        stem_chs=8,
        stem_stride=1,
        first_chs=8,
        stages=[[8, 2, 2]],
        kernels=[3],
        expansions=[3],
        head_chs=16,
    )
    architecture = space.architecture({"stage1_0": "k3_e3", "stage1_1": "zero"})
    recipe = replace(EVERYTHING, mixed_precision="bf16", channels_last=True, epochs=2)
    entry = retrain(architecture, small(), recipe, tmp_path)
    assert math.isfinite(entry["test_loss"])
    assert all(v.dtype != torch.bfloat16 for v in load_file(tmp_path / "best.safetensors").values())
    with pytest.raises(ValueError, match="mixed_precision is 'bf16'.*made for 'no'"):
        retrain(architecture, small(), recipe, tmp_path, accelerator=make_accelerator("no"))


# ---- what is read when


class Watched(Digits):
    """Digits that record what was asked of them."""

    def __init__(self) -> None:
        super().__init__(img_size=8, pad=1, train_limit=220, test_limit=60)
        self.test_batches: list[int] = []

    def test_split(self) -> Split:
        split = super().test_split()
        source, original = split.source, split.source.batch

        def batch(request: Any, device: Any) -> Any:
            self.test_batches.append(len(request.indices))
            return original(request, device)

        source.batch = batch  # type: ignore[method-assign]
        return split


def test_test_set_is_read_once_after_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, read_during_training = Watched(), []
    original = Learner.take_step

    def take_step(self: Learner, images: Tensor, labels: Tensor) -> None:
        read_during_training.append(len(data.test_batches))
        original(self, images, labels)

    monkeypatch.setattr(Learner, "take_step", take_step)
    retrain(ARCHITECTURE, data, EVERYTHING, tmp_path)
    assert set(read_during_training) == {0}
    assert data.test_batches == [40, 20]


def test_best_epoch_is_chosen_on_held_out_training_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation scripted to favour epoch 2's average; the test set would favour epoch 3."""
    data = small()
    train, val = data.retrain_splits(0, EVERYTHING.val_share)
    assert not set(train.indices) & set(val.indices)
    scripted = iter([(50.0, 1.0), (50.0, 0.9), (40.0, 1.0), (60.0, 2.0), (60.0, 2.0), (55.0, 0.1)])
    states, splits = [], []

    def fake(network: Network, loader: Loader, accelerator: object) -> tuple[float, float]:
        splits.append(loader.split)
        states.append({k: v.clone() for k, v in network.state_dict().items()})
        return next(scripted, (99.0, 0.01))

    monkeypatch.setattr(retrain_module, "evaluate", fake)
    entry = retrain(ARCHITECTURE, data, EVERYTHING, tmp_path)
    for split in splits[:-1]:
        assert split.source is val.source and (split.indices == val.indices).all()
    assert splits[-1].source is data.test_split().source and len(splits) == 7
    assert (entry["best_epoch"], entry["weights"], entry["val_accuracy"]) == (2, "ema", 60.0)
    assert entry["accuracy"] == 99.0
    for state in (states[-1], load_file(tmp_path / "best.safetensors")):
        assert all(state[key].equal(states[3][key]) for key in states[3])
    last = load_file(tmp_path / "last.safetensors")
    assert all(last[key].equal(states[4][key]) for key in last)


# ---- inherited weights


def test_inherited_weights_are_recalibrated_and_used(tmp_path: Path) -> None:
    data = digits(train_limit=600, test_limit=60)
    recipe = Recipe(4, 40, optimizer={"opt": "sgd", "lr": 0.2}, val_share=0.25)
    retrain(ARCHITECTURE, data, recipe, tmp_path / "first")
    network, _ = load_network(tmp_path / "first" / "last.safetensors")
    trained = {k: v.clone() for k, v in network.named_parameters()}
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(5.0)  # another path's statistics
    still = replace(recipe, epochs=1, optimizer={"opt": "sgd", "lr": 0.0})
    entry = retrain(ARCHITECTURE, data, still, tmp_path / "second", network=network)
    assert entry["init"] == "inherit"
    assert entry["init_val_accuracy"] > 50
    assert all(p.equal(trained[k]) for k, p in network.named_parameters())


def test_bn_recalibration_is_the_mean_over_batches() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Dropout(0.5), nn.BatchNorm2d(3, momentum=0.3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    )
    network[1].running_mean.fill_(7.0)
    network.train()
    network[3].eval()
    batches = [(torch.randn(8, 3, 5, 5) * 2 + 1, torch.zeros(8)) for _ in range(5)]
    recalibrate_bn(network, iter(batches))
    arrays = [images.double().numpy() for images, _ in batches]
    mean = np.mean([a.mean(axis=(0, 2, 3)) for a in arrays], axis=0)
    var = np.mean([a.var(axis=(0, 2, 3), ddof=1) for a in arrays], axis=0)
    np.testing.assert_allclose(network[1].running_mean, mean, rtol=1e-5)
    np.testing.assert_allclose(network[1].running_var, var, rtol=1e-5)
    assert network[3].num_batches_tracked == 5
    assert network[1].momentum == 0.3 and network[3].momentum == 0.1
    assert [m.training for m in network] == [True, True, True, False]
    assert not network[1].running_mean.requires_grad
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_bn(network, [])


def test_evaluate_counts_every_image() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Dropout(0.9)).train()
    images, labels = torch.randn(10, 1, 2, 2), torch.arange(10) % 3
    accuracy, loss = evaluate(network, [(images[:7], labels[:7]), (images[7:], labels[7:])])
    logits = (images.flatten(1) @ network[1].weight.T + network[1].bias).detach().double().numpy()
    shares = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(shares[np.arange(10), labels.numpy()]).mean()
    assert accuracy == 100 * (logits.argmax(axis=1) == labels.numpy()).mean()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert network.training
    with pytest.raises(ValueError, match="not one image"):
        evaluate(network, [])


# ---- the step


def make_learner(recipe: Recipe, network: Network | None = None) -> Learner:
    return Learner(network or small_network(), recipe, 4, make_accelerator("no", "cpu"), seed=3)


def batch(size: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(size, 1, 8, 8, generator=generator)
    return images, torch.randint(10, (size,), generator=generator)


@pytest.mark.parametrize("warmup", [True, False])
def test_moving_average_follows_its_formula(warmup: bool) -> None:
    recipe = replace(EVERYTHING, ema_decay=0.7, ema_warmup=warmup)
    learner = make_learner(recipe)
    expected = None
    for step in range(1, 6):
        learner.take_step(*batch())
        new = {k: v.double().numpy() for k, v in learner.network.state_dict().items()}
        # step 1 copies; then the decay, in timm's warm-up min(decay, 1 - step^(-2/3))
        decay = 0.0 if step == 1 else min(0.7, 1 - step ** (-2 / 3)) if warmup else 0.7
        old = new if expected is None else expected
        expected = {k: decay * old[k] + (1 - decay) * new[k] for k in new}
    assert learner.ema is not None and expected is not None
    for key, value in learner.ema.state_dict().items():
        if value.is_floating_point():
            np.testing.assert_allclose(value.numpy(), expected[key], rtol=1e-4, atol=1e-6)


def test_loss_smooths_labels_as_by_hand() -> None:
    network = small_network()
    images, labels = batch()
    logits = network.train()(images).detach().double()
    for smoothing in (0.0, 0.3):
        recipe = Recipe(epochs=1, batch_size=40, label_smoothing=smoothing)
        learner = make_learner(recipe)
        learner.take_step(images.clone(), labels)
        logp = logits.log_softmax(1)
        true = -logp[torch.arange(40), labels]
        by_hand = ((1 - smoothing) * true - smoothing * logp.mean(1)).mean()
        loss, accuracy = learner.meter.read(learner.accelerator)
        assert loss == pytest.approx(float(by_hand), rel=1e-5)
        assert accuracy == pytest.approx(100 * float((logits.argmax(1) == labels).double().mean()))


def test_mixup_mixes_images_and_labels_alike() -> None:
    images, labels = batch()
    augment = BatchAugmentation(Recipe(epochs=1, batch_size=40, mixup=1.0), 10, torch.device("cpu"))
    with seeded(1):
        mixed, targets = augment(images.clone(), labels)
    ratio = (mixed - images.flip(0)) / (images - images.flip(0))
    share = float(ratio.median())
    assert 0.01 < share < 0.99
    by_hand = torch.zeros(40, 10)
    for row, (ours, theirs) in enumerate(zip(labels, labels.flip(0), strict=True)):
        by_hand[row, ours] += share
        by_hand[row, theirs] += 1 - share
    torch.testing.assert_close(targets, by_hand, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images.flip(0))


def test_cutmix_share_is_the_pasted_area_and_erasing_hits_its_share() -> None:
    images, labels = batch()
    cpu = torch.device("cpu")
    with seeded(4):
        mixed, targets = BatchAugmentation(Recipe(1, 40, cutmix=1.0), 10, cpu)(
            images.clone(), labels
        )
    kept = float((mixed == images)[0].double().mean())
    assert 0 < kept < 1
    pairs = labels != labels.flip(0)
    own = targets[torch.arange(40), labels]
    torch.testing.assert_close(own[pairs], torch.full_like(own[pairs], kept))
    many, names = batch(400)
    with seeded(0):
        erased, _ = BatchAugmentation(Recipe(1, 400, erasing=0.3), 10, cpu)(many.clone(), names)
    share = float((erased != many).flatten(1).any(1).double().mean())
    assert 0.2 < share < 0.4


def test_draws_depend_on_the_key_alone_and_leave_no_trace() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), np.random.rand(), float(torch.rand(()))

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    reference = draw(), draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    first = draw()
    with seeded(3, 7):
        inside = draw()
    with pytest.raises(RuntimeError), seeded(3, 8):
        assert draw() != inside
        raise RuntimeError
    with seeded(3, 7):
        assert draw() == inside
    assert (first, draw()) == reference


def test_gradient_is_clipped_and_dropout_is_on() -> None:
    recipe = Recipe(
        epochs=1,
        batch_size=40,
        clip_grad=1e-3,
        drop_rate=0.5,
        optimizer={"opt": "momentum", "lr": 1.0},
    )
    learner = make_learner(recipe)
    before = [p.detach().clone() for p in learner.network.parameters()]
    learner.take_step(*batch())
    moved = [p.detach() - b for p, b in zip(learner.network.parameters(), before, strict=True)]
    norm = math.sqrt(sum(float(m.square().sum()) for m in moved))
    assert norm == pytest.approx(1e-3, rel=1e-2)
    assert learner.network.drop_rate == 0.5


# ---- settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "recipe.epochs is 0; it must be 1 or more"),
        ({"batch_size": 41}, "batch_size is 41; it must be even with mixup"),
        ({"val_share": 0.0}, "recipe.val_share is 0.0; it must be between 0 and 1"),
        ({"mixed_precision": "fp8"}, "mixed_precision is 'fp8'; it must be no, bf16, fp16"),
        ({"ema_decay": 1.0}, "recipe.ema_decay is 1.0"),
        ({"scheduler": {"sched": "cosine", "warmup_epochs": 3}}, "before its 3 epochs end"),
    ],
)
def test_recipe_refuses_values_out_of_range(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(EVERYTHING, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"opt": "sgdd"}}, "recipe.optimizer=.*refused by timm.*sgdd"),
        ({"optimizer": {"opt": "sgd", "lr": 0.1, "nest": 1}}, "recipe.optimizer=.*'nest'"),
        ({"scheduler": {"sched": "cosinus"}}, "recipe.scheduler=.*cosinus"),
        ({"scheduler": {"sched": "cosine", "warm": 1}}, "recipe.scheduler=.*'warm'"),
        ({"batch_size": 200}, "165 training images do not fill one batch of 200"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        retrain(ARCHITECTURE, small(), replace(EVERYTHING, **change), tmp_path)


def test_data_of_other_channels_is_refused(tmp_path: Path) -> None:
    architecture = NasBench201(widths=[8], num_cells=1).from_string(CELL)
    with pytest.raises(ValueError, match="the network has 3 input channels, the data 1"):
        retrain(architecture, small(), EVERYTHING, tmp_path)


def test_default_config_makes_a_recipe() -> None:
    root = Path(__file__).parents[2]
    config = OmegaConf.load(root / "conf" / "recipe" / "default.yaml")
    recipe = instantiate(OmegaConf.create({"precision": "no", "recipe": config}).recipe)
    assert isinstance(recipe, Recipe)
    assert type(recipe.optimizer) is dict
    recipe.make_scheduler(recipe.make_optimizer(small_network()), 10)


# ---- resuming


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("whole")
    return retrain(ARCHITECTURE, small(), EVERYTHING, folder, seed=2), folder


@pytest.mark.parametrize("steps", [[0], [3], [4, 5], [2, 7, 11]])
def test_resumed_training_is_identical_to_the_bit(
    tmp_path: Path,
    uninterrupted: tuple[dict[str, Any], Path],
    monkeypatch: pytest.MonkeyPatch,
    steps: list[int],
) -> None:
    """Interrupted before the steps named, of twelve, with a checkpoint every third step."""
    original = Learner.take_step
    stops = iter(steps)
    stop = next(stops)

    def take_step(self: Learner, images: Tensor, labels: Tensor) -> None:
        if self.step == stop:
            raise Interrupted
        original(self, images, labels)

    def attempt(resume: bool) -> dict[str, Any]:
        torch.manual_seed(time.time_ns() % 2**32)  # another process has another global state
        return retrain(
            ARCHITECTURE,
            small(),
            EVERYTHING,
            tmp_path,
            seed=2,
            resume=resume,
            checkpoint_every=3,
        )

    monkeypatch.setattr(Learner, "take_step", take_step)
    for number in range(len(steps)):
        with pytest.raises(Interrupted):
            attempt(resume=number > 0)
        stop = next(stops, -1)
    entry = attempt(resume=True)
    reference, folder = uninterrupted
    assert without_clock(entry) == without_clock(reference)
    assert artifacts(tmp_path) == artifacts(folder)


def test_interrupted_while_testing_resumes(
    tmp_path: Path, uninterrupted: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(retrain_module._Training, "_test", fail)
        with pytest.raises(Interrupted):
            retrain(ARCHITECTURE, small(), EVERYTHING, tmp_path, seed=2)
    entry = retrain(ARCHITECTURE, small(), EVERYTHING, tmp_path, seed=2, resume=True)
    assert without_clock(entry) == without_clock(uninterrupted[0])


def test_finished_training_is_returned_and_another_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(EVERYTHING, epochs=2)
    entry = retrain(ARCHITECTURE, small(), recipe, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.delattr(Learner, "take_step")
        patch.delattr(retrain_module, "evaluate")
        assert retrain(ARCHITECTURE, small(), recipe, tmp_path, resume=True) == entry
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="is of another retraining: recipe was .*; seed was 0, is"):
        changed = replace(recipe, epochs=3)
        retrain(ARCHITECTURE, small(), changed, tmp_path, seed=1, resume=True)


def test_new_training_in_an_old_folder_leaves_nothing_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(EVERYTHING, epochs=2)
    retrain(ARCHITECTURE, small(), recipe, tmp_path)
    checkpoints = list((tmp_path / "checkpoint").iterdir())
    assert len(checkpoints) == 1 and load_checkpoint(checkpoints[0])

    def fail(*_: object) -> None:
        raise Interrupted

    monkeypatch.setattr(Learner, "take_step", fail)
    with pytest.raises(Interrupted):
        retrain(ARCHITECTURE, small(), recipe, tmp_path)
    assert not list((tmp_path / "checkpoint").iterdir())
    assert read_journal(tmp_path / "metrics.jsonl") == []


KILLED = """
import sys, torch
torch.set_num_threads(1)
from pathlib import Path
from test_retrain import ARCHITECTURE, EVERYTHING, retrain, small
retrain(ARCHITECTURE, small(), EVERYTHING, Path(sys.argv[1]), seed=2, resume=True,
        checkpoint_every=1)
"""


@pytest.mark.slow
def test_killed_training_resumes_identically(
    tmp_path: Path, uninterrupted: tuple[dict[str, Any], Path]
) -> None:
    folder = tmp_path / "run"
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", KILLED, str(folder)]
    for lines in (0, 1, 2):
        process = subprocess.Popen(command, env=environment)
        metrics, checkpoint = folder / "metrics.jsonl", folder / "checkpoint"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if len(read_journal(metrics)) >= lines and list(checkpoint.glob("*")):
                break
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    entry = retrain(ARCHITECTURE, small(), EVERYTHING, folder, seed=2, resume=True)
    assert without_clock(entry) == without_clock(uninterrupted[0])
    assert artifacts(folder) == artifacts(uninterrupted[1])


def test_architecture_of_an_unknown_space_is_refused(tmp_path: Path) -> None:
    foreign = Architecture("nowhere.Space", "{}", ())
    with pytest.raises(ValueError, match="nowhere.Space"):
        retrain(foreign, small(), EVERYTHING, tmp_path)


TWO_PROCESSES = """
import json, sys, torch
torch.set_num_threads(1)
from pathlib import Path
from supernet.engine import make_accelerator
from test_retrain import ARCHITECTURE, EVERYTHING, Learner, retrain, small
folder, stop = Path(sys.argv[1]), int(sys.argv[2])
accelerator = make_accelerator("no", "cpu")
assert accelerator.num_processes == 2
rank, original, seen = accelerator.process_index, Learner.take_step, []

def take_step(self, images, labels):
    if self.step == stop:
        sys.exit(0)
    seen.append(float(images.sum()))
    original(self, images, labels)

Learner.take_step = take_step
# every process has a folder of its own here, to see who writes
entry = retrain(ARCHITECTURE, small(), EVERYTHING, folder / f"rank{rank if stop else 0}",
                accelerator=accelerator, resume=stop == 0, checkpoint_every=1)
(folder / f"entry{rank}.json").write_text(json.dumps([entry, seen]))
"""


@pytest.mark.slow
def test_two_processes_agree_and_the_first_writes(tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    paths = [str(Path(__file__).parents[2]), str(Path(__file__).parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for stop in ("3", "0"):  # interrupted before the fourth step, then resumed
        subprocess.run([*launch, str(script), str(tmp_path), stop], env=environment, check=True)
    assert not (tmp_path / "rank1").exists()
    (first, seen), (second, others) = (
        json.loads((tmp_path / f"entry{rank}.json").read_text()) for rank in (0, 1)
    )
    assert without_clock(first) == without_clock(second)
    assert not set(seen) & set(others)  # each has its own part of the data
    lines = read_journal(tmp_path / "rank0" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [2, 4, 6]
    network, _ = load_network(tmp_path / "rank0" / "best.safetensors")
    loader = Loader(small().test_split(), batch_size=40, seed=0, train=False)
    accuracy, loss = evaluate(network, loader)
    assert accuracy == pytest.approx(first["accuracy"])
    assert loss == pytest.approx(first["test_loss"])
