from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from supernet.choice import Architecture
from supernet.derive import Infeasible
from supernet.mixed_ops.base import one_hot
from supernet.mixed_ops.one_shot import OneShot
from supernet.mixed_ops.single_path import SinglePath
from supernet.objective import Product
from supernet.strategies.base import Problem, Run
from supernet.strategies.controller import Drawn
from supernet.strategies.enas import ENAS
from supernet.strategies.reinforce import Reinforce
from supernet.strategies.state import SearchState
from supernet.tracking import read_journal


@pytest.fixture
def make_enas(make_strategy: Callable[..., Any]) -> Callable[..., ENAS]:
    def make(controller: dict[str, Any] | None = None, **changes: Any) -> ENAS:
        settings: dict[str, Any] = {
            "batch": 2, "optimizer": {"opt": "adam", "lr": 0.02}, "hidden": 8, "num_layers": 1,
            "shared": True, "temperature": 1.0, "tanh_constant": None, "baseline_decay": 0.8,
            "power": 1.0, "entropy_weight": 0.0, "skip_weight": 0.0, "skip_rate": 0.4,
        }  # fmt: skip
        reinforce = Reinforce(**{**settings, **(controller or {})})
        given = {"warmup_epochs": 0, "controller_steps": 3, "controller": reinforce, **changes}
        found: ENAS = make_strategy(ENAS, **given)
        return found

    return make


def draw_some(strategy: ENAS, state: SearchState, number: int = 60) -> Counter[Architecture]:
    generator = torch.Generator().manual_seed(1)
    return Counter(strategy._feasible(state, generator) for _ in range(number))


def test_another_mixed_op_is_refused(make_enas: Any, make_problem: Any, make_run: Any) -> None:
    with pytest.raises(ValueError, match="mixed_op=single_path, not OneShot"):
        make_enas().search(make_problem(OneShot(0.1)), make_run())
    with pytest.raises(ValueError, match=r"controller_steps must be 1 or more; got 0"):
        make_enas(controller_steps=0)
    with pytest.raises(ValueError, match=r"strategy\.ranking cannot be null"):
        make_enas(ranking=None)


