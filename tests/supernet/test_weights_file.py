from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from supernet.choice import Architecture
from supernet.network import Network
from supernet.spaces.mbconv import MBConv
from supernet.weights_file import load_network, save_network

DATA = {
    "num_classes": 3,
    "class_names": ["cat", "dog", "Ōkami"],
    "in_chans": 3,
    "img_size": 24,
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
}


def build(**settings: Any) -> tuple[Network, Architecture]:
    stages = [(16, 2, 2), (24, 2, 2)]
    space = MBConv(stem_chs=8, first_chs=8, stages=stages, head_chs=32, **settings)
    architecture = space.sample(torch.Generator().manual_seed(0))
    return space.build_network(architecture, 3), architecture


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    network, architecture = build()
    path = tmp_path / "network.safetensors"
    save_network(path, network, architecture, {"data": DATA, "accuracy": 91.5})
    return path


def test_a_saved_network_comes_back_as_it_was(tmp_path: Path, unsettle: Any) -> None:
    network, architecture = build()
    unsettle(network)
    path = tmp_path / "new_folder" / "network.safetensors"
    save_network(path, network, architecture, {"data": DATA, "accuracy": 91.5})
    loaded, meta = load_network(path)
    assert Architecture.from_dict(meta.pop("architecture")) == architecture
    assert meta == {"data": DATA, "accuracy": 91.5}
    assert not any(module.training for module in loaded.modules())
    expected = network.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(v, expected[k]) for k, v in loaded.state_dict().items())
    images = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        assert torch.equal(loaded(images), network.eval()(images))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_the_loaded_network_tells_timm_how_images_are_prepared(saved: Path) -> None:
    network, _ = load_network(saved)
    config = timm.data.resolve_model_data_config(network)
    assert config["input_size"] == (3, 24, 24)
    assert config["mean"] == (0.1, 0.2, 0.3)
    assert config["std"] == (0.4, 0.5, 0.6)
    assert network.pretrained_cfg["label_names"] == ("cat", "dog", "Ōkami")


def test_another_pooling_is_kept(tmp_path: Path) -> None:
    network, architecture = build()
    network.reset_classifier(3, "catavgmax")
    save_network(tmp_path / "n.safetensors", network, architecture, {})
    loaded, _ = load_network(tmp_path / "n.safetensors")
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(loaded(images), network.eval()(images))


def test_an_interrupted_save_leaves_the_old_file(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("supernet.weights_file.save_file", fail)
    with pytest.raises(KeyboardInterrupt):
        save_network(saved, *build(), {})
    assert saved.read_bytes() == before
    assert list(saved.parent.glob("*network*")) == [saved]


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_network(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_truncated_files_are_refused(saved: Path, length: int) -> None:
    saved.write_bytes(saved.read_bytes()[:length])
    refused(saved, "is truncated or not a safetensors file")


@pytest.mark.parametrize("place", [0.3, 0.6, 0.999])
def test_one_changed_byte_among_the_weights_is_noticed(saved: Path, place: float) -> None:
    content = bytearray(saved.read_bytes())
    start = 8 + struct.unpack("<Q", content[:8])[0]
    content[start + int(place * (len(content) - start))] ^= 1
    saved.write_bytes(content)
    refused(saved, "is damaged")


def test_a_changed_record_is_noticed(saved: Path) -> None:
    content = saved.read_bytes()
    assert content.count(b"91.5") == 1
    saved.write_bytes(content.replace(b"91.5", b"98.5"))
    refused(saved, "is damaged")


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    refused(path, "no network file at")
    path.write_text("hello, this is text")
    refused(path, "is truncated or not a safetensors file")
    torch.save({"weight": torch.zeros(3)}, path)
    refused(path, "is truncated or not a safetensors file")
    for metadata in (None, {"format": "pt"}, {"record": "{"}, {"record": "[]"}):
        save_file({"weight": torch.zeros(3)}, path, metadata=metadata)
        refused(path, "none that save_network wrote")
    record = json.dumps({"format": "supernet.network", "version": 2})
    save_file({"weight": torch.zeros(3)}, path, metadata={"record": record})
    refused(path, "of version 2; this package reads version 1")


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    network, _ = build()
    path = tmp_path / "n.safetensors"
    save_network(path, network, build(kernels=(9,))[1], {})
    refused(path, "holds a network that cannot be built here")


def test_channels_that_contradict_the_architecture_are_refused(tmp_path: Path) -> None:
    network, _ = build(in_chans=1)
    with pytest.raises(ValueError, match="takes 1 channels, its architecture declares 3"):
        save_network(tmp_path / "n.safetensors", network, build()[1], {})


def test_nothing_is_pickled(saved: Path) -> None:
    assert load_file(saved).keys() == build()[0].state_dict().keys()
