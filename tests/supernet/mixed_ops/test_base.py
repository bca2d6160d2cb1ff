import pytest
import torch
from torch import nn

from supernet.choice import Choice
from supernet.mixed_ops.base import MixedOp, PathWeights, one_hot, run_layer
from supernet.spaces.nasbench201 import NasBench201

CHOICE = Choice("a", ("one", "two", "three"))


class Scale(nn.Module):
    """y = factor x, counting its calls."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.factor * x


@pytest.fixture
def op() -> MixedOp:
    builders = {"one": lambda: Scale(1.0), "two": lambda: Scale(2.0), "three": lambda: Scale(3.0)}
    return MixedOp(CHOICE, builders)


def test_sum_of_weighted_candidates(op: MixedOp) -> None:
    x = torch.tensor([1.0, -2.0])
    weights = {"a": PathWeights((0, 1, 2), torch.tensor([0.2, 0.3, 0.5]))}
    torch.testing.assert_close(op(x, weights), (0.2 * 1 + 0.3 * 2 + 0.5 * 3) * x)


def test_without_values_the_survivors_are_added(op: MixedOp) -> None:
    x = torch.tensor([1.0, -2.0])
    assert torch.equal(op(x, {"a": PathWeights((0, 2))}), 4 * x)


def test_only_active_candidates_run(op: MixedOp) -> None:
    op(torch.ones(1), {"a": PathWeights((2,))})
    assert [c.calls for c in op.candidates.values()] == [0, 0, 1]


def test_values_keep_their_gradient_in_float32_under_a_lower_precision(op: MixedOp) -> None:
    values = torch.tensor([0.25, 0.75], requires_grad=True)
    y = op(torch.ones(3, dtype=torch.bfloat16), {"a": PathWeights((0, 1), values)})
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert values.grad is not None and values.grad.dtype == torch.float32
    torch.testing.assert_close(values.grad, torch.tensor([3.0, 6.0]))


def test_run_layer_passes_weights_to_searchable_layers_only(op: MixedOp) -> None:
    x = torch.ones(2)
    assert torch.equal(run_layer(op, x, {"a": PathWeights((1,))}), 2 * x)
    assert torch.equal(run_layer(Scale(5.0), x, {"a": PathWeights((1,))}), 5 * x)


def test_one_hot_names_the_options_of_the_architecture() -> None:
    space = NasBench201()
    architecture = space.sample(torch.Generator().manual_seed(0))
    for choice in space.choices:
        path = one_hot(architecture, space.choices)[choice.name]
        assert path.values is None
        assert [choice.options[i] for i in path.active] == [architecture[choice.name]]
