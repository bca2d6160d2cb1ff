"""Edge normalisation (Xu et al. 2020, section 3.3) in a search, from its start to its answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from latency.model import AdditiveCost
from supernet.checkpoint import load_checkpoint
from supernet.choice import ArchitectureParameters
from supernet.derive import derive
from supernet.estimators.inherited import Inherited
from supernet.mixed_ops.base import PathWeights, one_hot
from supernet.mixed_ops.partial_channels import PartialChannels
from supernet.mixed_ops.softmax import Softmax
from supernet.objective import TaskOnly
from supernet.outcome import OnTarget, resolve
from supernet.spaces.darts import NONE, OPERATIONS, Darts
from supernet.spaces.nasbench201 import NasBench201
from supernet.strategies import curvature
from supernet.strategies.base import Problem
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.monitor import Monitor
from supernet.strategies.perturbation import Perturbation
from supernet.strategies.proxyless_reinforce import ProxylessReinforce
from supernet.strategies.second_order import SecondOrder
from supernet.strategies.state import SearchState
from supernet.tracking import read_journal

CELLS = NasBench201(in_chans=1, img_size=8, widths=(4,), num_cells=1)
DARTS = Darts(in_chans=1, img_size=8, width=4, num_cells=3)
NODES = ("into_1", "into_2", "into_3")
NEVER: Any = None
SGD = {"opt": "momentum", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}


def make_state(problem: Problem, init_std: float = 1.0) -> SearchState:
    return SearchState(problem, 12, SGD, {"opt": "adam"}, init_std, torch.contiguous_format)


def unbuilt(relaxation: Any = None) -> Problem:
    """DARTS, where nothing is run."""
    relaxation, supernet = relaxation or PartialChannels(2), NEVER
    nothing = {c.name: torch.zeros(len(c.options)).double() for c in DARTS.choices}
    cost = AdditiveCost(DARTS.choices, 0.0, nothing, "macs", "MACs")
    return Problem(DARTS, supernet, relaxation, TaskOnly(cost="macs"), cost, NEVER, NEVER, 0)


def draw(seed: int, scale: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    choices = (*DARTS.choices, *PartialChannels().nodes(DARTS.choices))
    logits = ArchitectureParameters(choices, scale, generator, torch.float64)()
    return {name: vector.detach() for name, vector in logits.items()}


def genotype(logits: Mapping[str, Tensor], weighed: bool = True) -> dict[str, str]:
    """The authors' rule, on arrays of rows: W[j] * W2[j], two rows of each node, their best."""
    found = {}
    for kind in ("normal", "reduce"):
        for node in range(2, 6):
            names = [f"{kind}_{source}_{node}" for source in range(node)]
            rows = np.stack([np.exp(logits[name].numpy()) for name in names])
            rows /= rows.sum(axis=1, keepdims=True)
            shares = np.exp(logits[f"{kind}_into_{node}"].numpy())
            if weighed:
                rows *= (shares / shares.sum())[:, None]
            rows[:, OPERATIONS.index(NONE)] = 0
            kept = sorted(range(node), key=lambda j: -rows[j].max())[:2]
            found |= {n: OPERATIONS[rows[j].argmax()] if j in kept else NONE
                      for j, n in enumerate(names)}  # fmt: skip
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_strength_of_an_edge_is_the_product(seed: int) -> None:
    logits = draw(seed, (1.0, 3.0)[seed % 2])
    assert dict(derive(DARTS, unbuilt().scores(logits))) == genotype(logits)
    assert genotype(logits) != genotype(logits, weighed=False)


def test_a_strong_edge_outweighs_a_strong_operation_and_the_other_way_round() -> None:
    logits = {name: torch.zeros_like(vector) for name, vector in draw(0, 1.0).items()}
    for source, strength in enumerate((0.4, 0.3, 0.2, 0.1, 0.0)):
        logits[f"normal_{source}_5"][4] = strength

    def kept() -> list[int]:
        found = derive(DARTS, unbuilt().scores(logits))
        return [source for source in range(5) if found[f"normal_{source}_5"] != NONE]

    assert kept() == [0, 1]
    logits["normal_into_5"][4] = 1.0
    assert kept() == [0, 4]
    logits["normal_into_5"][3] = 0.25  # with its operation's 0.1 more than edge 1, not than edge 0
    assert kept() == [0, 4]
    logits["normal_into_5"][3] = 0.35
    assert kept() == [3, 4]


