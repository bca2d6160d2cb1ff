from __future__ import annotations

import torch
from torch import nn

from supernet.evaluate import recalibrate_bn
from supernet.ops.sliced import Sliced


def test_a_narrow_layer_is_recalibrated_to_the_plain_average_of_the_batches() -> None:
    sliced = Sliced(lambda _, out_chs: nn.Sequential(nn.BatchNorm2d(out_chs)), 4, 4)
    batches = [torch.randn(5, 2, 3, 3) * n + n for n in (1, 2, 4)]

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = sliced

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x, 2)

    recalibrate_bn(Network(), [(x, torch.zeros(5)) for x in batches])
    state = sliced.state_of(2, 2)
    for name, of in (("mean", torch.mean), ("var", torch.var)):
        expected = sum(of(x, dim=(0, 2, 3)) for x in batches) / 3
        torch.testing.assert_close(state[f"0.running_{name}"], expected)
