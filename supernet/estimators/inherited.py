"""An architecture's accuracy with the weights it inherits from a supernet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import islice

from torch import Tensor

from supernet.choice import Architecture
from supernet.data import Loader
from supernet.data.sources import Batch
from supernet.engine import kept_buffers
from supernet.evaluate import evaluate, recalibrate_bn
from supernet.inherit import inherit_weights
from supernet.mixed_ops.base import PathWeights, one_hot
from supernet.network import Network
from supernet.strategies.base import Problem


class Inherited:
    """Judges architectures by a trained supernet's weights.

    Each is built as its own network, inherits the weights, has its batch norms recalibrated on
    the weight half and is evaluated on the architecture half. Where it cannot inherit them, the
    supernet itself is judged with the one-hot weights of the architecture. Every process sees the
    same images, so all reach the same numbers.

    Args:
        problem: its supernet is trained.
        batch_size: images a batch.
        bn_batches: batches of the weight half for the running statistics.
        inputs: what the inputs of nodes weigh (`Answer.inputs`), of a supernet that is judged.
        num_images: of the architecture half that judge, in whole batches; None for all.
    """

    def __init__(
        self,
        problem: Problem,
        batch_size: int,
        bn_batches: int,
        inputs: Mapping[str, Tensor] | None = None,
        num_images: int | None = None,
    ) -> None:
        self.problem, self.bn_batches = problem, bn_batches
        self.inputs = {n: PathWeights(tuple(range(len(v))), v) for n, v in (inputs or {}).items()}
        weight_half, arch_half = problem.data.search_splits(problem.seed)
        device = problem.accelerator.device
        self.weight_loader = Loader(
            weight_half, batch_size=batch_size, seed=problem.seed, train=True, device=device
        )
        # A part of the half is taken in an order of its own: the half may be sorted by class.
        part = num_images is not None
        self.arch_loader = Loader(
            arch_half, batch_size=batch_size, seed=problem.seed, train=part, augment=False,
            drop_last=False, device=device,
        )  # fmt: skip
        self.num_judges = len(self.arch_loader)
        if num_images is not None:
            self.num_judges = min(self.num_judges, math.ceil(num_images / batch_size))

    def network(self, architecture: Architecture) -> Network:
        """The derived network with inherited weights and fresh running statistics."""
        problem = self.problem
        network = problem.space.build_network(architecture, problem.data.info.num_classes)
        network.to(problem.accelerator.device)
        inherit_weights(problem.supernet, network, dict(architecture))
        recalibrate_bn(network, self._batches())
        return network

    def accuracy(self, architecture: Architecture) -> tuple[float, float]:
        """(accuracy in percent, loss) on the architecture half."""
        if self.problem.relaxation.inheritable:
            return evaluate(self.network(architecture), self._judges())
        supernet = self.problem.supernet
        weights = {**self.inputs, **one_hot(architecture, self.problem.space.choices)}
        with kept_buffers(supernet):
            recalibrate_bn(supernet, self._batches(), weights)
            return evaluate(supernet, self._judges(), weights=weights)

    def _judges(self) -> Iterator[Batch]:
        return islice(iter(self.arch_loader), self.num_judges)

    def _batches(self) -> Iterator[Batch]:
        """Of the weight half, for running statistics."""
        count = min(self.bn_batches, len(self.weight_loader))
        return (self.weight_loader.batch(0, i) for i in range(count))