def test_a_checkpoint_derives_with_betas_where_it_has_them(make_strategy: Any) -> None:
    """One from before there were any derives by its alphas."""
    logits, strategy = draw(5, 2.0), make_strategy()
    state = {"logits": {f"logits.{n}": v for n, v in logits.items()}, "objective": {}}
    answer = strategy.answer(unbuilt(), state)
    assert dict(answer.best(None)) == genotype(logits)
    torch.testing.assert_close(answer.inputs["reduce_into_4"], logits["reduce_into_4"].softmax(0))
    assert len(answer.inputs) == 8
    for name in answer.inputs:
        del state["logits"][f"logits.{name}"]
    for relaxation in (PartialChannels(2), Softmax()):
        before = strategy.answer(unbuilt(relaxation), state)
        assert dict(before.best(None)) == genotype(logits, weighed=False)
        assert not before.inputs


def test_alphas_start_the_same_and_betas_cost_nothing(make_problem: Any) -> None:
    states = {
        name: make_state(make_problem(relaxation, space=CELLS))
        for name, relaxation in {
            "softmax": Softmax(), "plain": PartialChannels(2, edge_norm=False),
            "weighed": PartialChannels(2),
        }.items()
    }  # fmt: skip
    alphas, plain, weighed = (state.parameters() for state in states.values())
    assert list(plain) == list(alphas) and list(weighed) == [*alphas, *NODES]
    for name, vector in alphas.items():
        assert torch.equal(plain[name], vector) and torch.equal(weighed[name], vector)
    drawn = [state.generator.get_state() for state in states.values()]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    problem, generator = states["weighed"].problem, torch.Generator()
    sample = problem.relaxation.for_architecture_step(weighed, generator, 0.5)
    cost = problem.cost.expected(problem.shares(sample.cost_weights))
    cost.backward()
    assert all((weighed[name].grad is None) == (name in NODES) for name in weighed)
    p = problem.relaxation.probabilities(alphas)
    assert cost.item() == pytest.approx(problem.cost.expected(p).item())


