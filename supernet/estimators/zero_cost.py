"""What an untrained network says of an architecture: one number from one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from latency.sites import trace_architecture
from supernet.choice import Architecture
from supernet.data import Loader
from supernet.estimators.base import Estimate, Estimator
from supernet.network import Network
from supernet.recipe import seeded
from supernet.space import SearchSpace
from supernet.strategies.base import Problem, Run

LEAST = math.log(math.ulp(0.0))  # in place of log 0: that of the least number above 0


def synflow(network: Network, images: Tensor, labels: Tensor) -> float:
    """log of sum |w * dR/dw|, R the output for ones with all weights made positive (Tanaka et al.
    2020; as a score, Abdelfattah et al. 2021, section 3). In float64; batch norms are left out,
    since their statistics hide the weights' size."""
    network = network.double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.abs_()
    handles = [
        module.register_forward_hook(lambda _, args, output: args[0])
        for module in network.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
    ]
    try:
        network.zero_grad()
        network(torch.ones_like(images[:1], dtype=torch.float64)).sum().backward()
    finally:
        for handle in handles:
            handle.remove()
    total = math.fsum(
        float((p.detach() * p.grad).abs().sum()) for p in network.parameters() if p.grad is not None
    )
    return math.log(total) if total > 0 else -math.inf


def grad_norm(network: Network, images: Tensor, labels: Tensor) -> float:
    """Norm of the loss's gradient, all weights together (Abdelfattah et al. 2021, section 3)."""
    network.train().zero_grad()
    cross_entropy(network(images), labels).backward()
    squares = (p.grad.double().pow(2).sum() for p in network.parameters() if p.grad is not None)
    return math.sqrt(math.fsum(float(square) for square in squares))


@torch.no_grad()
def naswot(network: Network, images: Tensor, labels: Tensor) -> float:
    """log |det K|, where K counts for two images the ReLUs that both switch alike (Mellor et al.
    2021, section 3)."""
    kernel = torch.zeros(len(images), len(images), dtype=torch.float64, device=images.device)

    def add(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        on = (output.flatten(1) > 0).double()
        kernel.add_(on @ on.T + (1 - on) @ (1 - on).T)

    kinds = (nn.ReLU, nn.ReLU6)
    handles = [m.register_forward_hook(add) for m in network.modules() if isinstance(m, kinds)]
    if not handles:
        raise ValueError(
            "estimator.proxy=naswot counts ReLUs, and this network has none: choose synflow, "
            "grad_norm, params or macs"
        )
    try:
        network.train()
        network(images)
    finally:
        for handle in handles:
            handle.remove()
    return float(torch.linalg.slogdet(kernel).logabsdet)


PROXIES: Mapping[str, Callable[[Network, Tensor, Tensor], float]] = {
    "synflow": synflow,
    "naswot": naswot,
    "grad_norm": grad_norm,
}
COUNTS = ("params", "macs")


class ZeroCost(Estimator):
    """Scores architectures without training them.

    Networks start from weights drawn from one seed and see the same images of the weight half. A
    score stands where an accuracy would: it orders architectures and means nothing else.

    Args:
        proxy: synflow, naswot, grad_norm, or a count: params or macs.
        batch_size: images.
    """

    judge, unit, judges_parts = "a score of the untrained network", "", True

    def __init__(self, *, proxy: str, batch_size: int) -> None:
        if proxy not in (*PROXIES, *COUNTS):
            raise ValueError(
                f"estimator.proxy={proxy!r} is unknown; valid: {', '.join([*PROXIES, *COUNTS])}"
            )
        if batch_size < 2:
            raise ValueError(f"estimator.batch_size must be 2 or more; got {batch_size}")
        self.proxy, self.batch_size = proxy, batch_size

    def prepare(self, problem: Problem, run: Run, saved: Mapping[str, Any] | None) -> None:
        self.problem = problem
        half, _ = problem.data.search_splits(problem.seed)
        device = problem.accelerator.device
        loader = Loader(
            half, batch_size=self.batch_size, seed=problem.seed, train=True, augment=False,
            device=device,
        )  # fmt: skip
        self.images, self.labels = loader.batch(0, 0)

    def estimate(self, architecture: Architecture) -> Estimate:
        problem = self.problem
        space, classes = SearchSpace.of(architecture), problem.data.info.num_classes
        with seeded(problem.seed):
            if self.proxy in COUNTS:
                shape = (1, *self.images.shape[1:])
                sites = trace_architecture(space, architecture, classes, shape)
                return self._of(float(sum(getattr(site, self.proxy) for site in sites)))
            network = space.build_network(architecture, classes)
        network.to(self.images.device)
        return self._of(PROXIES[self.proxy](network, self.images, self.labels))

    def _of(self, score: float) -> Estimate:
        score = score if math.isfinite(score) else LEAST  # where no signal goes through
        return Estimate(score, -score)
