"""A derived network as a timm model: `timm.create_model("supernet_derived", architecture=...)`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from timm.models import build_model_with_cfg, register_model
from torch import nn

from supernet.choice import Architecture, canonical_json
from supernet.network import Network
from supernet.space import SearchSpace

AnyArchitecture = Architecture | Mapping[str, Any] | str | os.PathLike[str]


@register_model
def supernet_derived(
    pretrained: bool = False,
    *,
    architecture: AnyArchitecture | None = None,
    in_chans: int | None = None,
    pretrained_cfg: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """The network of one architecture; call it through `timm.create_model`.

    Args:
        pretrained: timm's; there are no published weights, your own go in `checkpoint_path`.
        architecture: an `architecture.json`, its content, or an `Architecture`.
        in_chans: channels of the image where they differ from the architecture's.
        pretrained_cfg: timm's data settings; by default the architecture's image size, and
            ImageNet's mean and deviation for three channels. `pretrained_cfg_overlay` replaces
            single values.
        kwargs: `num_classes`, `global_pool`, `drop_rate`; `features_only`, `out_indices`; and
            what timm's `build_model_with_cfg` takes.

    Raises:
        ValueError: no architecture, or one that cannot be built.
    """
    settled = _with_in_chans(read_architecture(architecture), in_chans)
    network = SearchSpace.of(settled).build_network(settled, num_classes=0)
    return build_model_with_cfg(
        partial(_configure, network),
        "supernet_derived",
        pretrained,
        pretrained_cfg=_default_cfg(network) if pretrained_cfg is None else pretrained_cfg,
        feature_cfg={"feature_cls": "getter", "out_indices": None},
        **kwargs,
    )


def read_architecture(value: AnyArchitecture | None) -> Architecture:
    """An `Architecture` from what a user may hand over.

    Raises:
        ValueError: None, or no architecture.
    """
    if isinstance(value, Architecture):
        return value
    if isinstance(value, Mapping):
        return Architecture.from_dict(value)
    if isinstance(value, (str, os.PathLike)):
        return Architecture.load(value)
    raise ValueError(
        f"architecture={value!r}: a derived network needs architecture=, the path of an "
        "architecture.json, its content as a dictionary, or an Architecture"
    )


def _with_in_chans(architecture: Architecture, in_chans: int | None) -> Architecture:
    settings = json.loads(architecture.settings)
    if in_chans is None or in_chans == settings.get("in_chans"):
        return architecture
    return replace(architecture, settings=canonical_json({**settings, "in_chans": in_chans}))


def _configure(
    network: Network,
    *,
    num_classes: int,
    in_chans: int,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
) -> Network:
    if in_chans != network.in_chans:
        raise ValueError(
            f"pretrained_cfg declares {in_chans} input channels, the architecture "
            f"{network.in_chans}; pass in_chans={in_chans} to build it for those"
        )
    network.drop_rate = drop_rate
    network.reset_classifier(num_classes, global_pool)
    return network


def _default_cfg(network: Network) -> dict[str, Any]:
    """timm's `pretrained_cfg` of a network without weights."""
    convolutions = [
        name for name, module in network.named_modules() if isinstance(module, nn.Conv2d)
    ]
    cfg = {
        "input_size": (network.in_chans, network.img_size, network.img_size),
        "first_conv": convolutions[0],
        "classifier": "classifier",
        "crop_pct": 1.0,  # as in `supernet.data.eval_transform`
        "interpolation": "bilinear",
    }
    if network.in_chans != 3:
        cfg |= {"mean": (0.5,) * network.in_chans, "std": (0.5,) * network.in_chans}
    return cfg
