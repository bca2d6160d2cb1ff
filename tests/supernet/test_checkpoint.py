"""Checkpoints: exact round trips, atomic replacement, refusal of anything else."""

from __future__ import annotations

import math
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from supernet import checkpoint
from supernet.checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state


def bits(value: float) -> bytes:
    return struct.pack("<d", value)


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        a, b = a.detach(), b.detach()
        return (
            a.dtype == b.dtype
            and a.shape == b.shape
            and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
        )
    if isinstance(a, dict):
        return list(map(repr, a)) == list(map(repr, b)) and all(
            same(x, y) for x, y in zip(a.values(), b.values(), strict=True)
        )
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bits(a) == bits(b) if isinstance(a, float) else bool(a == b)


def example() -> dict[str, Any]:
    weights = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    odd_nan = struct.unpack("<d", bytes.fromhex("0100000000e8f8ff"))[0]
    return {
        "numbers": [0, -1, 2**80, 0.1, -0.0, 5e-324, math.inf, -math.inf, math.nan, odd_nan],
        "words": ["", "a/b", "ünï\n\0", None, True, False],
        "nested": {"empty": {}, "list": [], "tuple": (), "deep": [({"x": (1, [2.0])},)]},
        "keys": {0: "int", "0": "str", None: 1, 2.5: "float", (1, "a"): 3, -7: 4},
        "tensor": "not a tensor",
        "shared": {"a": weights, "b": weights, "row": weights[1], "turned": weights.t()},
        "a/b": {"c": torch.zeros(1)},
        "a": {"b/c": torch.ones(1)},
        "types": [
            torch.tensor([1.5, -math.inf, math.nan, 1e-40]).to(dtype)
            for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        ]
        + [torch.tensor([0, 1, 2]).to(t) for t in (torch.int64, torch.int32, torch.uint8)]
        + [torch.tensor([True, False]), torch.tensor(3.25), torch.tensor(7), torch.zeros(0, 5)],
        "image": torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.ones(2)).detach(),
        "generator": torch.Generator().manual_seed(3).get_state(),
    }


def test_everything_round_trips_to_the_bit(tmp_path: Path) -> None:
    state = example()
    save_checkpoint(tmp_path / "c.safetensors", state)
    assert same(load_checkpoint(tmp_path / "c.safetensors"), state)
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("opt", ["sgd", "adamw", "rmsproptf"])
@pytest.mark.parametrize("sched", ["cosine", "step", "multistep", "plateau", "poly", "tanh", "wsd"])
@pytest.mark.filterwarnings("ignore:.*[Pp]lateau.*")
def test_optimizer_and_scheduler_continue_alike(tmp_path: Path, opt: str, sched: str) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = create_optimizer_v2(model, opt=opt, lr=0.1, weight_decay=1e-3)
        return model, optimizer, create_scheduler_v2(optimizer, sched, 5, warmup_epochs=1)[0]

    def train(parts: tuple[nn.Module, torch.optim.Optimizer, Any], epochs: range) -> None:
        model, optimizer, scheduler = parts
        for epoch in epochs:
            optimizer.zero_grad()
            model(torch.full((1, 3), float(epoch))).square().sum().backward()
            optimizer.step()
            scheduler.step(epoch + 1, 0.0)

    reference = build()
    train(reference, range(2))
    names = ("model", "optimizer", "scheduler")
    state = {n: p.state_dict() for n, p in zip(names, reference, strict=True)}
    save_checkpoint(tmp_path / "c", state)
    resumed = build()
    for name, part in zip(names, resumed, strict=True):
        part.load_state_dict(load_checkpoint(tmp_path / "c")[name])
    train(reference, range(2, 5))
    train(resumed, range(2, 5))
    assert same(dict(reference[0].state_dict()), dict(resumed[0].state_dict()))
    assert reference[1].param_groups[0]["lr"] == resumed[1].param_groups[0]["lr"]


def test_generators_continue_alike(tmp_path: Path) -> None:
    def draw() -> list[float]:
        return [random.gauss(0, 1), np.random.randn(), torch.randn(1).item(), np.random.rand()]

    before = rng_state()
    try:
        draw()
        save_checkpoint(tmp_path / "rng", rng_state())
        expected = draw()
        assert draw() != expected
        set_rng_state(load_checkpoint(tmp_path / "rng"))
        assert draw() == expected
    finally:
        set_rng_state(before)


@pytest.mark.parametrize("value", [object(), {1, 2}, np.zeros(2), b"bytes", 1j, torch.Size([1])])
def test_other_types_are_refused_with_their_place(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=r"cannot hold .* \(at /a/1\)"):
        save_checkpoint(tmp_path / "c", {"a": [0, value]})
    assert not list(tmp_path.iterdir())


def test_any_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    state = {"step": 3, "w": torch.arange(6, dtype=torch.bfloat16), "rate": [0.1, math.inf]}
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, state)
    good = path.read_bytes()
    data_start = 8 + int.from_bytes(good[:8], "little")
    for position in range(len(good)):
        damaged = bytearray(good)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error)
        else:
            assert position < data_start and same(loaded, state), position


def test_any_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    save_checkpoint(path, {"w": torch.arange(40.0)})
    good = path.read_bytes()
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(ValueError, match="c.safetensors"):
            load_checkpoint(path)


def test_missing_and_foreign_files_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="no checkpoint at .*absent"):
        load_checkpoint(tmp_path / "absent")
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_checkpoint(tmp_path)
    (tmp_path / "text").write_text('{"format": "supernet.checkpoint"}')
    with pytest.raises(ValueError, match="text is not a checkpoint"):
        load_checkpoint(tmp_path / "text")
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickled")
    with pytest.raises(ValueError, match="pickled is not a checkpoint"):
        load_checkpoint(tmp_path / "pickled")
    save_file({"a": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="weights is not a checkpoint: its format is None"):
        load_checkpoint(tmp_path / "weights")
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    save_checkpoint(tmp_path / "newer", {})
    monkeypatch.undo()
    with pytest.raises(ValueError, match="newer is a checkpoint of version '2'.*reads version 1"):
        load_checkpoint(tmp_path / "newer")


def test_previous_checkpoint_survives_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, {"step": 1})

    def fail(tensors: object, filename: Path, metadata: object) -> None:
        Path(filename).write_bytes(b"half a fi")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {"step": 2})
    assert load_checkpoint(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
