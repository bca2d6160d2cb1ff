from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import supernet
from supernet.choice import Architecture
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.enas_macro import ENASMacro
from supernet.spaces.mbconv import MBConv
from supernet.spaces.mnasnet import MnasNet
from supernet.spaces.nasbench201 import NasBench201
from supernet.spaces.spos import Spos

SPACES: list[SearchSpace] = [
    NasBench201(widths=(4, 8, 12), num_cells=1, img_size=16),
    MBConv(stem_chs=8, first_chs=8, stages=[(16, 2, 2), (24, 2, 2)], head_chs=32, img_size=64),
    Darts(width=4, num_cells=4, img_size=16),
    Spos(stem_chs=8, stages=[(16, 2, 2), (24, 2, 2)], head_chs=32, img_size=64),
    ENASMacro(width=4, num_layers=4, img_size=16),
    MnasNet(stem_chs=4, stages=[(4, 1, 1), (8, 2, 2), (12, 2, 2)], head_chs=16, img_size=64),
]
NAMES = ["nasbench201", "mbconv", "darts", "spos", "enas_macro", "mnasnet"]
spaces = pytest.mark.parametrize("space", SPACES, ids=NAMES)


def sample(space: SearchSpace) -> Architecture:
    return space.sample(torch.Generator().manual_seed(0))


@spaces
def test_file_dictionary_and_object_build_the_same_network(
    space: SearchSpace, tmp_path: Path
) -> None:
    architecture = sample(space)
    architecture.save(tmp_path / "architecture.json")
    content = json.loads((tmp_path / "architecture.json").read_text())
    torch.manual_seed(0)
    expected = space.build_network(architecture, 7).state_dict()
    for value in (architecture, content, tmp_path / "architecture.json",
                  str(tmp_path / "architecture.json")):  # fmt: skip
        torch.manual_seed(0)
        network = timm.create_model("supernet_derived", architecture=value, num_classes=7)
        state = network.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)


@spaces
def test_timm_reads_its_data_settings(space: SearchSpace) -> None:
    network = timm.create_model("supernet_derived", architecture=sample(space), num_classes=7)
    config = timm.data.resolve_model_data_config(network)
    assert config["input_size"] == (3, space.img_size, space.img_size)
    assert config["mean"] == (0.485, 0.456, 0.406)
    assert config["crop_pct"] == 1.0
    assert network.default_cfg is network.pretrained_cfg
    modules = dict(network.named_modules())
    first = modules[network.default_cfg["first_conv"]]
    assert isinstance(first, torch.nn.Conv2d)
    assert first.in_channels == 3
    assert modules[network.default_cfg["classifier"]] is network.get_classifier()


