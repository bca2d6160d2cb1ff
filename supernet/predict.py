"""What a saved network says of an image file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image

from supernet.data import DataInfo, eval_transform
from supernet.network import Network


@torch.inference_mode()
def predict(
    network: Network, meta: Mapping[str, Any], image: str | os.PathLike[str]
) -> list[tuple[str, float]]:
    """Class names and their probabilities, the most probable first.

    Args:
        network: in evaluation mode, on any device; with `meta` it is what `load_network` returns.
        meta: holds `DataInfo.to_dict()` as "data".
        image: a file that PIL reads; it is resized, its middle cut out and normalised as in
            evaluation.

    Raises:
        ValueError: `meta` has no data settings.
    """
    if "data" not in meta:
        raise ValueError(
            'the network file has no meta["data"]; save_network(..., meta={"data": info.to_dict()})'
        )
    info = DataInfo.from_dict(meta["data"])
    with Image.open(image) as opened:
        images = eval_transform(info)(opened)[None]
    probabilities = network(images.to(next(network.parameters()))).softmax(dim=1)[0].tolist()
    pairs = zip(info.class_names, probabilities, strict=True)
    return sorted(pairs, key=lambda pair: -pair[1])
