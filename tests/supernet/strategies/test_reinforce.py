"""The controller and its gradient against formulas, and a search whose answer is known."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from supernet.choice import Choice
from supernet.estimators.base import Estimate, Estimator
from supernet.spaces.nasbench201 import NasBench201
from supernet.strategies import reinforce, trials
from supernet.strategies.base import Problem
from supernet.strategies.controller import Controller, Squash
from supernet.strategies.reinforce import Policy, Reinforce
from supernet.strategies.trials import Trial

GENES = (
    Choice("a", ("x", "y")),
    Choice("b", ("x", "y")),
    Choice("b_reads_a", ("cut", "join")),
    Choice("c", ("p", "q", "r")),
    Choice("c_reads_a", ("cut", "join")),
    Choice("c_reads_b", ("cut", "join")),
)
SQUASH = Squash(temperature=2.0, tanh_constant=1.5)
ANCHORS = {"b_reads_a": "a", "c_reads_a": "a", "c_reads_b": "b"}


def make_controller(
    genes: Sequence[Choice] = GENES,
    anchors: Mapping[str, str] = ANCHORS,
    shared: bool = True,
) -> Controller:
    controller = Controller(
        genes, anchors, hidden=5, num_layers=2, shared=shared, squash=SQUASH, skip_rate=0.4,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in controller.parameters():
            parameter *= 10  # else all is uniform
    return controller.double()


def make_strategy(**changes: Any) -> Reinforce:
    settings: dict[str, Any] = {
        "batch": 4, "optimizer": {"opt": "adam", "lr": 0.02, "weight_decay": 0.0}, "hidden": 16,
        "num_layers": 1, "shared": True, "temperature": 1.0, "tanh_constant": None,
        "baseline_decay": 0.9, "power": 1.0, "entropy_weight": 0.0, "skip_weight": 0.0,
        "skip_rate": 0.4, "num_evaluations": 10,
    }  # fmt: skip
    return Reinforce(**{**settings, **changes})


def every(genes: Sequence[Choice]) -> Iterator[dict[str, str]]:
    for chosen in itertools.product(*(gene.options for gene in genes)):
        yield {gene.name: option for gene, option in zip(genes, chosen, strict=True)}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("anchors", [ANCHORS, {}])
def test_probabilities_of_all_sequences_sum_to_one(shared: bool, anchors: Any) -> None:
    controller = make_controller(anchors=anchors, shared=shared)
    probabilities = [controller(genes=genes).log_prob.exp().item() for genes in every(GENES)]
    assert sum(probabilities) == pytest.approx(1.0)
    assert max(probabilities) > 2 * min(probabilities)


def test_draws_have_these_probabilities() -> None:
    controller, generator = make_controller(GENES[:3]), torch.Generator().manual_seed(1)
    number = 800
    counts: dict[tuple[str, ...], int] = {}
    for _ in range(number):
        drawn = controller(generator)
        counts[tuple(drawn.genes.values())] = counts.get(tuple(drawn.genes.values()), 0) + 1
        assert drawn.log_prob.item() == pytest.approx(controller(genes=drawn.genes).log_prob.item())
    for genes in every(GENES[:3]):
        p = controller(genes=genes).log_prob.exp().item()
        error = math.sqrt(p * (1 - p) / number)
        assert abs(counts.get(tuple(genes.values()), 0) / number - p) < 4.5 * error


def test_shared_genes_have_one_embedding_and_one_softmax() -> None:
    own, shared = make_controller(shared=False), make_controller(shared=True)
    assert len(own.heads) == len(own.embeddings) == 3  # skips have none
    assert len(shared.heads) == len(shared.embeddings) == 2


def make_step(controller: Controller) -> Callable[[Tensor], Tensor]:
    """The LSTM, run by hand from its beginning."""
    zero = torch.zeros(1, 5, dtype=torch.float64)
    state = [(zero, zero) for _ in controller.cells]

    def step(x: Tensor) -> Tensor:
        for index, cell in enumerate(controller.cells):
            state[index] = cell(x, state[index])
            x = state[index][0]
        return x

    return step


def test_skips_are_decided_by_attention() -> None:
    """By the formula of ENAS."""
    controller = make_controller(GENES[:3])
    step = make_step(controller)
    first = step(controller.start)
    step(controller.embeddings[0](torch.tensor([1])))
    current = step(controller.embeddings[0](torch.tensor([0])))
    previous, current = first @ controller.previous.weight.T, current @ controller.current.weight.T
    hidden = torch.tanh(previous + current)
    q = (hidden @ controller.vector.weight.T).item()
    q = 1.5 * math.tanh(q / 2.0)
    p_join = 1 / (1 + math.exp(-2 * q))
    genes = {"a": "y", "b": "x", "b_reads_a": "join"}
    joined = controller(genes=genes)
    cut = controller(genes={**genes, "b_reads_a": "cut"})
    found = (joined.log_prob - cut.log_prob).item()
    assert found == pytest.approx(math.log(p_join / (1 - p_join)))
    divergence = p_join * math.log(p_join / 0.4) + (1 - p_join) * math.log((1 - p_join) / 0.6)
    assert joined.skip_kl.item() == pytest.approx(divergence)


def test_divergences_are_summed_over_a_layer_and_averaged_over_layers() -> None:
    """A layer of one skip, and one of two."""
    controller = make_controller()
    whole = {"a": "y", "b": "x", "b_reads_a": "join", "c": "q", "c_reads_a": "cut"}
    changes = {"b_reads_a": "cut"}, {"c_reads_a": "join"}, {"c_reads_b": "cut"}
    whole["c_reads_b"] = "join"
    found = controller(genes=whole)

    def p_join(change: Mapping[str, str]) -> float:
        """With all before it as they are; what comes after it differs, and is left out."""
        (name,) = change
        upto = list(whole).index(name) + 1
        probabilities = {"join": 0.0, "cut": 0.0}
        for genes in every(GENES):
            if list(genes.items())[: upto - 1] == list(whole.items())[: upto - 1]:
                probabilities[genes[name]] += controller(genes=genes).log_prob.exp().item()
        return probabilities["join"] / sum(probabilities.values())

    first, *second = (
        p * math.log(p / 0.4) + (1 - p) * math.log((1 - p) / 0.6) for p in map(p_join, changes)
    )
    assert found.skip_kl.item() == pytest.approx((first + sum(second)) / 2)


def test_after_skips_comes_the_sum_of_what_is_read_over_one_more() -> None:
    controller = make_controller(GENES[:4], {"b_reads_a": "a"})
    for option in ("join", "cut"):
        step = make_step(controller)
        first = step(controller.start)
        step(controller.embeddings[0](torch.tensor([0])))
        step(controller.embeddings[0](torch.tensor([0])))
        last = step(first / 2 if option == "join" else torch.zeros_like(first))
        expected = torch.log_softmax(SQUASH(controller.heads[1](last)[0]), dim=0)
        genes = {"a": "x", "b": "x", "b_reads_a": option}
        p, q = (controller(genes={**genes, "c": c}).log_prob for c in ("p", "q"))
        assert (p - q).item() == pytest.approx((expected[0] - expected[1]).item())


def reward_of(genes: Mapping[str, str]) -> float:
    return (sum(map(ord, "".join(genes.values()))) % 7) / 7


def test_the_gradient_is_that_of_the_expected_reward() -> None:
    """Weighted by their probabilities, the gradients of all draws are those of the sum
    of R(a) p(a), by finite differences, whatever the baseline."""
    controller = make_controller()
    strategy = make_strategy()

    def expected() -> float:
        with torch.no_grad():
            return sum(
                controller(genes=genes).log_prob.exp().item() * reward_of(genes)
                for genes in every(GENES)
            )

    baselines, parameters = (0.0, 0.4), list(controller.parameters())
    totals = dict.fromkeys(baselines, torch.zeros(()))
    for genes in every(GENES):
        drawn = controller(genes=genes)
        weight = drawn.log_prob.detach().exp()
        for baseline in baselines:
            loss = strategy.loss([drawn], [reward_of(genes)], baseline)
            totals[baseline] = totals[baseline] + weight * loss
    gradients = [
        torch.autograd.grad(totals[baseline], parameters, retain_graph=True)
        for baseline in baselines
    ]
    eps = 1e-6
    generator = torch.Generator().manual_seed(2)
    for parameter, *own in zip(parameters, *gradients, strict=True):
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        slopes = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter += sign * eps * direction
            slopes.append(sign * expected())
            with torch.no_grad():
                parameter -= sign * eps * direction
        for gradient in own:
            found = -(gradient * direction).sum().item()
            assert found == pytest.approx(sum(slopes) / (2 * eps), rel=1e-4, abs=1e-8)


def test_the_loss_has_entropy_and_divergence_by_their_weights() -> None:
    controller = make_controller()
    drawn = [controller(genes=genes) for genes in itertools.islice(every(GENES), 2)]
    plain = make_strategy().loss(drawn, [0.5, 0.2], 0.1)
    whole = make_strategy(entropy_weight=0.3, skip_weight=0.7).loss(drawn, [0.5, 0.2], 0.1)
    entropy = sum(one.entropy.item() for one in drawn) / 2
    divergence = sum(one.skip_kl.item() for one in drawn) / 2
    assert (whole - plain).item() == pytest.approx(-0.3 * entropy + 0.7 * divergence)


def test_expected_entropies_of_the_steps_make_that_of_all_sequences() -> None:
    controller = make_controller()
    found = [controller(genes=genes) for genes in every(GENES)]
    log_p = [one.log_prob.item() for one in found]
    expected = -sum(math.exp(x) * x for x in log_p)
    total = sum(math.exp(x) * one.entropy.item() for x, one in zip(log_p, found, strict=True))
    assert total == pytest.approx(expected)


def test_entropy_is_that_of_the_distributions() -> None:
    genes = (Choice("a", ("x", "y", "z")),)
    controller = make_controller(genes, {})
    p = [controller(genes={"a": option}).log_prob.exp().item() for option in "xyz"]
    expected = -sum(x * math.log(x) for x in p)
    assert controller(genes={"a": "x"}).entropy.item() == pytest.approx(expected)


class OneBest(Estimator):
    """The share of edges that are as in one cell."""

    judge = "agreement with one cell"

    def prepare(self, problem: Any, run: Any, saved: Any) -> None:
        names = ["nor_conv_3x3", "skip_connect", "avg_pool_3x3", "nor_conv_1x1", "none"]
        self.best = {c.name: names[i % 5] for i, c in enumerate(problem.space.choices)}

    def estimate(self, architecture: Any) -> Estimate:
        right = sum(self.best[name] == option for name, option in architecture)
        return Estimate(100 * right / 6, 1 - right / 6)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.slow
def test_it_finds_the_one_best_sequence(
    seed: int, make_tried: Any, make_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "MAX_REPEATS", 20)  # once it has converged, nothing is new
    space = NasBench201(in_chans=1, img_size=8, widths=[2, 4], num_cells=1)
    problem = make_tried(estimator=OneBest(), space=space, share=1.0, seed=seed)
    strategy = make_strategy(num_evaluations=600, batch=8, entropy_weight=0.02)
    answer = strategy.search(problem, make_run())
    best = answer.best(None)
    assert answer.judged(best)[0] == 100
    records = sorted(answer.ranked, key=lambda record: record["candidate"])
    late = [record["accuracy"] for record in records[-50:]]
    assert sum(late) / 50 > 1.5 * sum(record["accuracy"] for record in records[:50]) / 50


def test_what_is_not_feasible_has_no_reward_and_is_learned_to_be_avoided(
    make_tried: Any, make_run: Any
) -> None:
    """The cells that hold a pool are forbidden; the controller comes to draw few of them."""
    space = NasBench201(in_chans=1, img_size=8, widths=[2, 4], num_cells=1)
    space.exclude(["*=avg_pool_3x3"])
    problem = make_tried(estimator=OneBest(), space=space, share=1.0)
    strategy = make_strategy(num_evaluations=100)
    shares = []
    decode = space.decode

    def spy(genes: Mapping[str, str]) -> Any:
        shares.append("avg_pool_3x3" in genes.values())
        return decode(genes)

    space.decode = spy  # type: ignore[method-assign]
    strategy.search(problem, make_run())
    half = len(shares) // 2
    assert sum(shares[half:]) < 0.7 * sum(shares[:half])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "strategy.batch must be 1 or more; got 0"),
        ({"baseline_decay": 1.0}, "strategy.baseline_decay must be between 0 and 1; got 1.0"),
        ({"skip_rate": 0.0}, "strategy.skip_rate must be between 0 and 1; got 0.0"),
        ({"temperature": 0.0}, "strategy.temperature must be above 0; got 0.0"),
        ({"tanh_constant": -1.0}, "strategy.tanh_constant must be above 0; got -1.0"),
        ({"power": -1.0}, "strategy.power must be above 0; got -1.0"),
        ({"skip_weight": -0.1}, "strategy.skip_weight must be 0 or more; got -0.1"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_strategy(**changes)


def test_nothing_is_worth_less_than_what_is_infeasible() -> None:
    """Objectives that rank by a loss give negative rewards."""
    space = NasBench201(in_chans=1, img_size=8)
    policy, other = (make_strategy().policy(space, torch.Generator()) for _ in range(2))

    def update(policy: Policy, *worth: float | None) -> list[float]:
        return policy.update([policy.draw() for _ in worth], worth)

    assert update(policy, None, 0.2, 0.3) == [0.0, 0.2, 0.3]
    assert update(policy, -0.02, None, -0.03) == [-0.02, -0.03, -0.03]
    assert update(policy, None, None) == [-0.03, -0.03]
    other.load_state_dict(policy.state_dict())
    assert update(other, None, 0.1) == [-0.03, 0.1]


def test_the_baseline_is_a_moving_average_that_begins_with_the_first_rewards() -> None:
    policy = make_strategy().policy(NasBench201(in_chans=1, img_size=8), torch.Generator())
    found = []
    for worth in ([0.2, 0.4], [0.6], [0.0, 1.0]):
        policy.update([policy.draw() for _ in worth], worth)
        found.append(policy.baseline)
    assert found == pytest.approx([0.3, 0.9 * 0.3 + 0.1 * 0.6, 0.9 * 0.33 + 0.1 * 0.5])


def test_an_update_follows_its_own_draws_alone() -> None:
    """Where they are worth what was expected, nothing moves, whatever there was before."""
    descent = {"opt": "momentum", "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    policy = make_strategy(optimizer=descent).policy(NasBench201(in_chans=1), torch.Generator())
    states = [copy.deepcopy(policy.controller.state_dict())]
    for worth in ([0.2, 0.4], [0.3, 0.3]):
        policy.update([policy.draw() for _ in worth], worth)
        states.append(copy.deepcopy(policy.controller.state_dict()))
    moved = [
        any(not torch.equal(value, after[name]) for name, value in before.items())
        for before, after in itertools.pairwise(states)
    ]
    assert moved == [True, False]


def test_the_controller_is_told_of_each_draw_and_gives_up_where_none_in_a_row_is_feasible(
    make_tried: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second draw is infeasible; then all are."""
    monkeypatch.setattr(reinforce, "MAX_REPEATS", 6)
    told: list[list[float | None]] = []

    def update(self: Policy, drawn: Any, worth: list[float | None]) -> None:
        told.append(worth)
        self.baseline = 0.3

    monkeypatch.setattr(Policy, "update", update)
    left = iter([True, False] * 20 + [False] * 40)
    monkeypatch.setattr(Problem, "is_feasible", lambda *_: next(left))
    space = NasBench201(in_chans=1, img_size=8, widths=[2, 4], num_cells=1)
    problem = make_tried(estimator=OneBest(), space=space, share=1.0)
    proposals = make_strategy(batch=4).propose(problem, torch.Generator())
    wanted, count = next(proposals), 0
    with suppress(StopIteration):
        while True:
            count += 1
            wanted = proposals.send([Trial(a, 50.0, 50.0) for a in wanted])
    assert count == 10 and told[:10] == [[0.5, None, 0.5, None]] * 10
    assert told[10:] == [[None] * 4] * 2  # eight draws


def test_rewards_are_shares_of_accuracy() -> None:
    assert make_strategy(power=3.0).reward(90.0) == pytest.approx(0.729)
    assert make_strategy(power=3.0).reward(-2.0) == pytest.approx(-0.02)
