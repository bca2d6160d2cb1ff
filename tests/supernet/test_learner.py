"""What cells with an auxiliary classifier and paths to drop add to a training step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from supernet.engine import make_accelerator
from supernet.learner import Learner
from supernet.network import Network, WithAuxiliary
from supernet.recipe import Recipe
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.nasbench201 import NasBench201

SPACE = Darts(in_chans=1, width=4, num_cells=3, img_size=8)
PLAIN = NasBench201(in_chans=1, widths=(4,), num_cells=1, img_size=8)
STILL = {"opt": "sgd", "lr": 0.0}


def make_network(space: SearchSpace = SPACE) -> Network:
    torch.manual_seed(0)
    return space.build_network(space.sample(torch.Generator().manual_seed(1)), 10)


def make_learner(network: Network, **settings: Any) -> Learner:
    recipe = Recipe(4, 16, **settings)
    return Learner(network.train(), recipe, 2, make_accelerator("no", "cpu"), seed=3)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(10, (16,), generator=generator)
    return torch.randn(16, 1, 8, 8, generator=generator), labels


def test_the_auxiliary_loss_is_weighed_and_added() -> None:
    learner = make_learner(make_network(), aux_weight=0.4, optimizer=STILL)
    images, labels = batch()
    outputs, others = learner._wrapped(images)  # batch norms use the batch: as in the step
    expected = cross_entropy(outputs, labels) + 0.4 * cross_entropy(others, labels)
    assert torch.equal(outputs, learner.network(images))
    learner.take_step(images, labels)
    loss, _ = learner.meter.read(learner.accelerator)
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_the_auxiliary_classifier_is_trained_but_no_part_of_the_network() -> None:
    network = make_network()
    names = set(network.state_dict())
    learner = make_learner(network, aux_weight=0.4, optimizer={"opt": "sgd", "lr": 0.1})
    assert isinstance(learner._wrapped, WithAuxiliary)
    before = [p.detach().clone() for p in learner._wrapped.head.parameters()]
    learner.take_step(*batch())
    after = learner._wrapped.head.parameters()
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert set(learner.network.state_dict()) == names
    assert network.eval()(batch()[0]).shape == (16, 10)


def test_a_training_goes_on_from_its_state() -> None:
    settings = {"aux_weight": 0.4, "drop_path": 0.5, "optimizer": {"opt": "sgd", "lr": 0.1}}
    whole, cut = (make_learner(make_network(), **settings) for _ in range(2))
    for _ in range(4):
        whole.take_step(*batch())
    for _ in range(3):
        cut.take_step(*batch())
    again = make_learner(make_network(), **settings)
    again.load_state_dict(cut.state_dict())
    again.take_step(*batch())
    ours, theirs = again.state_dict(), whole.state_dict()
    for part in ("network", "auxiliary"):
        assert all(torch.equal(ours[part][k], v) for k, v in theirs[part].items())


def test_paths_are_dropped_more_from_epoch_to_epoch() -> None:
    learner = make_learner(make_network(), drop_path=0.2, optimizer=STILL)
    rates = []
    for _ in range(8):
        learner.take_step(*batch())
        rates.append({cell.drop_path_rate for cell in learner.network.blocks})
    assert rates == [{rate} for rate in (0.0, 0.0, 0.05, 0.05, 0.1, 0.1, 0.2 * 3 / 4, 0.2 * 3 / 4)]


def test_a_path_is_dropped_for_whole_images_and_the_rest_scaled() -> None:
    network = make_network()
    cell = network.blocks[0]
    cell.drop_path_rate = 0.25
    x = torch.rand(400, 4, 3, 3) + 1
    y = cell._run(nn.AvgPool2d(1), x, None)
    whole = y.flatten(1)
    kept = (whole > 0).all(1)
    assert (kept | (whole == 0).all(1)).all()
    assert 0.65 < kept.float().mean() < 0.85
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert torch.equal(cell._run(nn.Identity(), x, None), x)
    assert torch.equal(cell.eval()._run(nn.AvgPool2d(1), x, None), x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"aux_weight": 0.4}, "no auxiliary classifier; set recipe.aux_weight=0"),
        ({"drop_path": 0.2}, "no paths that could be dropped; set recipe.drop_path=0"),
        ({"drop_path": 1.0}, "recipe.drop_path is 1.0; it must be from 0 to below 1"),
        ({"aux_weight": -1.0}, "recipe.aux_weight is -1.0; it must be 0 or more"),
    ],
)
def test_what_a_network_has_not_is_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_learner(make_network(PLAIN), **settings)


@pytest.mark.parametrize(
    ("space", "settings"),
    [(SPACE, {"num_cells": 6, "width": 8, "pool_norm": False}), (PLAIN, {"num_cells": 5})],
)
def test_an_architecture_is_resized(space: SearchSpace, settings: dict[str, Any]) -> None:
    architecture = space.sample(torch.Generator().manual_seed(0))
    found = SearchSpace.resized(architecture, settings)
    assert dict(found) == dict(architecture)
    larger = SearchSpace.of(found).build_network(found, 10)
    smaller = space.build_network(architecture, 10)
    assert len(larger.blocks) > len(smaller.blocks)
    with pytest.raises(ValueError, match="refuses the settings: .*'depth'"):
        SearchSpace.resized(architecture, {"depth": 3})
