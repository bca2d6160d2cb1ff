"""PC-DARTS: the partial form against its formula, and what depends on candidates being whole."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supernet.choice import ArchitectureParameters, Choice
from supernet.data.digits import Digits
from supernet.engine import make_accelerator
from supernet.estimators.inherited import Inherited
from supernet.evaluate import evaluate
from supernet.mixed_ops.base import MixedOp, PathWeights, Scalable, one_hot
from supernet.mixed_ops.partial_channels import PartialChannels, PartialOp
from supernet.mixed_ops.softmax import Softmax
from supernet.objective import TaskOnly
from supernet.spaces.darts import Darts
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import Cell, NasBench201
from supernet.strategies.base import Problem

CHOICE = Choice("a", ("conv", "pool"))


def builders(width: int, stride: int) -> dict[str, Any]:
    return {
        "conv": partial(nn.Conv2d, width, width, 3, stride, 1),
        "pool": partial(nn.AvgPool2d, 3, stride, 1),
    }


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_the_partial_form_channel_by_channel(share: int, stride: int) -> None:
    """Channel i of a group of C / K goes to place i K + group (the shuffle of ShuffleNet)."""
    width, few = 8, 8 // share
    candidates = Scalable(lambda w: builders(w, stride), width, stride)
    op = PartialChannels(share, edge_norm=False).build(CHOICE, candidates)
    assert isinstance(op, PartialOp) and op.candidates["conv"].in_channels == few
    x, p = torch.randn(2, width, 6, 6), torch.tensor([0.3, 0.7])
    y = op(x, {"a": PathWeights((0, 1), p)})
    mixed = 0.3 * op.candidates["conv"](x[:, :few]) + 0.7 * op.candidates["pool"](x[:, :few])
    for channel in range(width):
        group, i = divmod(channel, few)
        expected: Tensor = mixed[:, channel] if channel < few else x[:, channel]
        if channel >= few and stride == 2:
            expected = expected.unfold(1, 2, 2).unfold(2, 2, 2).amax(dim=(3, 4))
        torch.testing.assert_close(y[:, i * share + group], expected)


def test_a_share_of_one_is_the_mixture_of_darts() -> None:
    torch.manual_seed(0)
    space = NasBench201(widths=(4, 8), num_cells=1, img_size=8)
    whole = space.build_supernet(3, Softmax().build).eval()
    part = space.build_supernet(3, PartialChannels(1).build).eval()
    part.load_state_dict(whole.state_dict())
    logits = {c.name: torch.randn(5) for c in space.choices}
    weights = Softmax().for_weight_step(logits, torch.Generator(), 0.0)
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(part(x, weights), whole(x, weights), atol=1e-5, rtol=1e-5)


def test_candidates_of_the_supernet_are_narrow_and_cells_not_computed_jointly() -> None:
    space = NasBench201(widths=(8, 16), num_cells=1, img_size=8)
    part = space.build_supernet(3, PartialChannels(4).build)
    whole = space.build_supernet(3)
    for network, narrow in ((part, True), (whole, False)):
        cells = [m for m in network.modules() if isinstance(m, Cell)]
        assert [cell.joint for cell in cells] == [not narrow] * 2
        convs = [m.candidates["nor_conv_3x3"].conv[0] for m in network.modules()
                 if isinstance(m, MixedOp)]  # fmt: skip
        assert [conv.in_channels for conv in convs] == ([2] * 6 + [4] * 6 if narrow
                                                       else [8] * 6 + [16] * 6)  # fmt: skip
    logits = {c.name: torch.zeros(5, requires_grad=True) for c in space.choices}
    sample = PartialChannels(4).for_architecture_step(logits, torch.Generator(), 0.0)
    part(torch.randn(2, 3, 8, 8), sample.weights).square().sum().backward()
    assert all(v.grad is not None and v.grad.abs().max() > 0 for v in logits.values())


def test_positions_that_change_their_width_are_refused() -> None:
    space = MBConv(stem_chs=8, first_chs=8, stages=[(16, 1, 2)], head_chs=32)
    with pytest.raises(ValueError, match="as in space=nasbench201; choice 'stage1_0' is none"):
        space.build_supernet(10, PartialChannels(4).build)
    cells = NasBench201(widths=(4, 6), num_cells=1)
    with pytest.raises(ValueError, match="share=4 does not divide the 6 channels of choice"):
        cells.build_supernet(10, PartialChannels(4).build)
    with pytest.raises(ValueError, match="share must be 1 or more; got 0"):
        PartialChannels(0)
    with pytest.raises(ValueError, match="choice 'a' names none: set mixed_op.edge_norm=false"):
        PartialChannels(4).build(CHOICE, Scalable(lambda w: builders(w, 1), 8))


def test_a_derived_network_is_judged_in_the_partial_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the accuracy of the supernet with one-hot weights; its statistics stay as they are."""
    torch.manual_seed(0)
    data = Digits(img_size=8, pad=1, train_limit=120)
    space = NasBench201(in_chans=1, img_size=8, widths=(4, 8), num_cells=1)
    relaxation = PartialChannels(2)
    supernet = space.build_supernet(10, relaxation.build)
    cost: Any = None
    problem = Problem(
        space, supernet, relaxation, TaskOnly(cost="macs"), cost, data,
        make_accelerator("no", "cpu"), 0,
    )  # fmt: skip
    judge = Inherited(problem, batch_size=30, bn_batches=2)
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    found = [judge.accuracy(space.sample(torch.Generator().manual_seed(s))) for s in range(3)]
    assert all(torch.equal(v, before[k]) for k, v in supernet.state_dict().items())
    assert len(set(found)) == 3
    # by hand, with running statistics that become those of two batches
    architecture = space.sample(torch.Generator().manual_seed(0))
    weights = one_hot(architecture, space.choices)
    norms = [m for m in supernet.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    supernet.train()
    with torch.no_grad():
        for index in range(2):
            supernet(judge.weight_loader.batch(0, index)[0], weights)
    expected = evaluate(supernet.eval(), judge.arch_loader, weights=weights)
    assert found[0] == pytest.approx(expected)


# ---- edge normalisation


def edge(op: PartialOp, x: Tensor, p: Tensor) -> Tensor:
    """f_ij of equation 2, its own channels of x through every candidate."""
    n, width = x.shape[:2]
    few = width // op.share
    mixed = sum(w * o(x[:, :few]) for w, o in zip(p, op.candidates.values(), strict=True))
    if op.share == 1:
        return mixed
    rest = x[:, few:]
    if mixed.shape[2] != x.shape[2]:
        rest = nn.functional.max_pool2d(rest, 2, ceil_mode=True)
    groups = torch.cat([mixed, rest], dim=1).unflatten(1, (op.share, few))
    return groups.transpose(1, 2).flatten(1, 2)


def by_hand(cell: Any, inputs: list[Tensor], logits: dict[str, Tensor]) -> Tensor:
    """Equation 4, node by node; `logits` have the betas of a node under the name of the node."""
    if isinstance(cell, Cell):
        states, last, into = inputs, 3, "into_{}"
    else:
        states = [entry(x) for entry, x in zip(cell.entries, inputs, strict=True)]
        kind = cell.edges["edge_0_2"].choice.name.split("_")[0]
        last, into = 5, kind + "_into_{}"
    for node in range(len(states), last + 1):
        beta = logits[into.format(node)].exp()
        assert len(beta) == node
        total: Tensor = torch.zeros(())
        for source in range(node):
            op = cell.edges[f"edge_{source}_{node}"]
            alpha = logits[op.choice.name].exp()
            f = edge(op, states[source], alpha / alpha.sum())
            total = total + beta[source] / beta.sum() * f
        states = [*states, total]
    return states[-1] if isinstance(cell, Cell) else torch.cat(states[2:], dim=1)


CELLS = {
    "nasbench201": (NasBench201(widths=(4,), num_cells=1, img_size=8), 0, (4,), ""),
    "darts-normal": (Darts(width=4, num_cells=3, img_size=8), 0, (12, 12), "normal"),
    "darts-reduce": (Darts(width=4, num_cells=3, img_size=8), 1, (12, 16), "reduce"),
}


@pytest.mark.parametrize("share", [1, 2])
@pytest.mark.parametrize("name", CELLS)
def test_a_node_is_the_weighed_sum_of_its_inputs(name: str, share: int) -> None:
    """Its value, and the gradients of alphas and betas, which the weights' step has not."""
    torch.manual_seed(0)
    space, index, widths, kind = CELLS[name]
    relaxation, generator = PartialChannels(share), torch.Generator().manual_seed(1)
    cell = space.build_supernet(3, relaxation.build).blocks[index].double()
    choices = (*space.choices, *relaxation.nodes(space.choices))
    logits = ArchitectureParameters(choices, 1.5, generator, torch.float64)()
    inputs = [torch.randn(3, width, 8, 8, dtype=torch.float64) for width in widths]
    sample = relaxation.for_architecture_step(logits, generator, 0.5)
    found, expected = cell(*inputs, sample.weights), by_hand(cell, inputs, logits)
    torch.testing.assert_close(found, expected)
    direction = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    own = {n: vector for n, vector in logits.items() if n.startswith(kind)}
    ours, theirs = (
        torch.autograd.grad((y * direction).sum(), list(own.values())) for y in (found, expected)
    )
    for choice, one, other in zip(own, ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
        only = len(one) == 1  # the only input of a node is all of it
        assert (one.abs().max() > 1e-6) != only, choice
    fixed = relaxation.for_weight_step(logits, generator, 0.5)
    assert not any(path.values is None or path.values.requires_grad for path in fixed.values())
    torch.testing.assert_close(cell(*inputs, fixed), expected.detach())


def test_without_it_there_are_no_betas_and_a_node_is_a_plain_sum() -> None:
    space = NasBench201(widths=(4,), num_cells=1, img_size=8)
    plain, weighed = PartialChannels(2, edge_norm=False), PartialChannels(2)
    assert plain.nodes(space.choices) == () == Softmax().nodes(space.choices)
    assert [node.options for node in weighed.nodes(space.choices)] == [
        ("edge_0_1",), ("edge_0_2", "edge_1_2"), ("edge_0_3", "edge_1_3", "edge_2_3"),
    ]  # fmt: skip
    assert weighed.nodes(MBConv().choices) == ()
    logits = {c.name: torch.randn(5) for c in space.choices}
    torch.manual_seed(0)
    cell = space.build_supernet(3, plain.build).blocks[0]
    weights = plain.for_weight_step(logits, torch.Generator(), 0.0)
    assert set(weights) == set(logits)
    x = torch.randn(2, 4, 8, 8)
    states = [x]
    for node in range(1, 4):
        names = [f"edge_{source}_{node}" for source in range(node)]
        pairs = zip(names, states, strict=True)
        terms = [edge(cell.edges[n], s, logits[n].softmax(0)) for n, s in pairs]
        states.append(torch.stack(terms).sum(dim=0))
    torch.testing.assert_close(cell(x, weights), states[-1])
