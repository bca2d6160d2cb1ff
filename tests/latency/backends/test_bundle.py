from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from latency.backends.bundle import Bundle
from latency.bundle import fingerprint
from latency.runner import Plan, digest, summarize
from latency.samples import EMPTY, Elsewhere, Operation, Unmeasurable
from latency.table import Target

Unpack = Callable[..., Path]
Run = Callable[..., Any]


@pytest.fixture
def result(unpacked: Unpack, run_device: Run) -> Path:
    folder = unpacked()
    done = run_device(folder)
    assert done.returncode == 0, done.stderr
    return folder / "result.json"


def rewrite(path: Path, **changes: Any) -> None:
    """With a checksum that fits."""
    value = {**json.loads(path.read_text()), **changes}
    del value["checksum"]
    path.write_text(json.dumps({**value, "checksum": digest(value)}))


def test_the_steps_to_take(
    operations: dict[str, Operation], target: Target, plan: Plan, tmp_path: Path
) -> None:
    backend = Bundle(str(tmp_path / "pi.zip"))
    backend.check(target)
    with pytest.raises(Elsewhere) as found:
        backend.sample(operations, target, plan)
    for words in ("3 operations", "python3 -m zipfile -e pi.zip pi", "python3 pi/runner.py"):
        assert words in str(found.value)
    assert not backend.is_here
    with pytest.raises(ValueError, match="backend=bundle does not measure at once"):
        backend.describe()


def test_there_and_back(
    result: Path, operations: dict[str, Operation], target: Target, plan: Plan, tmp_path: Path
) -> None:
    backend = Bundle(str(tmp_path / "bundle.zip"), result=str(result))
    assert backend.is_here and backend.device == "pi"
    backend.check(target)
    found = backend.sample(operations, target, plan)
    assert list(found.names) == [EMPTY, *operations]
    measured = json.loads(result.read_text())
    rows = measured["rounds"]
    assert found.rows == rows and len(rows) >= plan.min_rounds
    expected = [s.median_ms for s in summarize(rows, 4)]
    assert [found.measurement(name).median_ms for name in found.names] == expected[:-1]
    assert found.reference_ms == expected[-1] and found.overhead_ms == expected[0] > 0
    assert found.measurement("conv").median_ms > found.measurement("relu").median_ms
    device = backend.describe()
    assert device == measured["device"] == found.device
    assert {"device_name", "onnxruntime", "numpy", "python", "provider"} <= device.keys()
    part = backend.sample({"sum": operations["sum"]}, target, plan)  # of a smaller space
    assert part.measurement("sum") == found.measurement("sum")


def test_equal_operations_make_equal_bundles(
    operations: dict[str, Operation], target: Target, plan: Plan, tmp_path: Path
) -> None:
    """Whatever their random weights; so that the device can go on with another run's rounds."""
    before = operations["conv"].module[0].weight.clone()  # type: ignore[index]
    for name in ("a", "b"):
        again = nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU())
        with pytest.raises(Elsewhere):
            Bundle(str(tmp_path / name)).sample(
                {**operations, "again": replace(operations["conv"], module=again)}, target, plan
            )
    assert torch.equal(before, operations["conv"].module[0].weight)  # type: ignore[index]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with zipfile.ZipFile(tmp_path / "a") as archive:
        models = [name for name in archive.namelist() if name.startswith("models/")]
    assert len(models) == 5  # `again` shares the file of `conv`; the empty call, the reference
    with pytest.raises(Elsewhere):
        Bundle(str(tmp_path / "c")).sample(operations, target, replace(plan, rounds=5))
    assert (tmp_path / "c").read_bytes() != (tmp_path / "a").read_bytes()


def test_weights_compress_and_are_ordinary_numbers(
    target: Target, plan: Plan, tmp_path: Path
) -> None:
    import onnx
    from onnx import numpy_helper

    wide = nn.Sequential(nn.Conv2d(64, 512, 3), nn.Conv2d(512, 512, 1), nn.BatchNorm2d(512))
    operation = Operation(wide, ((1, 64, 8, 8),), "a=b")
    path = tmp_path / "bundle.zip"
    with pytest.raises(Elsewhere):
        Bundle(str(path)).sample({"wide": operation}, target, plan)
    with zipfile.ZipFile(path) as archive:
        entry = json.loads(archive.read("manifest.json"))["operations"][1]
        model = onnx.load_from_string(archive.read(entry["file"]))
        info = archive.getinfo(entry["file"])
    assert info.compress_size < info.file_size / 20
    weights = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    large = [w for w in weights if w.ndim == 4]
    assert sum(w.size for w in large) == 64 * 512 * 9 + 512 * 512
    for w in large:
        rows = w.reshape(len(w), -1)
        assert np.abs(w).min() > 1e-20  # of a float32: not zero, not denormal
        assert len(np.unique(rows, axis=0)) == len(rows)
        assert rows.std() == pytest.approx((2 / rows.shape[1]) ** 0.5, rel=0.3)


