from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.efficientnet import EfficientNet, decode_arch_def
from torch import nn

import supernet.export
from supernet.choice import Architecture
from supernet.export import export_onnx, export_timm
from supernet.network import Network
from supernet.space import SearchSpace
from supernet.spaces.darts import Darts
from supernet.spaces.efficientnet_scaling import EfficientNetScaling
from supernet.spaces.enas_macro import ENASMacro
from supernet.spaces.mbconv import MBConv
from supernet.spaces.mnasnet import MnasNet
from supernet.spaces.nas_rl import NasRL
from supernet.spaces.nasbench201 import NasBench201
from supernet.spaces.spos import Spos

Unsettle = Callable[[nn.Module], nn.Module]
STAGES = [(16, 3, 1), (24, 4, 2), (32, 3, 2), (40, 1, 1), (48, 2, 2)]
ZEROS = {  # stage 1 keeps the width of the first block, so all of it may be absent
    "none": [],
    "one": ["stage2_3"],
    "two in a stage": ["stage2_1", "stage2_2"],
    "in several stages": ["stage1_0", "stage2_2", "stage3_1", "stage3_2", "stage5_1"],
    "a whole stage": ["stage1_0", "stage1_1", "stage1_2"],
}


def settle(space: MBConv, zeros: list[str]) -> Architecture:
    sample = dict(space.sample(torch.Generator().manual_seed(4)))
    for choice in space.choices:
        if choice.name in zeros:
            sample[choice.name] = "zero"
        elif sample[choice.name] == "zero":
            sample[choice.name] = "k5_e3"
    return space.architecture(sample)


def loader_of_the_docstring() -> str:
    """The indented lines of the module's docstring."""
    lines = (supernet.export.__doc__ or "").splitlines()
    return textwrap.dedent("\n".join(line for line in lines if line.startswith("    ") or not line))


