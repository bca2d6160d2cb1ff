"""Operations on their way to another device, and their times on the way back.

A bundle is a folder, or a zip archive of it: ONNX files, `manifest.json` and `runner.py`, which
measures them and writes `result.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from latency import runner
from latency.backends.base import NOTHING, REFERENCE
from latency.onnx_files import input_names, to_onnx, with_plain_weights
from latency.recipe import recipe
from latency.runner import BUNDLE, EMPTY, RESULT, Plan, digest, failing
from latency.samples import Operation, Samples, Unmeasurable
from latency.table import Target
from supernet.files import atomic_path, read_json

RUNNER = Path(runner.__file__)
FIELDS = {
    *RESULT, "bundle", "target", "device", "plan", "ended", "operations", "failed", "rounds",
    "checksum",
}  # fmt: skip


def write_bundle(
    folder: Path,
    operations: Mapping[str, Operation],
    target: Target,
    plan: Plan,
    provider: str,
    provider_options: Mapping[str, Any],
    show: bool,
) -> dict[str, Any]:
    """Fill a folder; the same operations, target and plan give the same bytes.

    Args:
        folder: an empty one.
        provider, provider_options: an execution provider, in onnxruntime's form.
        show: a bar where the output is a terminal.

    Returns:
        The manifest.

    Raises:
        Unmeasurable: an operation cannot be exported.
    """
    files: dict[str, str] = {}
    (folder / "models").mkdir()
    every = {EMPTY: NOTHING, **operations, REFERENCE.where: REFERENCE}
    entries = []
    bar = tqdm(every.items(), "exporting", unit="op", leave=False, disable=None if show else True)
    for name, operation in bar:
        try:
            model = to_onnx(with_plain_weights(operation), target.dtype)
        except Exception as error:  # the exporter raises what it likes
            raise Unmeasurable(operation.where, name, error) from error
        sha256 = hashlib.sha256(model).hexdigest()
        file = f"models/{sha256[:16]}.onnx"
        if file not in files:
            (folder / file).write_bytes(model)
            files[file] = sha256
        inputs = dict(zip(input_names(operation), operation.input_shapes, strict=True))
        entries.append(
            {
                "name": name, "where": operation.where, "module": fingerprint(operation),
                "file": file, "inputs": inputs,
            }
        )  # fmt: skip
    content = {
        **BUNDLE,
        "target": asdict(target),
        "plan": asdict(plan),
        "provider": provider,
        "provider_options": dict(provider_options),
        "operations": entries[:-1],
        "reference": entries[-1],
        "files": files,
    }
    manifest: dict[str, Any] = json.loads(json.dumps(content))
    manifest["id"] = digest(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    (folder / "runner.py").write_bytes(RUNNER.read_bytes())
    return manifest


def fingerprint(operation: Operation) -> str:
    """Equal for operations that take equal time."""
    return digest([recipe(operation.module), operation.input_shapes])


def pack(folder: Path, path: Path) -> None:
    """Write the folder's files as a zip archive."""
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name in sorted(names):
            info = zipfile.ZipInfo(name)  # dated 1980: equal bundles have equal bytes
            info.external_attr = 0o644 << 16
            archive.writestr(info, (folder / name).read_bytes(), zipfile.ZIP_DEFLATED)


def archive_id(path: Path) -> str:
    """The id of the bundle in an archive.

    Raises:
        ValueError: it holds none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return str(json.loads(archive.read("manifest.json"))["id"])
    except (OSError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a bundle of operations: {error}") from None


def read_result(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A runner's result, checked in itself.

    Raises:
        ValueError: missing, truncated, changed by hand, or of another version; names the path.
    """
    result = read_json(path, "result of a bundle")
    try:
        _check(result)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)}: {error}") from None
    found: dict[str, Any] = result
    return found


def _check(result: Any) -> None:
    if not isinstance(result, dict) or result.get("format") != RESULT["format"]:
        raise ValueError(f'not the result of a bundle: its format must be "{RESULT["format"]}"')
    if result.get("version") != RESULT["version"]:
        raise ValueError(
            f"version {result.get('version')!r} of the format is not supported; this package "
            f"reads version {RESULT['version']}"
        )
    if result.get("checksum") != digest({n: v for n, v in result.items() if n != "checksum"}):
        raise ValueError(
            "it was changed after the runner wrote it (its checksum does not fit); copy it from "
            "the device again"
        )
    assert result.keys() == FIELDS, result.keys()


def samples(result: Mapping[str, Any], operations: Iterable[tuple[str, Operation]]) -> Samples:
    """The times in a result, which has to have these operations; it may have others.

    Raises:
        ValueError: names those that failed on the device, that are missing, or that are others
            under the same name.
    """
    modules = {entry["name"]: entry["module"] for entry in result["operations"]}
    reasons = {entry["name"]: entry for entry in result["failed"]}
    wanted = dict(operations)
    if failed := [reasons[name] for name in wanted if name in reasons]:
        raise ValueError(failing(failed))
    if missing := [name for name in wanted if name not in modules]:
        listed = "".join(f"\n  {wanted[name].where} ({name})" for name in missing)
        raise ValueError(f"the result lacks {len(missing)} operations of the space:{listed}")
    if others := [n for n, operation in wanted.items() if modules[n] != fingerprint(operation)]:
        raise ValueError(
            f"the result has other operations under the names {', '.join(others)}; give the "
            "settings that the bundle was made with (space, seed, latency.num_fit, "
            "latency.num_held_out)"
        )
    return Samples(
        list(modules), result["rounds"], result["ended"], result["device"], result["plan"]
    )