@pytest.mark.parametrize("damage", ["truncated", "edited", "foreign", "version"])
def test_a_damaged_result_is_refused(result: Path, damage: str, tmp_path: Path) -> None:
    content = json.loads(result.read_text())
    message = {
        "truncated": "truncated or not JSON",
        "edited": "changed after the runner wrote it",
        "foreign": 'format must be "supernet.latency_result"',
        "version": "version 2 of the format is not supported",
    }[damage]
    if damage == "truncated":
        result.write_bytes(result.read_bytes()[:-40])
    elif damage == "edited":
        content["rounds"][1]["ms"][2] /= 2
        result.write_text(json.dumps(content))
    elif damage == "foreign":
        result.write_text("{}")
    else:
        rewrite(result, version=2)
    with pytest.raises(ValueError, match=message) as found:
        Bundle(str(tmp_path / "none.zip"), result=str(result))
    assert "result.json" in str(found.value)


def test_a_result_of_another_bundle(
    result: Path, operations: dict[str, Operation], target: Target, plan: Plan, tmp_path: Path
) -> None:
    other = tmp_path / "other.zip"
    with pytest.raises(Elsewhere):
        Bundle(str(other)).sample({"sum": operations["sum"]}, target, plan)
    with pytest.raises(ValueError, match="is of another bundle than .*other.zip"):
        Bundle(str(other), result=str(result))
    other.write_bytes(other.read_bytes()[:100])
    with pytest.raises(ValueError, match="other.zip is not a bundle"):
        Bundle(str(other), result=str(result))
    other.unlink()
    Bundle(str(other), result=str(result)).sample(operations, target, plan)


def test_a_result_for_another_target(result: Path, target: Target, tmp_path: Path) -> None:
    backend = Bundle(str(tmp_path / "bundle.zip"), result=str(result))
    with pytest.raises(ValueError, match="give latency.target.device=pi latency.target.threads=1$"):
        backend.check(replace(target, device="phone", threads=4))
    with pytest.raises(ValueError, match="'torch'; valid: onnxruntime"):
        backend.check(replace(target, runtime="torch"))


def test_a_result_of_other_operations(
    result: Path, operations: dict[str, Operation], target: Target, plan: Plan, tmp_path: Path
) -> None:
    backend = Bundle(str(tmp_path / "bundle.zip"), result=str(result))
    new = Operation(nn.Sigmoid(), ((1, 3, 8, 8),), "stage9_0=k9")
    with pytest.raises(ValueError, match=r"lacks 1 operations .*\n  stage9_0=k9 \(new\)"):
        backend.sample({**operations, "new": new}, target, plan)
    wider = replace(operations["conv"], module=nn.Conv2d(3, 41, 3))
    with pytest.raises(ValueError, match="other operations under the names conv; give the"):
        backend.sample({**operations, "conv": wider}, target, plan)
    larger = replace(operations["relu"], input_shapes=((1, 3, 9, 9),))
    assert len({fingerprint(o) for o in (*operations.values(), wider, larger)}) == 5


def test_an_operation_that_cannot_be_exported(
    operations: dict[str, Operation], unexportable: Operation, target: Target, plan: Plan,
    tmp_path: Path,
) -> None:  # fmt: skip
    path = tmp_path / "bundle.zip"
    with pytest.raises(Unmeasurable, match=r"^stage2_1=k5 cannot be measured \(odd\): .*exclude="):
        Bundle(str(path)).sample({**operations, "odd": unexportable}, target, plan)
    assert not list(tmp_path.iterdir())


def break_conv(folder: Path) -> Callable[[dict[str, Any]], None]:
    """A file that is what the manifest says, and no model."""
    import hashlib

    (folder / "models" / "broken.onnx").write_bytes(b"no model")

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"]["models/broken.onnx"] = hashlib.sha256(b"no model").hexdigest()
        manifest["operations"][1]["file"] = "models/broken.onnx"

    return change


def test_an_operation_that_does_not_run_on_the_device(
    unpacked: Unpack, run_device: Run, edit_manifest: Callable[..., None],
    operations: dict[str, Operation], target: Target, plan: Plan, tmp_path: Path,
) -> None:  # fmt: skip
    folder = unpacked()
    edit_manifest(folder, break_conv(folder))
    done = run_device(folder)
    assert done.returncode == 1
    words = "1 operations do not run on the device:\n  stage1_0=k3, stage1_1=k3 (conv): "
    exclude = "'exclude=[\"stage1_0=k3\", \"stage1_1=k3\"]'"
    assert words in done.stderr and exclude in done.stderr and "--skip-failing" in done.stderr
    assert not (folder / "result.json").exists()
    assert run_device(folder, "--skip-failing").returncode == 0
    backend = Bundle(str(tmp_path / "gone.zip"), result=str(folder / "result.json"))
    with pytest.raises(ValueError) as found:
        backend.sample(operations, target, plan)
    assert words in str(found.value) and exclude in str(found.value)
    others = {name: operation for name, operation in operations.items() if name != "conv"}
    assert backend.sample(others, target, plan).measurement("sum").median_ms > 0


def test_an_empty_call_is_not_skipped(
    unpacked: Unpack, run_device: Run, edit_manifest: Callable[..., None]
) -> None:
    folder = unpacked()
    change = break_conv(folder)

    def also_the_empty_call(manifest: dict[str, Any]) -> None:
        change(manifest)
        manifest["operations"][0]["file"] = "models/broken.onnx"

    edit_manifest(folder, also_the_empty_call)
    done = run_device(folder, "--skip-failing")
    assert done.returncode == 1 and f"{EMPTY} ({EMPTY})" in done.stderr
