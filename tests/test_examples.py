"""The README's example is the files in tests/examples, and they work; its commands compose."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from torch.testing import assert_close

from supernet.choice import Architecture
from supernet.inherit import inherit_weights
from supernet.mixed_ops.base import one_hot
from supernet.space import SearchSpace
from supernet.strategies.trials import Trial
from supernet_scripts.derive import bracket_budgets

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "tests" / "examples"
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- (tests/examples/\S+) -->\n```\w+\n(.*?)```\n", README, re.DOTALL))
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```\n", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("supernet-") and " -m " not in line
]
TINY = [
    "data.img_size=8",
    "data.train_limit=64",
    "strategy.epochs=2",
    "strategy.warmup_epochs=1",
    "strategy.batch_size=16",
    "strategy.ranking.num_candidates=3",
    "latency.rounds=1",
    "latency.burst_ms=0.1",
    "bn_batches=1",
    "measure=false",  # the budget then holds for the prediction
    "device=cpu",
]


@pytest.fixture
def space(monkeypatch: pytest.MonkeyPatch) -> SearchSpace:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from chain import Chain  # type: ignore[import-not-found]

    chain: SearchSpace = Chain(in_chans=1, img_size=8, width=4, depth=3)
    return chain


def test_readme_shows_every_example() -> None:
    files = [path for path in EXAMPLES.rglob("*") if path.suffix in (".py", ".yaml")]
    assert {path.relative_to(ROOT).as_posix() for path in files} == set(BLOCKS)


@pytest.mark.parametrize("path", sorted(BLOCKS))
def test_readme_shows_the_file(path: str) -> None:
    text = (ROOT / path).read_text(encoding="utf-8")
    assert BLOCKS[path] == text
    assert len(text.splitlines()) < 60


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_readme_compose(line: str) -> None:
    command, *overrides = shlex.split(line, comments=True)
    if command == "supernet-derive":
        overrides = bracket_budgets(overrides)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        compose(command.removeprefix("supernet-"), overrides)


def test_chain_holds_its_networks(space: SearchSpace) -> None:
    torch.manual_seed(0)
    supernet = space.build_supernet(num_classes=3).eval()
    images = torch.randn(2, 1, 8, 8)
    for _ in range(5):
        architecture = space.sample(torch.default_generator)
        assert SearchSpace.of(architecture).is_valid(architecture)
        network = space.build_network(architecture, num_classes=3).eval()
        inherit_weights(supernet, network, dict(architecture))
        assert_close(network(images), supernet(images, one_hot(architecture, space.choices)))


def test_chain_without_a_convolution_is_not_valid(space: SearchSpace) -> None:
    options = {choice.name: "skip" for choice in space.choices}
    assert not space.is_valid(space.architecture(options))
    assert space.is_valid(space.architecture({**options, "layer_1": "dilated"}))


def test_annealed_weights_become_sharper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from annealed import Annealed  # type: ignore[import-not-found]

    generator = torch.Generator()
    logits = {"a": torch.tensor([0.5, -0.2], dtype=torch.float64, requires_grad=True)}
    for progress, temperature in ((0.0, 1.6), (0.5, (1.6 * 0.12) ** 0.5), (1.0, 0.12)):
        first = 1 / (1 + math.exp(-0.7 / temperature))
        fixed = Annealed().for_weight_step(logits, generator, progress)["a"]
        assert fixed.active == (0, 1) and not fixed.values.requires_grad
        assert fixed.values.tolist() == pytest.approx([first, 1 - first])
        sample = Annealed().for_architecture_step(logits, generator, progress)
        assert_close(sample.weights["a"].values, fixed.values)
        (gradient,) = torch.autograd.grad(sample.weights["a"].values[0], logits["a"])
        slope = first * (1 - first) / temperature
        assert gradient.tolist() == pytest.approx([slope, -slope])
        assert sample.cost_weights["a"].tolist() == pytest.approx([0.6681878, 0.3318122])


def test_climbing_ends_where_no_neighbour_is_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from chain import Chain
    from climbing import Climbing  # type: ignore[import-not-found]

    space = Chain(in_chans=1, img_size=8, width=4, depth=4)
    sampler = SimpleNamespace(sample=space.sample)
    problem = SimpleNamespace(space=space, is_feasible=space.is_valid, sampler=lambda: sampler)

    def reward(architecture: Architecture) -> float:
        worth = {"conv": 2, "dilated": 1, "skip": 0}
        return float(sum(worth[option] for _, option in architecture))

    proposals = Climbing(num_evaluations=1).propose(problem, torch.Generator().manual_seed(0))
    asked, lead = next(proposals), None
    for _ in range(40):
        if len(asked) == 1:  # somewhere else: the last one had no better neighbour
            assert lead is None or reward(lead) == 8
            lead = asked[0]
        else:
            assert all(sum(a != b for a, b in zip(lead, n, strict=True)) == 1 for n in asked)
            lead = max([lead, *asked], key=reward)
        asked = proposals.send([Trial(a, reward(a), reward(a)) for a in asked])
    assert lead is not None


@pytest.mark.slow
def test_search_of_the_example(tmp_path: Path) -> None:
    """The README's command, with the files in the user's own folder."""
    command = [sys.executable, str(ROOT / "scripts" / "search.py"), "--config-dir"]
    command += [str(EXAMPLES / "conf"), "space=chain", "mixed_op=annealed"]
    command += ["objective.budget_share=0.8", "run_dir=mine", *TINY]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    result = json.loads((tmp_path / "mine" / "result.json").read_text())
    assert result["predicted"] <= result["budget"] * (1 + 1e-9)  # a sum in another order
    assert set(result["architecture"].values()) <= {"conv", "dilated", "skip"}
    assert (tmp_path / "mine" / "report.html").is_file()
