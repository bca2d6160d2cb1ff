import math

import pytest
import torch

from supernet.choice import Choice
from supernet.mixed_ops.base import MixedOp
from supernet.mixed_ops.binary_gate import BinaryGate

START = [0.4, -0.7, 1.1, 0.2]


def make_logits() -> dict[str, torch.Tensor]:
    return {"a": torch.tensor(START, dtype=torch.float64, requires_grad=True)}


def probabilities(values: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


def test_weight_step_samples_one_path_by_probability() -> None:
    generator, draws = torch.Generator().manual_seed(0), 6000
    counts = [0] * 4
    for _ in range(draws):
        path = BinaryGate().for_weight_step(make_logits(), generator, 0.0)["a"]
        assert path.values is None and len(path.active) == 1
        counts[path.active[0]] += 1
    for count, p in zip(counts, probabilities(START), strict=True):
        assert count / draws == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / draws))


def test_pairs_are_drawn_without_replacement_and_one_is_active() -> None:
    """P(i then j) = p_i p_j / (1 - p_i); active with its renormalised probability."""
    generator, draws = torch.Generator().manual_seed(0), 6000
    p = probabilities(START)
    pairs: dict[tuple[int, int], int] = {}
    surprise = 0.0
    for _ in range(draws):
        path = BinaryGate().for_architecture_step(make_logits(), generator, 0.5).weights["a"]
        assert path.values is not None and sorted(path.values.tolist()) == [0.0, 1.0]
        i, j = path.active
        assert i != j
        pairs[i, j] = pairs.get((i, j), 0) + 1
        surprise += path.values[0].item() - p[i] / (p[i] + p[j])
    for (i, j), count in pairs.items():
        q = p[i] * p[j] / (1 - p[i])
        assert count / draws == pytest.approx(q, abs=4.5 * math.sqrt(q / draws)), (i, j)
    assert len(pairs) == 12
    assert abs(surprise) / draws < 4 * 0.5 / math.sqrt(draws)


@pytest.mark.parametrize("seed", range(8))
def test_gradient_is_the_closed_form(seed: int) -> None:
    """dL/da_i = sum_j <dL/dy, o_j(x)> p_j (delta_ij - p_i), p renormalised over the pair; the
    other logits get none."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(3, 3).double() for _ in range(4)]
    choice = Choice("a", ("w", "x", "y", "z"))
    op = MixedOp(choice, {n: lambda m=m: m for n, m in zip(choice.options, layers, strict=True)})
    logits, x = make_logits(), torch.randn(5, 3, dtype=torch.float64)
    sample = BinaryGate().for_architecture_step(logits, torch.Generator().manual_seed(seed), 0.5)
    y = op(x, sample.weights)
    y.retain_grad()
    loss = (y**3).sum()
    loss.backward()

    path = sample.weights["a"]
    assert path.values is not None and y.grad is not None and logits["a"].grad is not None
    active = path.active[int(path.values.argmax())]
    torch.testing.assert_close(y, layers[active](x))
    pair = list(path.active)
    p = probabilities([START[k] for k in pair])
    upstream = [(3 * layers[active](x) ** 2 * layers[k](x)).sum().item() for k in pair]
    expected = [0.0] * 4
    for i in range(2):
        expected[pair[i]] = sum(
            upstream[j] * p[j] * ((1.0 if i == j else 0.0) - p[i]) for j in range(2)
        )
    torch.testing.assert_close(logits["a"].grad.tolist(), expected)


def test_cost_term_keeps_the_mass_of_the_pair_and_sees_the_full_expectation() -> None:
    logits, costs = make_logits(), [3.0, 1.0, 7.0, 4.0]
    sample = BinaryGate().for_architecture_step(logits, torch.Generator().manual_seed(3), 0.5)
    expected_cost = (sample.cost_weights["a"] * torch.tensor(costs, dtype=torch.float64)).sum()
    p = probabilities(START)
    assert float(expected_cost.detach()) == pytest.approx(
        sum(a * b for a, b in zip(p, costs, strict=True)), abs=1e-12
    )
    (gradient,) = torch.autograd.grad(expected_cost, logits["a"])
    i, j = sample.weights["a"].active
    mass, share = p[i] + p[j], p[i] / (p[i] + p[j])
    slope = mass * share * (1 - share) * (costs[i] - costs[j])  # of mass (s c_i + (1-s) c_j)
    expected = [0.0] * 4
    expected[i], expected[j] = slope, -slope
    torch.testing.assert_close(gradient.tolist(), expected)


@pytest.mark.parametrize("seed", range(5))
def test_a_whole_step_leaves_the_other_probabilities_unchanged(seed: int) -> None:
    relaxation, logits = BinaryGate(), make_logits()
    optimizer = torch.optim.Adam([logits["a"]], lr=0.1, betas=(0.0, 0.999))
    relaxation.check_optimizer(optimizer)
    generator = torch.Generator().manual_seed(seed)
    costs = torch.tensor([3.0, 1.0, 7.0, 4.0], dtype=torch.float64)
    for _ in range(20):
        before = probabilities(logits["a"].tolist())
        sample = relaxation.for_architecture_step(logits, generator, 0.5)
        path = sample.weights["a"]
        assert path.values is not None
        outputs = torch.tensor([1.5, -2.0], dtype=torch.float64)
        loss = (path.values * outputs).sum() ** 2 + 0.5 * (sample.cost_weights["a"] @ costs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        relaxation.after_step(logits, sample)
        after = probabilities(logits["a"].tolist())
        for k in range(4):
            if k in path.active:
                assert abs(after[k] - before[k]) > 1e-6
            else:
                assert abs(after[k] - before[k]) < 1e-12


def test_a_single_option_is_run_as_it_is() -> None:
    logits = {"a": torch.zeros(1, requires_grad=True)}
    sample = BinaryGate().for_architecture_step(logits, torch.Generator(), 0.5)
    assert sample.weights["a"].active == (0,)
    BinaryGate().after_step(logits, sample)
    assert logits["a"].tolist() == [0.0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.Adam(p, betas=(0.5, 0.999)), r"betas=\(0.5, 0.999\)"),
        (lambda p: torch.optim.Adam(p, betas=(0.0, 0.999), weight_decay=1e-3), "weight_decay=0"),
        (lambda p: torch.optim.AdamW(p, betas=(0.0, 0.999)), "weight_decay=0.01"),
        (lambda p: torch.optim.SGD(p, lr=0.1), "makes a SGD"),
    ],
)
def test_refuses_an_optimizer_under_which_the_shift_is_not_exact(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        BinaryGate().check_optimizer(make([torch.zeros(2, requires_grad=True)]))
