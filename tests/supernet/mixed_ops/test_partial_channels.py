"""PC-DARTS: the partial form against its formula, and what depends on candidates being whole."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from supernet.choice import Choice
from supernet.data.digits import Digits
from supernet.engine import make_accelerator
from supernet.estimators.inherited import Inherited
from supernet.evaluate import evaluate
from supernet.mixed_ops.base import MixedOp, PathWeights, Scalable, one_hot
from supernet.mixed_ops.partial_channels import PartialChannels, PartialOp
from supernet.mixed_ops.softmax import Softmax
from supernet.objective import TaskOnly
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
    op = PartialChannels(share).build(CHOICE, candidates)
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
