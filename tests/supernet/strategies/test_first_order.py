from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from latency.model import macs_cost
from latency.sites import trace
from supernet.engine import Diverged
from supernet.mixed_ops.base import MixedOp
from supernet.mixed_ops.binary_gate import BinaryGate
from supernet.mixed_ops.gumbel import Gumbel
from supernet.mixed_ops.one_shot import OneShot
from supernet.mixed_ops.softmax import Softmax
from supernet.objective import TaskOnly
from supernet.spaces.nasbench201 import NasBench201
from supernet.strategies.first_order import FirstOrder
from supernet.strategies.state import SearchState
from supernet.tracking import read_journal

RELAXATIONS = {"binary_gate": BinaryGate, "softmax": Softmax, "one_shot": OneShot}


def start(strategy: FirstOrder, problem: Any) -> SearchState:
    state = SearchState(
        problem,
        strategy.batch_size,
        strategy.weight_optimizer,
        strategy.arch_optimizer,
        strategy.init_std,
        strategy.memory_format,
    )
    problem.supernet.train()
    return state


def copy(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_a_weight_step_leaves_logits_and_an_architecture_step_leaves_weights(
    make_problem, make_strategy
) -> None:
    strategy, problem = make_strategy(), make_problem(Softmax())
    state = start(strategy, problem)
    weights, logits = copy(problem.supernet), copy(state.parameters)
    strategy.weight_step(state, 0.0)
    assert all(torch.equal(v, logits[n]) for n, v in copy(state.parameters).items())
    moved = copy(problem.supernet)
    assert not all(torch.equal(v, weights[n]) for n, v in moved.items())
    strategy.architecture_step(state, 0.5)
    assert all(torch.equal(v, moved[n]) for n, v in copy(problem.supernet).items())
    assert not all(torch.equal(v, logits[n]) for n, v in copy(state.parameters).items())


@pytest.mark.parametrize("op", ["none", "nor_conv_1x1"])
def test_logits_that_a_sample_does_not_reach_have_the_gradient_zero(
    op: str, make_problem, make_strategy
) -> None:
    """A sampled cell may carry nothing at all: then the loss is a function of no logit."""
    strategy, problem = make_strategy(), make_problem(Gumbel())
    space = NasBench201(in_chans=1, img_size=8, widths=(4,), num_cells=1)
    sites = trace(space.build(MixedOp, 10, search=False), space.choices, (1, 1, 8, 8))
    supernet = space.build_supernet(10, problem.relaxation.build)
    cost, objective = macs_cost(space.choices, sites), TaskOnly(cost="macs")
    problem = replace(problem, space=space, supernet=supernet, cost=cost, objective=objective)
    state = start(strategy, problem)
    with torch.no_grad():
        for name, vector in state.parameters().items():
            vector[space.by_name[name].index(op)] = 30.0
    found = state.logits_optimizer.step
    steps = []
    state.logits_optimizer.step = lambda: (
        steps.append([p.grad.clone() for p in state.parameters.parameters()]), found(),
    )  # fmt: skip
    strategy.architecture_step(state, 0.0)
    assert len(steps[0]) == 6 and all(torch.isfinite(g).all() for g in steps[0])
    assert any(g.any() for g in steps[0]) == (op != "none")


def test_a_sampled_weight_step_leaves_the_other_candidates_bitwise_unchanged(
    make_problem, make_strategy
) -> None:
    """With momentum and decay, after every candidate has its momentum."""
    strategy, problem = make_strategy(), make_problem(BinaryGate())
    state = start(strategy, problem)
    for _ in range(25):
        strategy.weight_step(state, 0.0)
    buffers = state.weight_optimizer.state_dict()["state"]
    assert len(buffers) == len(list(problem.supernet.parameters()))
    for _ in range(5):
        before = copy(problem.supernet)
        drawn = torch.Generator()
        drawn.set_state(state.generator.get_state())
        paths = problem.relaxation.for_weight_step(state.parameters(), drawn, 0.0)
        ran = {
            f"candidates.{choice.options[paths[choice.name].active[0]]}."
            for choice in problem.space.choices
        }
        strategy.weight_step(state, 0.0)
        blocks = {choice.name: index for index, choice in enumerate(problem.space.choices, start=1)}
        for name, value in copy(problem.supernet).items():
            if ".candidates." not in name:
                assert not torch.equal(value, before[name]), name
                continue
            choice = next(c for c in blocks if name.startswith(f"blocks.{blocks[c]}."))
            option = problem.space.by_name[choice].options[paths[choice].active[0]]
            sampled = f".candidates.{option}." in name
            assert torch.equal(value, before[name]) != sampled, name
        assert ran


def test_architecture_steps_advance_through_their_half(make_problem, make_strategy) -> None:
    strategy, problem = make_strategy(), make_problem(Softmax())
    state = start(strategy, problem)
    seen = []
    original = state.arch_stream.next
    half = len(state.arch_stream.loader)

    def watch() -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = original()
        seen.append(images)
        return images, labels

    state.arch_stream.next = watch
    for _ in range(half):
        strategy.architecture_step(state, 0.5)
    assert half > 1
    assert all(not torch.equal(seen[i], seen[j]) for i in range(half) for j in range(i) if i != j)
    assert (state.arch_stream.epoch, state.arch_stream.position) in ((1, 0), (0, half))


def test_the_two_streams_read_disjoint_halves(make_problem, make_strategy) -> None:
    state = start(make_strategy(), make_problem(Softmax()))
    weights, arch = (
        set(stream.loader.split.indices.tolist())
        for stream in (state.weight_stream, state.arch_stream)
    )
    assert not weights & arch and len(weights | arch) == 120


@pytest.mark.parametrize("name", RELAXATIONS)
def test_search_ends_within_the_budget_and_logs_every_epoch(
    name: str, make_problem, make_strategy, make_run
) -> None:
    problem, run = make_problem(RELAXATIONS[name]()), make_run()
    architecture = make_strategy().search(problem, run).best(problem.objective.budget)
    assert problem.space.is_valid(architecture)
    assert problem.cost.of(architecture) <= problem.objective.budget
    records = read_journal(run.folder / "metrics.jsonl")
    epochs = [r for r in records if r["phase"] != "rank"]
    assert [r["phase"] for r in epochs] == ["warmup", "search", "search"]
    assert [r["step"] for r in epochs] == [5, 10, 15]
    if name == "one_shot":
        ranked = [r for r in records if r["phase"] == "rank"]
        best = max(ranked, key=lambda r: (r["accuracy"], -r["loss"]))
        assert best["architecture"] == dict(architecture)
        assert all(r["cost"] <= problem.objective.budget for r in ranked)
        assert "arch_loss" not in epochs[-1] and "multiplier" not in epochs[-1]
    else:
        last = epochs[-1]
        assert last["architecture"] == dict(architecture)
        p = last["probabilities"]
        by_hand = [
            -sum(q * math.log(q) for q in vector) / math.log(len(vector)) for vector in p.values()
        ]
        assert last["entropy"] == pytest.approx(sum(by_hand) / len(by_hand))
        expected = problem.cost.fixed + sum(
            q * c
            for n, vector in p.items()
            for q, c in zip(vector, problem.cost.per_option[n].tolist(), strict=True)
        )
        assert last["expected_cost"] == pytest.approx(expected)
        assert "arch_loss" not in epochs[0]


@pytest.mark.parametrize("name", RELAXATIONS)
def test_search_ends_within_every_limit_and_logs_each(
    name: str, make_problem, make_strategy, make_run
) -> None:
    uppers = {"params": 1600.0, "peak_memory": 6144.0}
    problem, run = make_problem(RELAXATIONS[name](), share=1.0, uppers=uppers), make_run()
    architecture = make_strategy().search(problem, run).best(problem.objective.budget)
    assert all(limit.holds(architecture) for limit in problem.limits)
    records = read_journal(run.folder / "metrics.jsonl")
    if name == "one_shot":
        ranked = [r for r in records if r["phase"] == "rank"]
        assert len(ranked) == 3  # of six architectures, three have few enough parameters
        assert all(r["limits"]["params"]["derived"] <= 1600 for r in ranked)
        return
    last = records[-1]
    params, memory = last["limits"]["params"], last["limits"]["peak_memory"]
    by_hand = problem.limits[0].cost.fixed + sum(
        q * c
        for n, vector in last["probabilities"].items()
        for q, c in zip(vector, problem.limits[0].cost.per_option[n].tolist(), strict=True)
    )
    assert params["expected"] == pytest.approx(by_hand)
    assert params["multiplier"] == problem.objective.multipliers["params"] >= 0
    assert params["derived"] == problem.limits[0].cost.of(architecture) <= params["limit"] == 1600
    assert memory == {
        "unit": "bytes", "limit": 6144.0, "expected": None, "derived": 6144, "multiplier": None
    }  # fmt: skip


def test_the_multiplier_of_a_limit_pushes_the_logits(make_problem, make_strategy) -> None:
    """Other things equal, the option with fewer parameters gains from a limit out of reach."""

    def gap(uppers: dict[str, float]) -> float:
        strategy, problem = make_strategy(), make_problem(Softmax(), share=1.0, uppers=uppers)
        state = start(strategy, problem)
        for _ in range(10):
            strategy.architecture_step(state, 0.5)
        logits = state.parameters()["stage1_0"]  # k3_e2, k5_e2
        return (logits[0] - logits[1]).item()

    assert gap({"params": 200.0}) > gap({}) + 0.1


def test_warmup_leaves_the_logits_and_arch_every_thins_the_steps(
    make_problem, make_strategy, make_run
) -> None:
    strategy, problem = make_strategy(arch_every=2), make_problem(Softmax())
    calls = []
    original = strategy.architecture_step

    def watch(state: SearchState, progress: float) -> None:
        calls.append(state.step)
        original(state, progress)

    strategy.architecture_step = watch
    strategy.search(problem, make_run())
    assert calls == [6, 8, 10, 12, 14]


class Recording(Softmax):
    """With a known penalty; remembers the progress that each step is told."""

    def __init__(self, slope: float = 0.0) -> None:
        self.slope = slope
        self.told: dict[str, list[float]] = {"weights": [], "logits": [], "penalty": []}

    def for_weight_step(self, logits: Any, generator: Any, progress: float) -> Any:
        self.told["weights"].append(progress)
        return super().for_weight_step(logits, generator, progress)

    def for_architecture_step(self, logits: Any, generator: Any, progress: float) -> Any:
        self.told["logits"].append(progress)
        return super().for_architecture_step(logits, generator, progress)

    def penalty(self, logits: Any, progress: float) -> torch.Tensor:
        self.told["penalty"].append(progress)
        return self.slope * sum(vector[0] for vector in logits.values())


def test_schedules_run_from_the_end_of_the_warm_up_to_the_last_step(
    make_problem, make_strategy, make_run
) -> None:
    """Five steps of warm-up, then ten of the search."""
    told = Recording()
    make_strategy().search(make_problem(told), make_run())
    rising = [step / 10 for step in range(10)]
    assert told.told["weights"] == pytest.approx([0.0] * 5 + rising)
    assert told.told["logits"] == told.told["penalty"] == pytest.approx(rising)


def test_schedules_run_over_all_steps_without_logits(make_problem, make_strategy, make_run) -> None:
    told = []

    class Watching(OneShot):
        def for_weight_step(self, logits: Any, generator: Any, progress: float) -> Any:
            told.append(progress)
            return super().for_weight_step(logits, generator, progress)

    make_strategy().search(make_problem(Watching()), make_run())
    assert told == pytest.approx([step / 15 for step in range(15)])


def test_the_penalty_of_a_relaxation_is_part_of_the_loss(make_problem, make_strategy) -> None:
    """A step of plain descent differs by the rate times the penalty's gradient."""

    def moved(slope: float) -> dict[str, torch.Tensor]:
        descent = {"opt": "momentum", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
        strategy, problem = make_strategy(arch_optimizer=descent), make_problem(Recording(slope))
        state = start(strategy, problem)
        strategy.architecture_step(state, 0.5)
        return {name: vector.detach() for name, vector in state.parameters().items()}

    plain, pushed = moved(0.0), moved(3.0)
    for name, vector in pushed.items():
        expected = torch.zeros(len(vector))
        expected[0] = -0.1 * 3.0
        torch.testing.assert_close(vector - plain[name], expected, atol=1e-6, rtol=0)


def test_a_run_that_diverges_says_what_to_change(make_problem, make_strategy, make_run) -> None:
    optimizer = {"opt": "sgd", "lr": 1e30, "momentum": 0.9, "weight_decay": 0.0}
    strategy = make_strategy(weight_optimizer=optimizer, clip_grad=None)
    with pytest.raises(Diverged, match="lower weight_optimizer.lr"):
        strategy.search(make_problem(Softmax()), make_run())


def test_learning_rate_follows_the_cosine(make_problem, make_strategy, make_run) -> None:
    run = make_run()
    make_strategy().search(make_problem(Softmax()), run)
    rates = [r["learning_rate"] for r in read_journal(run.folder / "metrics.jsonl")]
    expected = [1e-3 + 0.5 * (0.05 - 1e-3) * (1 + math.cos(math.pi * e / 3)) for e in range(3)]
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    "learned,priced",
    [({}, False), ({"multiplier": 0.0, "used": 0.9}, False), ({"multiplier": 0.3}, True),
     ({"multiplier": 0.0, "used": 0.99}, True)],
)  # fmt: skip
def test_the_answer_knows_whether_the_budget_had_a_price(
    learned: dict[str, float], priced: bool, make_problem, make_strategy, make_run
) -> None:
    problem, strategy = make_problem(Softmax()), make_strategy()
    strategy.search(problem, make_run())
    state = make_run(resume=True).load()
    assert state is not None
    assert state["objective"] == problem.objective.state_dict()
    answer = strategy.answer(problem, {**state, "objective": learned})
    assert answer.priced == priced


@pytest.mark.parametrize("safeguard", [True, False])
def test_a_collapsed_cell_is_not_derived_unless_that_is_asked_for(
    safeguard: bool, make_problem, make_strategy
) -> None:
    space = NasBench201(in_chans=1, img_size=8, widths=[2, 4], num_cells=1)
    problem, strategy = make_problem(Softmax(), space=space), make_strategy(safeguard=safeguard)
    state = start(strategy, problem)
    for vector in state.parameters().values():
        vector.data.copy_(torch.tensor([3.0, 4.0, 2.0, 1.0, 0.0]))
    options = [option for _, option in strategy.answer(problem, state.state_dict()).best(None)]
    assert options.count("skip_connect") == (2 if safeguard else 6)
    assert options.count("nor_conv_1x1") == (4 if safeguard else 0)


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", RELAXATIONS)
@pytest.mark.parametrize("kill_at", [2, 7, 13])
def test_resumed_search_is_bit_identical(
    name: str, kill_at: int, make_problem, make_strategy, make_run
) -> None:
    uppers = {"params": 1600.0}

    def finish(run: Any) -> tuple[Any, Any, str]:
        problem = make_problem(RELAXATIONS[name](), uppers=uppers)
        answer = make_strategy().search(problem, run)
        architecture = answer.best(problem.objective.budget)
        return architecture, problem, (run.folder / "metrics.jsonl").read_text()

    whole, problem, lines = finish(make_run("whole"))
    strategy = make_strategy()
    original = strategy.weight_step

    def die(state: SearchState, progress: float) -> None:
        if state.step == kill_at:
            raise Killed
        original(state, progress)

    strategy.weight_step = die
    with pytest.raises(Killed):
        strategy.search(
            make_problem(RELAXATIONS[name](), uppers=uppers), make_run("cut", checkpoint_every=3)
        )
    resumed, again, resumed_lines = finish(make_run("cut", resume=True))
    assert resumed == whole and resumed_lines == lines
    assert again.objective.state_dict() == problem.objective.state_dict()
    for key, value in problem.supernet.state_dict().items():
        assert torch.equal(value, again.supernet.state_dict()[key]), key


def test_a_checkpoint_of_another_space_is_refused(make_problem, make_strategy, make_run) -> None:
    make_strategy().search(make_problem(Softmax()), make_run("a"))
    problem = make_problem(OneShot())
    problem.supernet = torch.nn.Linear(2, 2)
    state = start(make_strategy(), problem)
    saved = make_run("a", resume=True).load()
    with pytest.raises(ValueError, match="does not fit this search"):
        state.load_state_dict(saved)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"warmup_epochs": 3}, "warmup_epochs must be .* below strategy.epochs=3; got 3"),
        ({"arch_every": 0}, "arch_every must be 1 or more; got 0"),
    ],
)
def test_bad_settings_are_refused(change, message: str, make_strategy) -> None:
    with pytest.raises(ValueError, match=message):
        make_strategy(**change)