@spaces
def test_features_only(space: SearchSpace) -> None:
    images = torch.randn(2, 3, space.img_size, space.img_size)
    architecture = sample(space)
    torch.manual_seed(0)
    whole = timm.create_model("supernet_derived", architecture=architecture).eval()
    expected = whole.forward_intermediates(images, intermediates_only=True)
    for indices in (None, (0, 1), (1,), (-1,), 2):
        torch.manual_seed(0)
        backbone = timm.create_model(
            "supernet_derived", architecture=architecture, features_only=True, out_indices=indices
        ).eval()
        levels = range(len(expected))
        taken = levels if indices is None else levels[-2:] if indices == 2 else indices
        tensors = backbone(images)
        assert len(tensors) == len(taken)
        assert all(torch.equal(a, expected[i]) for a, i in zip(tensors, taken, strict=True))
        assert backbone.feature_info.channels() == [t.shape[1] for t in tensors]
        assert backbone.feature_info.reduction() == [space.img_size // t.shape[-1] for t in tensors]


def test_a_backbone_keeps_no_more_than_it_needs() -> None:
    architecture = sample(SPACES[1])
    count = [
        sum(
            parameter.numel()
            for parameter in timm.create_model(
                "supernet_derived", architecture=architecture, features_only=True, out_indices=(i,)
            ).parameters()
        )
        for i in range(3)
    ]
    assert count == sorted(set(count))
    network = timm.create_model("supernet_derived", architecture=architecture, num_classes=0)
    trunk = [*network.stem.parameters(), *network.blocks.parameters()]
    assert count[-1] == sum(parameter.numel() for parameter in trunk)


@spaces
def test_other_channels(space: SearchSpace) -> None:
    network = timm.create_model("supernet_derived", architecture=sample(space), in_chans=1)
    assert network(torch.randn(2, 1, space.img_size, space.img_size)).shape == (2, 1000)
    config = timm.data.resolve_model_data_config(network)
    assert config["input_size"] == (1, space.img_size, space.img_size)
    assert config["mean"] == config["std"] == (0.5,)


def test_options_of_timm() -> None:
    network = timm.create_model(
        "supernet_derived",
        architecture=sample(SPACES[1]),
        num_classes=3,
        drop_rate=0.25,
        global_pool="max",
        pretrained_cfg_overlay={"mean": (0.1, 0.2, 0.3), "interpolation": "bicubic"},
    )
    assert network.drop_rate == 0.25
    assert network.global_pool.pool_type == "max"
    config = timm.data.resolve_model_data_config(network)
    assert (config["mean"], config["interpolation"]) == ((0.1, 0.2, 0.3), "bicubic")
    assert config["input_size"] == (3, 64, 64)


@spaces
def test_layer_decay_sees_the_depth_of_every_parameter(space: SearchSpace) -> None:
    network = timm.create_model("supernet_derived", architecture=sample(space), num_classes=3)
    optimizer = create_optimizer_v2(network, "sgd", lr=0.1, layer_decay=0.5)
    scale = {
        id(parameter): group["lr_scale"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(scale) == len(list(network.parameters()))
    by_depth = [network.stem, *network.blocks, network.get_classifier()]
    scales = [{scale[id(p)] for p in module.parameters()} for module in by_depth]
    ordered = [value for (value,) in filter(None, scales)]
    assert ordered == sorted(set(ordered))
    assert ordered[-1] == 1.0


def test_a_weight_file_is_a_checkpoint_of_timm(tmp_path: Path) -> None:
    architecture = sample(SPACES[1])
    network = SPACES[1].build_network(architecture, 5)
    path = tmp_path / "network.safetensors"
    supernet.save_network(path, network, architecture, {})
    other = timm.create_model(
        "supernet_derived", architecture=architecture, num_classes=5, checkpoint_path=path
    )
    state = other.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_errors_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs architecture=, the path of an architecture.json"):
        timm.create_model("supernet_derived", num_classes=10)
    with pytest.raises(ValueError, match="no architecture at"):
        timm.create_model("supernet_derived", architecture=tmp_path / "absent.json")
    with pytest.raises(ValueError, match='the field "format" must be'):
        timm.create_model("supernet_derived", architecture={})
    with pytest.raises(ValueError, match="declares 1 input channels, the architecture 3"):
        timm.create_model(
            "supernet_derived",
            architecture=sample(SPACES[1]),
            pretrained_cfg={"input_size": (1, 64, 64)},
        )
    with pytest.raises(TypeError, match="depth_multiplier"):
        timm.create_model("supernet_derived", architecture=sample(SPACES[1]), depth_multiplier=2.0)
    with pytest.raises(RuntimeError, match="No pretrained weights exist for supernet_derived"):
        timm.create_model("supernet_derived", pretrained=True, architecture=sample(SPACES[1]))


@pytest.mark.slow
def test_importing_the_package_registers_the_model_and_little_else() -> None:
    code = (
        "import sys, timm; before = set(sys.modules); import supernet\n"
        "assert timm.is_model('supernet_derived')\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'hydra', 'wandb', 'accelerate', 'sklearn', 'onnx', 'matplotlib', 'latency'}\n"
        "assert not new & heavy, new & heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