VARIANTS: dict[str, dict[str, Any]] = {
    "first order, curvature": {"monitor": Monitor(curvature_every=1, iterations=2)},
    "perturbation": {"selection": Perturbation(steps=1, lr=0.02, num_images=24)},
    "second order": {"cls": SecondOrder},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_pass_of_a_search_has_the_betas_of_its_time(
    variant: str, make_problem: Any, make_strategy: Any, make_run: Any
) -> None:
    problem, run, states = make_problem(PartialChannels(2), space=CELLS), make_run(), []
    settings = {"epochs": 2, "weight_optimizer": SGD, **VARIANTS[variant]}
    cls = settings.pop("cls", FirstOrder)
    passes = []

    class Watched(cls):  # type: ignore[misc, valid-type]
        def train(self, state: SearchState, run: Any) -> None:
            states.append(state)
            super().train(state, run)

    def look(_: Any, arguments: tuple[Any, ...]) -> None:
        logits = states[0].parameters()
        for name in NODES:
            path = arguments[1][name]
            assert path.active == tuple(range(len(logits[name])))
            torch.testing.assert_close(path.values, logits[name].softmax(0), msg=name)
        passes.append(arguments[1])

    hook = problem.supernet.register_forward_pre_hook(look)
    answer = make_strategy(cls=Watched, **settings).search(problem, run)
    assert (in_search := len(passes)) >= 15
    resolve(problem, answer, OnTarget(None, None, None), 2, problem.objective.budget)
    hook.remove()
    assert len(passes) > in_search  # the supernet is judged
    betas = states[0].parameters()
    assert all(v.grad is not None for v in betas.values())
    assert betas["into_3"].std() > 0.01  # from 0.001, by some steps of 0.05
    record = [r for r in read_journal(run.folder / "metrics.jsonl") if r["phase"] == "search"][-1]
    assert set(record["inputs"]) == set(NODES) and set(record["probabilities"]) == set(
        CELLS.by_name
    )
    assert record["inputs"]["into_3"] == pytest.approx(betas["into_3"].softmax(0).tolist())
    assert ("curvature" in record) == variant.endswith("curvature")
    assert CELLS.is_valid(answer.best(problem.objective.budget))
    for name, shares in answer.inputs.items():
        assert torch.equal(shares, betas[name].softmax(0))


def test_the_curvature_is_that_of_alphas_and_betas(
    make_problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    monkeypatch.setattr(
        curvature, "largest_eigenvalue", lambda product, size, n: sizes.append(size) or 0.0
    )
    state = make_state(make_problem(PartialChannels(2), space=CELLS))
    curvature.curvature(state, torch.contiguous_format, 2)
    assert sizes == [6 * 5 + 1 + 2 + 3]


@pytest.mark.parametrize("cut_at", [3, 8])
def test_an_interrupted_search_ends_as_one_that_was_not(
    cut_at: int, make_problem: Any, make_strategy: Any, make_run: Any
) -> None:
    """In the first and in the second epoch with architecture steps, to the bit."""

    class Cut(FirstOrder):
        left = cut_at

        def architecture_step(self, *arguments: Any) -> None:
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            super().architecture_step(*arguments)

    def search(cls: type[FirstOrder], run: Any) -> Any:
        problem = make_problem(PartialChannels(2), space=CELLS)
        return make_strategy(cls=cls).search(problem, run).best(problem.objective.budget)

    whole, run = make_run("whole", checkpoint_every=2), make_run("cut", checkpoint_every=2)
    expected = search(FirstOrder, whole)
    with pytest.raises(KeyboardInterrupt):
        search(Cut, run)
    assert search(FirstOrder, make_run("cut", True, 2)) == expected
    ours, theirs = (load_checkpoint(r.checkpoint)["search"] for r in (run, whole))
    assert set(theirs["logits"]) == {f"logits.{n}" for n in (*CELLS.by_name, *NODES)}
    assert len(theirs["logits_optimizer"]["state"]) == 9
    for key in ("logits", "supernet"):
        assert all(torch.equal(v, theirs[key][n]) for n, v in ours[key].items())
    moments = zip(
        ours["logits_optimizer"]["state"].values(),
        theirs["logits_optimizer"]["state"].values(),
        strict=True,
    )
    assert all(torch.equal(one[k], other[k]) for one, other in moments for k in one)
    journals = [(r.folder / "metrics.jsonl").read_text() for r in (run, whole)]
    assert journals[0] == journals[1]


def test_the_supernet_is_judged_with_its_betas(make_problem: Any) -> None:
    problem = make_problem(PartialChannels(2), space=CELLS)
    problem.supernet.train()
    seen: list[Mapping[str, PathWeights]] = []
    problem.supernet.register_forward_pre_hook(lambda _, given: seen.append(given[1]))
    inputs = {"into_2": torch.tensor([0.9, 0.1]), "into_3": torch.tensor([0.2, 0.3, 0.5])}
    architecture = CELLS.sample(torch.Generator().manual_seed(0))
    losses = [
        Inherited(problem, 30, 2, given).accuracy(architecture)[1] for given in (inputs, {})
    ]
    assert losses[0] != losses[1]
    of_choices = one_hot(architecture, CELLS.choices)
    assert {n: p.active for n, p in seen[0].items()} == {
        **{n: p.active for n, p in of_choices.items()}, "into_2": (0, 1), "into_3": (0, 1, 2),
    }  # fmt: skip
    assert all(torch.equal(seen[0][n].values, v) for n, v in inputs.items())  # type: ignore[arg-type]
    assert set(seen[-1]) == set(of_choices)


def test_single_paths_cannot_learn_them(
    make_problem: Any, make_strategy: Any, make_run: Any
) -> None:
    problem = make_problem(PartialChannels(2), space=CELLS)
    with pytest.raises(ValueError, match="PartialChannels; set mixed_op.edge_norm=false"):
        make_strategy(cls=ProxylessReinforce).search(problem, make_run())
