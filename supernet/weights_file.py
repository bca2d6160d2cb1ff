"""A network in one file: weights, architecture and data settings, as safetensors."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from supernet.choice import Architecture
from supernet.files import atomic_path
from supernet.network import Network

FORMAT = "supernet.network"
VERSION = 1


def save_network(
    path: str | os.PathLike[str],
    network: Network,
    architecture: Architecture,
    meta: Mapping[str, Any],
) -> None:
    """Write a derived network; the file is replaced atomically.

    `timm.create_model(..., checkpoint_path=path)` reads its weights too.

    Args:
        path: ends in `.safetensors`.
        network: of that architecture.
        meta: JSON values to keep with it; `meta["data"]` holds `DataInfo.to_dict()`, which is
            what prediction needs.

    Raises:
        ValueError: the network was built for other channels than the architecture declares.
    """
    declared = json.loads(architecture.settings)["in_chans"]
    if network.in_chans != declared:
        raise ValueError(
            f"the network takes {network.in_chans} channels, its architecture declares {declared}"
        )
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    record = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": architecture.to_dict(),
        "num_classes": network.num_classes,
        "global_pool": network.global_pool.pool_type,
        "meta": dict(meta),
    }
    text = json.dumps(record)
    metadata = {"format": "pt", "record": text, "sha256": _digest(text, state)}
    with atomic_path(path) as temporary:
        save_file(state, temporary, metadata=metadata)


def load_network(path: str | os.PathLike[str]) -> tuple[Network, dict[str, Any]]:
    """Read what `save_network` wrote: the network in evaluation mode on the CPU, and `meta`,
    to which the architecture is added under "architecture".

    Where `meta["data"]` is present, the network's `pretrained_cfg` carries its image size, mean,
    deviation and class names.

    Raises:
        ValueError: no such file, or it is foreign, truncated or corrupt; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no network file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file ({error})") from None
    record = _record(path, metadata, state)
    try:
        network = _build(record)
        network.load_state_dict(state)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds a network that cannot be built here: {error}") from None
    return network.eval(), {**record["meta"], "architecture": record["architecture"]}


def _record(path: Path, metadata: Mapping[str, str], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What `save_network` wrote beside the weights, after checking that both are intact."""
    text = metadata.get("record", "{}")
    try:
        record = json.loads(text)
    except json.JSONDecodeError:
        record = {}
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is a safetensors file, but none that save_network wrote")
    if record.get("version") != VERSION:
        raise ValueError(
            f"{path} is a network file of version {record.get('version')!r}; "
            f"this package reads version {VERSION}"
        )
    if metadata.get("sha256") != _digest(text, state):
        raise ValueError(f"{path} is damaged: its content has changed since it was written")
    return record


def _build(record: Mapping[str, Any]) -> Network:
    data = record["meta"].get("data")
    overlay = data and {
        "input_size": (data["in_chans"], data["img_size"], data["img_size"]),
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
        "label_names": tuple(data["class_names"]),
        "num_classes": data["num_classes"],
    }
    network = timm.create_model(
        "supernet_derived",
        architecture=record["architecture"],
        num_classes=record["num_classes"],
        global_pool=record["global_pool"],
        pretrained_cfg_overlay=overlay,
    )
    assert isinstance(network, Network)
    return network


def _digest(text: str, state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the record and of all weights, in the order of their names."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(state):
        digest.update(name.encode())
        digest.update(state[name].reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
