"""The forms of a step that the benchmark compares, and what it writes of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import DictConfig

from supernet.mixed_ops.base import Searchable
from supernet_scripts.benchmark_step import check, compare, table
from supernet_scripts.step_forms import Stepper

TINY = ["data.img_size=8", "data.train_limit=64", "strategy.batch_size=8", "device=cpu"]
SPACES = {
    "nasbench201": ["space.num_cells=1", "space.widths=[4]"],
    "mbconv_small": ["space.stages=[[8,2,2]]", "space.kernels=[3]"],
}


def configure(*overrides: str) -> DictConfig:
    with initialize_config_module("supernet_conf", version_base="1.3"):
        return compose("benchmark_step", [*TINY, *overrides])


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("mixed_op", ["softmax", "binary_gate"])
def test_plain_and_grouped_steps_learn_the_same(space: str, mixed_op: str) -> None:
    cfg = configure(f"space={space}", f"mixed_op={mixed_op}", *SPACES[space])
    data = instantiate(cfg.data)
    plain, grouped = Stepper(cfg, data, "plain"), Stepper(cfg, data, "grouped")
    for stepper in (plain, grouped):
        stepper()
    ours, others = grouped.state.state_dict(), plain.state.state_dict()
    for part in ("supernet", "logits"):
        for name, value in ours[part].items():
            torch.testing.assert_close(value, others[part][name], rtol=1e-3, atol=1e-4)


def test_only_the_plain_architecture_step_makes_weight_gradients() -> None:
    cfg = configure("space=nasbench201", "mixed_op=softmax", *SPACES["nasbench201"])
    data = instantiate(cfg.data)
    for form, makes in (("plain", True), ("grouped", False)):
        stepper = Stepper(cfg, data, form)
        stepper.state.weight_optimizer.zero_grad()
        stepper.strategy.architecture_step(stepper.state, 0.0)
        parameters = list(stepper.state.problem.supernet.parameters())
        assert any(p.grad is not None for p in parameters) == makes
        assert all(p.requires_grad for p in parameters)


@pytest.mark.parametrize(
    "override,words",
    [
        ("forms=[joint]", "plain, grouped, network"),
        ("step=logits", "both, weights"),
        ("rounds=0", "at least 1"),
        ("strategy=second_order", "strategy=first_order"),
    ],
)
def test_refuses_what_it_cannot_measure(override: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check(configure(override))


@pytest.mark.slow
def test_writes_rows_and_replaces_its_own(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Two settings, one of them twice: two entries."""
    common = [*TINY, "space=nasbench201", *SPACES["nasbench201"], "memory=false", "num_threads=1"]
    command = [sys.executable, "-m", "supernet_scripts.benchmark_step", "-m", *common, "rounds=2"]
    output = tmp_path / "out.json"
    sweep = [f"hydra.sweep.dir={tmp_path}", "mixed_op=softmax,one_shot,softmax"]
    subprocess.run([*command, *sweep, f"output={output}"], check=True)
    entries = json.loads(output.read_text())["entries"]
    assert [entry["setting"]["mixed_op"] for entry in entries] == ["one_shot", "softmax"]
    for entry in entries:
        plain, grouped = entry["forms"]["plain"], entry["forms"]["grouped"]
        assert plain["times_faster"] == 1
        assert len(grouped["seconds"]) == 2
        assert grouped["min_s"] <= grouped["median_s"] <= grouped["max_s"]
        ratios = sorted(p / g for p, g in zip(plain["seconds"], grouped["seconds"], strict=True))
        assert grouped["times_faster"] == pytest.approx(sum(ratios) / 2)
    assert table(entries) in capfd.readouterr().out


def test_compares_round_by_round() -> None:
    """A slow phase of the machine meets both forms of a round."""
    rows = {
        "plain": {"seconds": [2.0, 8.0, 3.0], "cpu_seconds": [2.0, 2.0, 3.0], "peak_mib": 100.0},
        "grouped": {"seconds": [1.0, 4.0, 1.0], "cpu_seconds": [0.5, 1.0, 1.0], "peak_mib": 40.0},
    }
    compare(rows)
    assert rows["grouped"]["times_faster"] == 2.0
    assert rows["grouped"]["times_less_cpu"] == 3.0
    assert rows["grouped"]["memory_share"] == 0.4
    line = table([{"setting": {"space": "s", "batch": 8}, "forms": rows}]).splitlines()[-1]
    assert line == "| s, batch 8 | grouped |  |  |  |  | 2.00 | 3.00 | 40 | 40% |  |"


def test_what_tells_the_forms_apart() -> None:
    """The plain one computes every candidate on its own, channels first. In both, each weight has
    its momentum before a step is timed, also of what a sampled path has not run yet."""
    cfg = configure("space=nasbench201", "mixed_op=binary_gate", *SPACES["nasbench201"])
    data = instantiate(cfg.data)
    for form, grouped in (("plain", False), ("grouped", True)):
        stepper = Stepper(cfg, data, form)
        network = stepper.state.problem.supernet
        assert any(m.joint for m in network.modules() if isinstance(m, Searchable)) == grouped
        kernels = [p for p in network.parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
        last = [p.is_contiguous(memory_format=torch.channels_last) for p in kernels]
        assert kernels and last == [grouped] * len(kernels)
        images = torch.channels_last if grouped else torch.contiguous_format
        assert stepper.strategy.memory_format == images
        momenta = stepper.state.weight_optimizer.state_dict()["state"]
        assert len(momenta) == len(list(network.parameters()))
        assert all(m["momentum_buffer"] is not None for m in momenta.values())


@pytest.mark.parametrize("mixed_op", ["softmax", "binary_gate"])
def test_the_plain_form_stays_in_float32(mixed_op: str) -> None:
    chosen = ["space=nasbench201", *SPACES["nasbench201"], f"mixed_op={mixed_op}"]
    cfg = configure(*chosen, "precision=bf16")
    data = instantiate(cfg.data)
    steppers = {form: Stepper(cfg, data, form) for form in ("plain", "grouped")}
    for form, dtype in (("plain", torch.float32), ("grouped", torch.bfloat16)):
        found = set()
        stem = steppers[form].state.problem.supernet.stem
        stem.register_forward_hook(lambda _, inputs, output, found=found: found.add(output.dtype))
        steppers[form]()
        assert found == {dtype}
