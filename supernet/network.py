"""The one network class: stem, blocks, head. A supernet has mixed ops among its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from timm.layers import SelectAdaptivePool2d, create_classifier
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from supernet.mixed_ops.base import Searchable, Weights, run_layer


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


@dataclass(frozen=True)
class Auxiliary:
    """A second classifier that a training may add (Szegedy et al. 2015, section 5).

    Attributes:
        after: index of the block whose output it reads.
        build: makes it for a number of classes.
    """

    after: int
    build: Callable[[int], nn.Module]


class Network(nn.Module):
    """`forward(x)` of a derived network, `forward(x, weights)` of a supernet.

    A derived network has the methods timm expects of a model.

    Args:
        stem: from the image.
        stem_stride: reduction of the stem.
        blocks: the trunk.
        final: what follows the trunk before pooling (a 1x1 convolution, a norm).
        num_features: channels of `final`'s output.
        num_classes: outputs of the classifier; 0 for none.
        in_chans: channels of the image.
        img_size: side of the image the network declares by default.
        num_inputs: how many of the last outputs, oldest first, each block reads; the stem's stands
            for those before it.
        auxiliary: the classifier that a training may add half-way.

    Attributes:
        drop_rate: dropout before the classifier, in training.
        grad_checkpointing: recompute each block in the backward pass, to save memory.
    """

    global_pool: SelectAdaptivePool2d
    classifier: nn.Module

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
        num_inputs: int = 1,
        auxiliary: Auxiliary | None = None,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.blocks = nn.ModuleList(block.module for block in blocks)
        self.final = final
        self.num_features = num_features
        self.in_chans = in_chans
        self.img_size = img_size
        self.num_inputs = num_inputs
        self.auxiliary = auxiliary
        self.drop_rate = 0.0
        self.grad_checkpointing = False
        self.feature_info = _feature_info(blocks, stem_stride)
        self.reset_classifier(num_classes, "avg")

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier (0 classes: none), and another pooling unless `global_pool` is None."""
        if global_pool is None:
            global_pool = self.global_pool.pool_type
        self.num_classes = num_classes
        reference = next(self.parameters())
        self.global_pool, self.classifier = create_classifier(
            self.num_features, num_classes, pool_type=global_pool
        )
        self.classifier.to(reference.device, reference.dtype)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.classifier.train(self.training)

    def get_classifier(self) -> nn.Module:
        return self.classifier

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter names by depth, for timm's layer-wise learning rate decay."""
        return {"stem": r"^stem", "blocks": [(r"^blocks\.(\d+)", None), (r"^final", (99999,))]}

    def _start(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the first block reads."""
        return (self.stem(x),) * self.num_inputs

    def _next(
        self, block: nn.Module, inputs: tuple[Tensor, ...], weights: Weights | None = None
    ) -> tuple[Tensor, ...]:
        """What the next block reads; last, the output of this one."""
        arguments = (*inputs, weights) if isinstance(block, Searchable) else inputs
        if self.grad_checkpointing:
            return *inputs[1:], checkpoint(block, *arguments, use_reentrant=False)
        return *inputs[1:], block(*arguments)

    def forward_features(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_features, H', W')."""
        inputs = self._start(x)
        for block in self.blocks:
            inputs = self._next(block, inputs, weights)
        return run_layer(self.final, inputs[-1], weights)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(N, num_features, H', W') -> (N, num_classes), or the classifier's input."""
        x = self.global_pool(x)
        if self.drop_rate > 0:
            x = nn.functional.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)

    def forward(self, x: Tensor, weights: Weights | None = None) -> Tensor:
        """(N, in_chans, H, W) -> (N, num_classes)."""
        return self.forward_head(self.forward_features(x, weights))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The features of a derived network at the levels of `feature_info`, as timm asks for them.

        Args:
            x: (N, in_chans, H, W).
            indices: levels; a number means that many last ones, None all.
            norm: must be False; the levels have no norm of their own.
            stop_early: run nothing after the last wanted level.
            output_fmt: must be NCHW.
            intermediates_only: return the list alone, not (final features, list).

        Raises:
            ValueError: a norm or another format is asked for.
        """
        if norm or output_fmt != "NCHW":
            raise ValueError(f"only norm=False, output_fmt='NCHW'; got {norm=}, {output_fmt=}")
        _, ends = self._levels(indices)
        intermediates: list[Tensor] = []
        inputs = self._start(x)
        for index, block in enumerate(self.blocks):
            if stop_early and index > max(ends):
                return intermediates if intermediates_only else (inputs[-1], intermediates)
            inputs = self._next(block, inputs)
            if index in ends:
                intermediates.append(inputs[-1])
        return intermediates if intermediates_only else (self.final(inputs[-1]), intermediates)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] | None = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what `forward_intermediates` does not need for these levels; returns the levels."""
        levels, ends = self._levels(indices)
        if prune_norm or max(ends) + 1 < len(self.blocks):
            self.final = nn.Identity()
            self.num_features = self.feature_info[max(levels)]["num_chs"]
            prune_head = True  # it is as wide as what is gone
        self.blocks = self.blocks[: max(ends) + 1]
        if prune_head:
            self.reset_classifier(0, "")
        return levels

    def _levels(self, indices: int | Sequence[int] | None) -> tuple[list[int], list[int]]:
        """The levels timm means by `indices`, and the index of the last block of each."""
        listed = list(indices) if isinstance(indices, Sequence) else indices
        levels, _ = feature_take_indices(len(self.feature_info), listed)
        modules = [self.feature_info[level]["module"] for level in levels]
        return list(levels), [int(module.rpartition(".")[2]) for module in modules]


class WithAuxiliary(nn.Module):
    """A network in training beside its auxiliary classifier; call it for the logits of both.

    Raises:
        ValueError: the network has none.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        if network.auxiliary is None:
            raise ValueError("the network has no auxiliary classifier; set recipe.aux_weight=0")
        self.network, self.after = network, network.auxiliary.after
        self.head = network.auxiliary.build(network.num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, in_chans, H, W) -> (N, num_classes) twice."""
        network = self.network
        inputs = network._start(x)
        for index, block in enumerate(network.blocks):
            inputs = network._next(block, inputs)
            if index == self.after:
                auxiliary = self.head(inputs[-1])
        return network.forward_head(network.final(inputs[-1])), auxiliary


def _feature_info(blocks: Sequence[Block], stem_stride: int) -> list[dict[str, Any]]:
    """The last block of every resolution, in timm's form."""
    info: list[dict[str, Any]] = []
    reduction = stem_stride
    for index, block in enumerate(blocks):
        entry = {
            "num_chs": block.out_chs,
            "reduction": reduction * block.stride,
            "module": f"blocks.{index}",
        }
        if block.stride == 1 and info:
            info[-1] = entry
        else:
            info.append(entry)
        reduction *= block.stride
    return info
