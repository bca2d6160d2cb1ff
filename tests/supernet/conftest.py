from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn


@pytest.fixture
def unsettle() -> Callable[[nn.Module], nn.Module]:
    """Give every batch norm statistics, scale and shift as after training, none of them trivial."""

    def randomize(network: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(1)
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2.0, generator=generator)
                if module.affine:
                    module.weight.data.uniform_(0.5, 1.5, generator=generator)
                    module.bias.data.normal_(0, 0.3, generator=generator)
        return network

    return randomize