@pytest.mark.slow
def test_timm_alone_loads_the_export(tmp_path: Path, unsettle: Unsettle) -> None:
    """Every case in one process, which cannot import this package."""
    space = MBConv(stem_chs=24, first_chs=16, stages=STAGES, head_chs=100, act="hard_swish")
    images, expected = torch.randn(3, 3, 64, 64), []
    for number, zeros in enumerate(ZEROS.values()):
        architecture = settle(space, zeros)
        network = unsettle(space.build_network(architecture, 7))
        export_timm(network, architecture, tmp_path / str(number))
        with torch.no_grad():
            expected.append(network.eval()(images))
    save_file(
        {"images": images, "logits": torch.stack(expected)}, tmp_path / "expected.safetensors"
    )
    program = f"""
import os, sys

class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("supernet", "latency"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
try:
    import supernet
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("supernet can be imported")

import torch
from safetensors.torch import load_file
expected = load_file("expected.safetensors")
for number, logits in enumerate(expected["logits"]):
    os.chdir(str(number))
{textwrap.indent(loader_of_the_docstring(), "    ")}
    with torch.no_grad():
        difference = (network(expected["images"]) - logits).abs().max().item()
    assert difference < 1e-5, (number, difference)
    os.chdir("..")
print(number + 1, "networks compared")
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=tmp_path, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{len(ZEROS)} networks compared\n"


def load(folder: Path) -> nn.Module:
    config = json.loads((folder / "timm_model.json").read_text())
    network = EfficientNet(decode_arch_def(config.pop("arch_def")), **config)
    network.load_state_dict(load_file(folder / "timm_model.safetensors"))
    return network.eval()


def test_block_strings(tmp_path: Path) -> None:
    space = MBConv(stages=[(24, 3, 2), (24, 2, 1), (40, 2, 2)], head_chs=64)
    options = {
        "stage1_0": "k5_e6", "stage1_1": "k5_e6", "stage1_2": "k3_e3",
        "stage2_0": "zero", "stage2_1": "zero", "stage3_0": "k7_e3", "stage3_1": "zero",
    }  # fmt: skip
    architecture = space.architecture(options)
    export_timm(space.build_network(architecture, 10), architecture, tmp_path)
    assert json.loads((tmp_path / "timm_model.json").read_text())["arch_def"] == [
        ["ds_r1_k3_s1_c16_noskip"],
        ["ir_r2_k5_s2_e6_c24", "ir_r1_k3_s2_e3_c24"],
        ["ir_r1_k7_s2_e3_c40"],
    ]


@pytest.mark.parametrize("zeros", ZEROS.values(), ids=ZEROS)
def test_no_key_is_lost(zeros: list[str], tmp_path: Path) -> None:
    space = MBConv(stem_chs=24, first_chs=16, stages=STAGES, head_chs=100)
    architecture = settle(space, zeros)
    network = space.build_network(architecture, 7)
    export_timm(network, architecture, tmp_path)
    exported = load_file(tmp_path / "timm_model.safetensors")
    assert len(exported) == len(network.state_dict())
    assert load(tmp_path).state_dict().keys() == exported.keys()


def test_reductions_beyond_32_are_strides_and_not_dilations(
    tmp_path: Path, unsettle: Unsettle
) -> None:
    space = MBConv(stem_chs=8, first_chs=8, stages=[(16, 2, 2)] + [(16, 1, 2)] * 5, head_chs=32)
    architecture = space.sample(torch.Generator().manual_seed(0))
    network = unsettle(space.build_network(architecture, 5)).eval()
    export_timm(network, architecture, tmp_path)
    images = torch.randn(2, 3, 160, 160)
    with torch.no_grad():
        assert torch.allclose(load(tmp_path)(images), network(images), atol=1e-5)


def test_exports_carry_channels_and_pooling(tmp_path: Path, unsettle: Unsettle) -> None:
    space = MBConv(in_chans=1, stages=[(16, 2, 2)], head_chs=32)
    architecture = space.sample(torch.Generator().manual_seed(0))
    network = timm.create_model(
        "supernet_derived", architecture=architecture, num_classes=5, global_pool="catavgmax"
    )
    unsettle(network).eval()
    export_timm(network, architecture, tmp_path)
    images = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.allclose(load(tmp_path)(images), network(images), atol=1e-5)


def test_a_scaled_efficientnet_is_one_of_timm(tmp_path: Path, unsettle: Unsettle) -> None:
    """For images of its own resolution."""
    stages = ["ds_r1_k3_s1_e1_c16_se0.25", "ir_r2_k5_s2_e6_c24_se0.25_noskip"]
    space = EfficientNetScaling(img_size=32, stages=stages, head_chs=64, phi=2)
    architecture = space.architecture({"depth": "120%", "width": "120%", "resolution": "115%"})
    network = unsettle(space.build_network(architecture, 5)).eval()
    export_timm(network, architecture, tmp_path)
    assert json.loads((tmp_path / "timm_model.json").read_text())["arch_def"] == [
        ["ds_k3_s1_e1_se0.25_r2_c24"], ["ir_k5_s2_e6_se0.25_noskip_r3_c32"],
    ]  # fmt: skip
    images = torch.randn(2, 3, network.img_size, network.img_size)
    with torch.no_grad():
        assert torch.allclose(load(tmp_path)(images), network(images), atol=1e-5)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (EfficientNetScaling(divisor=5, phi=0), r"multiples of 8, so \[30, 15, 25, 110, 190\]"),
        (EfficientNetScaling(stem_stride=1), "stem of stride 2, this space one of 1"),
        (NasBench201(widths=(4,), num_cells=1), "only MBConv networks .* not those of .*NasBench"),
        (Darts(width=4, num_cells=3), "only MBConv networks .* not those of .*Darts"),
        (MBConv(stem_stride=1, stages=[(16, 1, 2)]), "stem of stride 2, this space one of 1"),
        (MBConv(stages=[(20, 1, 2), (30, 1, 2)]), r"multiples of 8, so \[20, 30\]"),
        (MBConv(stem_chs=12, stages=[(16, 1, 2)]), r"multiples of 8, so \[12\]"),
        (MBConv(stages=[(24, 1, 4)]), r"strides of 1 and 2, not \[4\]"),
    ],
)
def test_what_timm_cannot_express_is_refused(
    space: SearchSpace, message: str, tmp_path: Path
) -> None:
    architecture = space.sample(torch.Generator().manual_seed(0))
    network = space.build_network(architecture, 2)
    with pytest.raises(ValueError, match=message):
        export_timm(network, architecture, tmp_path)
    assert not list(tmp_path.iterdir())


ONNX_SPACES: dict[str, SearchSpace] = {
    "nasbench201": NasBench201(widths=(4, 8), num_cells=1, img_size=16),
    "darts": Darts(width=4, num_cells=3, img_size=16),
    "enas_macro": ENASMacro(width=4, num_layers=3, img_size=16),
    "nas_rl": NasRL(num_layers=3, strides=True, img_size=16),
    "efficientnet_scaling": EfficientNetScaling(
        stem_chs=8, stages=["ir_r1_k3_s2_e2_c16_se0.25"], head_chs=32, img_size=16
    ),
    "mnasnet": MnasNet(stem_chs=4, stages=[(4, 1, 1), (8, 1, 2)], head_chs=16, img_size=16),
    "mbconv": MBConv(stem_chs=8, first_chs=8, stages=[(16, 2, 2)], head_chs=32, img_size=32),
    "mbconv stride 1": MBConv(stem_chs=8, stem_stride=1, first_chs=8, stages=[(16, 1, 2)],
                              head_chs=32, img_size=16),
    "spos": Spos(stem_chs=8, stages=[(16, 2, 2)], head_chs=32, img_size=16),
}  # fmt: skip


def example(space: SearchSpace) -> Network:
    return space.build_network(space.sample(torch.Generator().manual_seed(0)), 5)


@pytest.mark.parametrize(
    ("name", "batch"),
    [*((name, None) for name in ONNX_SPACES), ("nas_rl", 2)],
)
def test_onnxruntime_gives_the_same_logits(
    name: str,
    batch: int | None,
    tmp_path: Path,
    unsettle: Unsettle,
    capfd: pytest.CaptureFixture[str],
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    space = ONNX_SPACES[name]
    network = example(space)
    unsettle(network).train()
    export_onnx(network, tmp_path / "network.onnx", batch=batch)
    assert all(module.training for module in network.modules())
    assert [file.name for file in tmp_path.iterdir()] == ["network.onnx"]
    assert capfd.readouterr() == ("", "")
    session = onnxruntime.InferenceSession(
        tmp_path / "network.onnx", providers=["CPUExecutionProvider"]
    )
    for count in (2,) if batch else (1, 2, 5):
        images = torch.randn(count, 3, network.img_size, network.img_size)
        (logits,) = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            expected = network.eval()(images)
        assert (torch.from_numpy(logits) - expected).abs().max() < 1e-4


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("supernet.export.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs onnx, onnxscript: pip install 'supernet\[onnx\]'"):
        export_onnx(example(ONNX_SPACES["mbconv"]), tmp_path / "network.onnx")
