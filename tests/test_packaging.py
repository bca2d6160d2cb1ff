"""What a wheel holds, and what works where only the wheel is installed."""

from __future__ import annotations

import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from functools import cache
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from omegaconf import DictConfig, ListConfig, OmegaConf
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
# Folder in the checkout -> package in an environment.
PACKAGES = {
    "conf": "supernet_conf",
    "latency": "latency",
    "scripts": "supernet_scripts",
    "supernet": "supernet",
}
COMMANDS = ("measure", "validate", "search", "derive", "retrain", "compare")
LIKE_SEARCH = ("measure", "validate")
GROUP_CONFIGS = sorted(
    path.relative_to(ROOT / "conf").with_suffix("").as_posix()
    for path in (ROOT / "conf").glob("*/*.yaml")
)


def run(command: list[str | Path], cwd: Path) -> str:
    """What a command that succeeds prints, with no way to the checkout but `command`."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, cwd=cwd, env=environment, text=True, **pipes)
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of a copy of the sources: building in the checkout would leave files there."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    run([*pip, "--wheel-dir", folder, source], cwd=folder)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel and, through a .pth, what it depends on.

    The .pth files of the environment it points to are not read, and so neither is that
    environment's editable install of this project.
    """
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site_packages = Path(sysconfig.get_path("purelib", "posix_prefix", scheme))
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python"]
    run([*pip, "install", "--no-deps", "--no-index", "--force-reinstall", wheel], cwd=folder)
    return folder / "bin"


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in PACKAGES.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected


def test_wheel_declares_the_commands(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(archive.read(name).decode())
    expected = {f"supernet-{name}": f"supernet_scripts.{name}:main" for name in COMMANDS}
    assert dict(parser["console_scripts"]) == expected


def test_hydra_takes_no_prerelease() -> None:
    """`<1.4` excludes 1.4's pre-releases too, which the sweepers' own requirements admit."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    requirements = parser["options"]["install_requires"].split()
    (hydra,) = (line for line in requirements if line.startswith("hydra-core"))
    specifier = Requirement(hydra).specifier
    assert specifier.contains("1.3.2")
    assert not specifier.contains("1.4.0rc1", prereleases=True)


def _check_that_it_composes(group_config: str, commands: tuple[str, ...]) -> int:
    """With each of the commands that has the group; what it instantiates exists."""
    group, _, name = group_config.rpartition("/")
    users = [command for command in commands if group in _groups(command)]
    if group == "layout":  # each command has its own, and no other fits
        users = [command for command in users if _groups(command)[group] == name]
    for command in users:
        config = _compose(command, [f"{group}={name}"])
        for target in _targets(config):
            get_object(target)
    return len(users)


@pytest.mark.parametrize("group_config", GROUP_CONFIGS)
def test_every_config_composes(group_config: str) -> None:
    """With each command that has the group, but for those that have all their groups of search."""
    commands = tuple(command for command in COMMANDS if command not in LIKE_SEARCH)
    assert _check_that_it_composes(group_config, commands), "no command has the group"


@pytest.mark.slow
@pytest.mark.parametrize("group_config", GROUP_CONFIGS)
def test_every_config_composes_with_the_commands_like_search(group_config: str) -> None:
    _check_that_it_composes(group_config, LIKE_SEARCH)


@pytest.mark.parametrize("command", LIKE_SEARCH)
def test_commands_like_search_have_its_groups(command: str) -> None:
    assert _groups(command).keys() == _groups("search").keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_composes(name: str) -> None:
    config = _compose(name, [])
    for target in _targets(config):
        get_object(target)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_command_helps_from_any_folder(installed: Path, tmp_path: Path, name: str) -> None:
    text = run([installed / f"supernet-{name}", "--help"], cwd=tmp_path)
    for group in _groups(name):
        assert f"{group}: " in text


@pytest.mark.slow
def test_the_installed_wheel_is_what_runs(installed: Path, tmp_path: Path) -> None:
    code = "import json, {0}; print(json.dumps([m.__file__ for m in ({0})]))"
    code = code.format(", ".join(PACKAGES.values()))
    files = json.loads(run([installed / "python", "-c", code], cwd=tmp_path))
    for file in files:
        assert Path(file).is_relative_to(installed.parent), file


@pytest.mark.slow
@pytest.mark.parametrize("name", ["conf", "scripts"])
def test_common_names_are_left_alone(installed: Path, tmp_path: Path, name: str) -> None:
    code = f"import importlib.util; print(importlib.util.find_spec({name!r}))"
    assert run([installed / "python", "-c", code], cwd=tmp_path).strip() == "None"


@pytest.mark.slow
def test_config_dir_adds_to_an_installed_wheel(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "space").mkdir(parents=True)
    (tmp_path / "mine" / "space" / "tiny.yaml").write_text(
        "defaults: [mbconv_small]\nstages: [[16, 1, 2]]\nkernels: [3]\n"
    )
    command = [installed / "supernet-measure", "--config-dir", "mine", "space=tiny"]
    settings = ["latency.rounds=1", "latency.burst_ms=0.1", "output=table.json"]
    run([*command, *settings], cwd=tmp_path)
    table = json.loads((tmp_path / "table.json").read_text())
    assert table["measurements"]


@pytest.mark.slow
def test_searches_and_derives_from_any_folder(installed: Path, tmp_path: Path) -> None:
    """And wandb, a dependency, says and writes nothing."""
    space = ["space.stages=[[8,1,2]]", "space.kernels=[3]", "data.img_size=16"]
    short = ["data.train_limit=128", "strategy.epochs=2", "strategy.warmup_epochs=1"]
    quick = ["strategy.batch_size=32", "latency.rounds=1", "latency.burst_ms=0.1", "bn_batches=1"]
    whole = ["objective.budget_share=1.0", "device=cpu", "run_dir=here"]
    output = run([installed / "supernet-search", *space, *short, *quick, *whole], cwd=tmp_path)
    assert "wandb" not in output
    assert [path.name for path in tmp_path.iterdir() if "cache" not in path.name] == ["here"]
    assert (tmp_path / "here" / "report.html").is_file()
    run([installed / "supernet-derive", "run=here", "output=there"], cwd=tmp_path)
    found = (tmp_path / "there" / "architecture.json").read_text()
    assert found == (tmp_path / "here" / "architecture.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_script_runs_in_a_checkout(tmp_path: Path, name: str) -> None:
    text = run([sys.executable, ROOT / "scripts" / f"{name}.py", "--help"], cwd=tmp_path)
    assert "Compose your configuration" in text


def _compose(name: str, overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose(name, overrides)
    OmegaConf.resolve(config)
    return config


@cache
def _groups(name: str) -> dict[str, str]:
    """{group: option} of a command's defaults list, and of the configs it is based on."""
    groups: dict[str, str] = {}
    for entry in OmegaConf.load(ROOT / "conf" / f"{name}.yaml")["defaults"]:
        if isinstance(entry, str):
            groups |= {} if entry == "_self_" else _groups(entry)
        else:
            # a group that is used at another place, `group@place`, has its own entry too
            own = {key: option for key, option in entry.items() if "@" not in key}
            groups |= {key.removeprefix("override "): option for key, option in own.items()}
    return groups


def _targets(node: object) -> list[str]:
    """Every `_target_` at or below a node."""
    if isinstance(node, DictConfig):
        own = [node["_target_"]] if "_target_" in node else []
        return own + [t for key in node for t in _targets(node.get(key))]
    if isinstance(node, ListConfig):
        return [t for item in node for t in _targets(item)]
    return []
