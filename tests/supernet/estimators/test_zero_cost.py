from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from supernet.data.digits import Digits
from supernet.engine import make_accelerator
from supernet.estimators import zero_cost
from supernet.estimators.zero_cost import ZeroCost, grad_norm, naswot, synflow
from supernet.mixed_ops.softmax import Softmax
from supernet.objective import TaskOnly
from supernet.spaces.nasbench201 import NasBench201
from supernet.strategies.base import Problem, Run

SPACE = NasBench201(in_chans=1, img_size=8, widths=[4, 8], num_cells=1)


def make_network(bias: bool = False) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, bias=bias), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
        nn.Linear(108, 5, bias=bias), nn.ReLU(), nn.Linear(5, 4, bias=bias),
    )  # fmt: skip


def images(number: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(number, 1, 8, 8, generator=generator)
    return x, torch.arange(number) % 4


def test_synflow_of_a_chain_is_its_output_once_a_layer() -> None:
    """Without biases, each layer's weights carry all of the output: sum w dR/dw = R."""
    network = make_network()
    x = torch.ones(1, 1, 8, 8, dtype=torch.float64)
    for layer in network:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            weight = layer.weight.detach().double().abs()
            x = nn.functional.conv2d(x, weight) if weight.ndim == 4 else x @ weight.T
        elif isinstance(layer, nn.Flatten):
            x = x.flatten(1)
    assert synflow(network, *images()) == pytest.approx(math.log(3 * x.sum().item()))


def test_naswot_counts_what_switches_alike() -> None:
    network = make_network()
    x, labels = images()
    codes = torch.cat([network[:3](x).flatten(1) > 0, network[:6](x) > 0], dim=1)
    kernel = torch.tensor([[float((a == b).sum()) for b in codes] for a in codes])
    expected = math.log(abs(float(torch.det(kernel.double()))))
    assert naswot(network, x, labels) == pytest.approx(expected, rel=1e-6)


def test_the_norm_of_the_gradient() -> None:
    network = make_network(bias=True)
    x, labels = images()
    loss = cross_entropy(network(x), labels)
    grads = torch.autograd.grad(loss, list(network.parameters()))
    expected = torch.cat([g.flatten() for g in grads]).norm().item()
    assert grad_norm(network, x, labels) == pytest.approx(expected, rel=1e-5)


def prepared(proxy: str, seed: int = 0) -> ZeroCost:
    problem = Problem(
        SPACE, SPACE.build_supernet(10), Softmax(), TaskOnly(cost="params"), None,  # type: ignore[arg-type]
        Digits(img_size=8, pad=1, train_limit=60), make_accelerator("no", "cpu"), seed,
    )  # fmt: skip
    estimator = ZeroCost(proxy=proxy, batch_size=12)
    estimator.prepare(problem, Run.unwritten(), None)
    return estimator


@pytest.mark.parametrize("proxy", ["synflow", "naswot", "grad_norm", "params", "macs"])
def test_a_score_depends_on_architecture_and_seed_alone(proxy: str) -> None:
    small = SPACE.from_string("|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|")
    large = SPACE.from_string(
        "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|nor_conv_3x3~0|nor_conv_3x3~1|nor_conv_3x3~2|"
    )
    one, other = prepared(proxy), prepared(proxy)
    torch.rand(3)  # what was drawn before does not matter
    before = torch.get_rng_state()
    scores = [one.estimate(a).accuracy for a in (small, large, small)]
    assert torch.equal(torch.get_rng_state(), before)
    assert scores[0] == scores[2] == other.estimate(small).accuracy
    assert one.estimate(large).loss == -scores[1] and all(map(math.isfinite, scores))
    if proxy != "grad_norm":
        assert scores[1] > scores[0]
    if proxy == "params":
        network = SPACE.build_network(large, 10)
        assert scores[1] == sum(p.numel() for p in network.parameters())
    elif proxy != "macs":
        assert prepared(proxy, seed=1).estimate(large).accuracy != scores[1]


def test_unknown_proxies_are_refused() -> None:
    with pytest.raises(ValueError, match="proxy='jacob' is unknown; valid: synflow, naswot, grad_"):
        ZeroCost(proxy="jacob", batch_size=4)
    with pytest.raises(ValueError, match="batch_size must be 2 or more; got 1"):
        ZeroCost(proxy="naswot", batch_size=1)


def test_networks_without_any_flow_come_last() -> None:
    network = make_network()
    nn.init.zeros_(network[4].weight)
    assert synflow(network, *images()) == -math.inf


def test_scores_are_finite_numbers_whatever_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON and controllers know no others."""
    estimator, cell = prepared("synflow"), SPACE.sample(torch.Generator().manual_seed(0))
    for score in (-math.inf, math.inf, math.nan):
        monkeypatch.setitem(zero_cost.PROXIES, "synflow", lambda *_, score=score: score)
        found = estimator.estimate(cell)
        assert found.accuracy == -found.loss == pytest.approx(-744.44, abs=0.01)


def test_a_network_without_relus_has_none_to_count() -> None:
    with pytest.raises(ValueError, match="counts ReLUs, and this network has none: choose synflow"):
        naswot(nn.Sequential(nn.Flatten(), nn.SiLU()), *images())  # type: ignore[arg-type]
