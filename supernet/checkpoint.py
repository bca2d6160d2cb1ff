"""Checkpoints: nested state in one safetensors file, exact to the bit. Nothing is pickled."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from supernet.files import atomic_path

FORMAT = "supernet.checkpoint"
VERSION = 1


def save_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
    """Write `state` in one file; a checkpoint already there stays until the new one is complete.

    Args:
        path: of the file.
        state: nested dicts, lists and tuples of tensors, numbers, text, booleans and None. Keys
            are numbers, text, booleans, None or tuples of these. Tensors are stored from whatever
            device they are on, each by itself even where two share memory.

    Raises:
        TypeError: something in `state` is of another type; the message says where.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(dict(state), "", tensors), separators=(",", ":"))
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "state": text,
        "checksum": _checksum(text, tensors),
    }
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote: equal values and types, tensors on the CPU.

    Raises:
        ValueError: missing, truncated, altered or foreign file, or one of another version; the
            message names the path.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # copied, so that no live tensor hangs on the mapped file
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not a checkpoint: it is truncated, damaged or of another kind ({error})"
        ) from None
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a checkpoint: its format is {metadata.get('format')!r}, not {FORMAT!r}"
        )
    if metadata.get("version") != str(VERSION):
        raise ValueError(
            f"{path} is a checkpoint of version {metadata.get('version')!r}; "
            f"this package reads version {VERSION}"
        )
    text = metadata.get("state", "")
    if metadata.get("checksum") != _checksum(text, tensors):
        raise ValueError(
            f"{path} is damaged: its content does not match its checksum; "
            "delete it and start again from an earlier checkpoint or from the beginning"
        )
    state: dict[str, Any] = _decode(json.loads(text), tensors)
    return state


def rng_state() -> dict[str, Any]:
    """State of the global generators (Python, numpy, torch on the CPU and the current GPU)."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what `rng_state` returned; a GPU's state is dropped where there is no GPU."""
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    """JSON form of `value`: objects are tagged values, {"dict": [[key, value], ...]} and so on.

    Tensors go into `tensors`; the number in their name keeps two paths of one text apart.
    """
    if isinstance(value, Tensor):
        name = f"{len(tensors)}:{where}"
        tensors[name] = _plain(value)
        return {"tensor": name}
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # JSON has no infinities, and a NaN carries bits of its own
        return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
    if isinstance(value, Mapping):
        pairs = [
            [_encode(k, f"{where}/key", tensors), _encode(v, f"{where}/{k}", tensors)]
            for k, v in value.items()
        ]
        return {"dict": pairs}
    if type(value) in (list, tuple):
        items = [_encode(item, f"{where}/{i}", tensors) for i, item in enumerate(value)]
        return items if type(value) is list else {"tuple": items}
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__} (at {where or '/'})")


def _decode(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "float":
        return struct.unpack(">d", bytes.fromhex(content))[0]
    if tag == "tuple":
        return tuple(_decode(item, tensors) for item in content)
    return {_decode(k, tensors): _decode(v, tensors) for k, v in content}


def _plain(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU that shares memory with nothing."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the JSON and over every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
