"""The one network class: stem, blocks, head. A supernet has mixed ops among its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from supernet.mixed_ops.base import MixedOp, Weights, run_layer


@dataclass(frozen=True)
class Block:
    """One entry of a network's trunk, with what timm's `feature_info` needs.

    Attributes:
        module: fixed or searchable layer.
        out_chs: channels of its output.
        stride: of the whole block.
    """

    module: nn.Module
    out_chs: int
    stride: int


class Network(nn.Module):
    """`forward(x)` of a derived network, `forward(x, weights)` of a supernet.

    Args:
        stem: from the image.
        stem_stride: reduction of the stem.
        blocks: the trunk.
        final: what follows the trunk before pooling (a 1x1 convolution, a norm).
        num_features: channels of `final`'s output.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        img_size: side of the image the network declares by default.
    """

    def __init__(
        self,
        *,
        stem: nn.Module,
        stem_stride: int,
        blocks: Sequence[Block],
        final: nn.Module,
        num_features: int,
        num_classes: int,
        in_chans: int,
        img_size: int,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(block.module for block in blocks)
        self.final = final
        self.num_features = self.head_hidden_size = num_features
        self.in_chans = in_chans
        self.img_size = img_size
        self.feature_info = _feature_info(blocks, stem_stride)
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int, global_pool: str = "avg") -> None:
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        width = self.num_features * self.global_pool.feat_mult()
        self.classifier = nn.Linear(width, num_classes) if num_classes > 0 else nn.Identity()

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def forward_features(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_features, H', W')."""
        x = self.stem(x)
        for block in self.blocks:
            x = run_layer(block, x, weights)
        return self.final(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_classes)."""
        return self.forward_head(self.forward_features(x, weights))


def _feature_info(blocks: Sequence[Block], stem_stride: int) -> list[dict[str, Any]]:
    """The last block of every resolution, in timm's form."""
    info: list[dict[str, Any]] = []
    reduction = stem_stride
    for index, block in enumerate(blocks):
        entry = {"num_chs": block.out_chs, "reduction": reduction * block.stride,
                 "module": f"blocks.{index}"}
        if block.stride == 1 and info:
            info[-1] = entry
        else:
            info.append(entry)
        reduction *= block.stride
    return info


@torch.no_grad()
def inherit_weights(supernet: Network, network: Network, choices: dict[str, str]) -> None:
    """Copy the chosen candidates' weights and buffers from a supernet into a derived network.

    Args:
        supernet: with every candidate.
        network: built for the same space and classes.
        choices: {choice: option} of the architecture.

    Raises:
        ValueError: the two networks do not match.
    """
    renames = {
        f"{path}.candidates.{choices[module.choice.name]}.": f"{path}."
        for path, module in supernet.named_modules()
        if isinstance(module, MixedOp)
    }
    state = {}
    for key, value in supernet.state_dict().items():
        prefix = key.split(".candidates.")[0] + ".candidates."
        if prefix in key:
            option = key[len(prefix) :].split(".")[0]
            source = f"{prefix}{option}."
            if source not in renames:
                continue
            key = renames[source] + key[len(source) :]
        state[key] = value
    affine = _affine_keys(network)
    missing, unexpected = network.load_state_dict(state, strict=False)
    missing = [key for key in missing if key not in affine]
    if missing or unexpected:
        raise ValueError(f"the supernet does not hold this network: {missing=} {unexpected=}")


def _affine_keys(network: nn.Module) -> set[str]:
    """Scales and shifts of batch norms, which a supernet may do without (they start at 1 and 0)."""
    return {
        f"{path}.{name}"
        for path, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name in ("weight", "bias")
    }