def test_the_controller_learns_and_the_weights_follow_it(
    make_enas: Any, make_problem: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One option of each choice is worth something: it is drawn, hence trained, ever more often."""
    problem: Problem = make_problem(SinglePath(), share=1.0)
    wanted = {choice.name: choice.options[1] for choice in problem.space.choices}

    def reward(self: ENAS, state: SearchState, drawn: Drawn) -> float:
        return sum(drawn.genes[name] == option for name, option in wanted.items()) / len(wanted)

    trained: list[float] = []
    weights = ENAS.weights

    def spy(self: ENAS, state: SearchState, progress: float) -> Any:
        found = weights(self, state, progress)
        hits = [found[c.name].active == (1,) for c in state.problem.space.choices]
        trained.append(sum(hits) / len(hits))
        return found

    monkeypatch.setattr(ENAS, "_reward", reward)
    monkeypatch.setattr(ENAS, "weights", spy)
    strategy = make_enas({"batch": 8}, controller_steps=40, epochs=3)
    run: Run = make_run()
    best = strategy.search(problem, run).best(None)
    num_steps = len(trained) // 3
    assert sum(trained[-num_steps:]) > sum(trained[:num_steps])
    assert sum(trained[-num_steps:]) > 0.9 * num_steps
    assert dict(best) == wanted
    rewards = [r["reward"] for r in read_journal(run.folder / "metrics.jsonl") if "reward" in r]
    assert rewards == sorted(rewards) and len(rewards) == 3


def test_a_reward_is_the_accuracy_on_a_batch_and_leaves_the_weights(
    make_enas: Any, make_problem: Any
) -> None:
    problem: Problem = make_problem(SinglePath(), share=1.0)
    strategy = make_enas(batch_size=30)
    state = strategy.start(problem)
    before = {n: p.clone() for n, p in problem.supernet.named_parameters()}
    problem.supernet.train()
    drawn = state.parts["policy"].draw()
    stream = strategy.start(make_problem(SinglePath(), share=1.0)).arch_stream
    found = strategy._reward(state, drawn)
    images, labels = stream.next()
    architecture = problem.space.decode(drawn.genes)
    outputs = problem.supernet(images, one_hot(architecture, problem.space.choices))
    assert found == pytest.approx(float((outputs.argmax(1) == labels).double().mean()))
    for name, parameter in problem.supernet.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None


def test_a_reward_is_what_the_objective_makes_of_accuracy_and_cost(
    make_enas: Any, make_problem: Any
) -> None:
    rewards = []
    for beta in (0.0, -0.5):
        problem: Problem = make_problem(SinglePath(), share=1.0)
        product = Product(target=1.0, alpha=beta, beta=beta, cost="macs")
        problem = replace(problem, objective=product)
        strategy = make_enas(batch_size=30)
        state = strategy.start(problem)
        problem.supernet.train()
        drawn = state.parts["policy"].draw()
        rewards.append(strategy._reward(state, drawn))
    cost = problem.cost.of(problem.space.decode(drawn.genes))
    assert rewards[1] == pytest.approx(rewards[0] * cost**-0.5) and rewards[0] > 0


def test_what_is_ranked_does_not_depend_on_what_was_drawn_before(
    make_enas: Any, make_problem: Any, make_run: Any
) -> None:
    """Else a search that goes on within its ranking would rank others."""
    strategy = make_enas()
    state = strategy.start(make_problem(SinglePath(), share=1.0))
    ranked = []
    for name in ("first", "second"):
        state.ranked.clear()
        strategy.rank(state, make_run(name))
        ranked.append([record["architecture"] for record in state.ranked])
        state.parts["policy"].draw()
    assert ranked[0] == ranked[1] and len(ranked[0]) == 4


def test_what_is_over_the_budget_is_neither_trained_nor_ranked(
    make_enas: Any, make_problem: Any, make_run: Any
) -> None:
    problem: Problem = make_problem(SinglePath(), share=0.8)
    strategy = make_enas()
    state = strategy.start(problem)
    for _ in range(20):
        weights = strategy.weights(state, 0.0)
        options = {c.name: c.options[weights[c.name].active[0]] for c in problem.space.choices}
        assert problem.is_feasible(problem.space.architecture(options))
    policy = state.parts["policy"]
    over = next(
        one for one in iter(policy.draw, None)
        if not problem.is_feasible(problem.space.decode(one.genes))
    )  # fmt: skip
    assert strategy._reward(state, over) is None
    run: Run = make_run()
    answer = strategy.search(make_problem(SinglePath(), share=0.8), run)
    ranked = [r for r in read_journal(run.folder / "metrics.jsonl") if r["phase"] == "rank"]
    architectures = [problem.space.architecture(r["architecture"]) for r in ranked]
    assert len(set(architectures)) == len(ranked) and all(map(problem.is_feasible, architectures))
    assert answer.best(problem.objective.budget) in architectures


def test_a_budget_that_the_controller_never_meets_is_an_error(
    make_enas: Any, make_problem: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = make_enas()
    state = strategy.start(make_problem(SinglePath()))
    monkeypatch.setattr(Problem, "is_feasible", lambda *_: False)
    with pytest.raises(Infeasible, match="none of 1000 architectures"):
        strategy.weights(state, 0.0)


def test_in_the_warm_up_paths_are_uniform_and_the_controller_rests(
    make_enas: Any, make_problem: Any, make_run: Any
) -> None:
    problem: Problem = make_problem(SinglePath(), share=1.0)
    strategy = make_enas(epochs=2, warmup_epochs=1)
    state = strategy.start(problem)
    drawn = state.parts["policy"].generator.get_state()
    strategy.weights(state, 0.0)
    assert torch.equal(state.parts["policy"].generator.get_state(), drawn)
    run: Run = make_run()
    strategy.search(make_problem(SinglePath(), share=1.0), run)
    journal = read_journal(run.folder / "metrics.jsonl")
    assert [("reward" in r) for r in journal if r["phase"] in ("warmup", "search")] == [False, True]


@pytest.mark.parametrize("stop_at", [3, 14])
def test_it_goes_on_where_it_was_interrupted(
    stop_at: int,
    make_enas: Any,
    make_problem: Any,
    make_run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the weights' steps or the controller's."""
    def search(run: Run) -> tuple[Architecture, bytes]:
        best = make_enas().search(make_problem(SinglePath()), run).best(None)
        return best, (run.folder / "metrics.jsonl").read_bytes()

    whole = search(make_run("whole", checkpoint_every=2))
    for name in ("weights", "_reward"):
        count, real = Counter[str](), getattr(ENAS, name)

        def stopping(*args: Any, count: Any = count, real: Any = real) -> Any:
            count["calls"] += 1
            if count["calls"] == stop_at:
                raise KeyboardInterrupt
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(ENAS, name, stopping)
            with pytest.raises(KeyboardInterrupt):
                search(make_run(name, checkpoint_every=2))
        assert search(make_run(name, resume=True, checkpoint_every=2)) == whole
