from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from supernet import load_network, save_network
from supernet.data import DataInfo, eval_transform
from supernet.predict import predict
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.mbconv import MBConv
from supernet.spaces.nasbench201 import NasBench201

SPACES: dict[str, Callable[[int], SearchSpace]] = {
    "mbconv": lambda chans: MBConv(in_chans=chans, stages=[(16, 2, 2)], head_chs=32),
    "nasbench201": lambda chans: NasBench201(in_chans=chans, widths=(4, 8), num_cells=1),
    "darts": lambda chans: Darts(in_chans=chans, width=4, num_cells=3),
}

def info(in_chans: int) -> DataInfo:
    mean, std = (0.3, 0.4, 0.5)[:in_chans], (0.2, 0.25, 0.3)[:in_chans]
    return DataInfo(3, ("cat", "dog", "owl"), in_chans, 16, mean, std)


def save(path: Path, in_chans: int, unsettle: Any, name: str = "mbconv") -> None:
    space = SPACES[name](in_chans)
    architecture = space.sample(torch.Generator().manual_seed(0))
    network = unsettle(space.build_network(architecture, 3))
    network.classifier.weight.data *= 20
    save_network(path, network, architecture, {"data": info(in_chans).to_dict()})


def picture(path: Path, size: tuple[int, int]) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("name", "in_chans"), [("mbconv", 1), ("mbconv", 3), ("nasbench201", 3), ("darts", 3)]
)
def test_an_image_file_is_named(name: str, in_chans: int, tmp_path: Path, unsettle: Any) -> None:
    save(tmp_path / "n.safetensors", in_chans, unsettle, name)
    network, meta = load_network(tmp_path / "n.safetensors")
    path = picture(tmp_path / "photo.png", (16, 16))
    ranked = predict(network, meta, path)

    image = Image.open(path).convert("L" if in_chans == 1 else "RGB")
    pixels = torch.tensor(np.array(image), dtype=torch.float32).view(16, 16, in_chans) / 255
    given = info(in_chans)
    pixels = (pixels - torch.tensor(given.mean)) / torch.tensor(given.std)
    with torch.no_grad():
        logits = network(pixels.permute(2, 0, 1)[None])[0]
    expected = dict(zip(("cat", "dog", "owl"), (logits.exp() / logits.exp().sum()), strict=True))
    assert dict(ranked) == pytest.approx({k: v.item() for k, v in expected.items()}, abs=1e-5)
    probabilities = [probability for _, probability in ranked]
    assert probabilities == sorted(probabilities, reverse=True)
    assert len(set(probabilities)) == 3


def test_images_of_any_size_and_mode_are_read(tmp_path: Path, unsettle: Any) -> None:
    save(tmp_path / "n.safetensors", 3, unsettle)
    network, meta = load_network(tmp_path / "n.safetensors")
    image = Image.open(picture(tmp_path / "photo.png", (50, 31)))
    for mode, name in (("P", "a.gif"), ("L", "b.png"), ("CMYK", "c.jpg"), ("RGBA", "d.png")):
        image.convert(mode).save(tmp_path / name)
        ranked = predict(network, meta, tmp_path / name)
        assert sum(probability for _, probability in ranked) == pytest.approx(1.0, abs=1e-5)


def test_timm_prepares_images_alike(tmp_path: Path, unsettle: Any) -> None:
    """What the network's `pretrained_cfg` says of a square image is what `eval_transform` does."""
    save(tmp_path / "n.safetensors", 3, unsettle)
    network, _ = load_network(tmp_path / "n.safetensors")
    config = timm.data.resolve_model_data_config(network)
    theirs = timm.data.create_transform(**config, is_training=False)
    image = Image.open(picture(tmp_path / "photo.png", (40, 40)))
    assert torch.allclose(theirs(image), eval_transform(info(3))(image), atol=1e-5)


def test_a_network_without_data_settings_is_refused(tmp_path: Path, unsettle: Any) -> None:
    save(tmp_path / "n.safetensors", 3, unsettle)
    network, _ = load_network(tmp_path / "n.safetensors")
    with pytest.raises(ValueError, match=r'no meta\["data"\]'):
        predict(network, {}, picture(tmp_path / "photo.png", (16, 16)))
