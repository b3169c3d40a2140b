"""Wheel, sdist, editable install and bare clone: all work, and nothing but `vlm` lands in site-packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

from vlm import __version__

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("vlm", "train", "eval", "data")
PAPERS = ("pyproject.toml", "README.md", "LICENSE")

# Imports by every road; prints where each came from. `tests` and the bare folder names must not be found.
PROBE = """
import importlib.util, json, pkgutil, sys
import vlm, vlm.train, vlm.eval, vlm.data, vlm.data.example, vlm.eval.metrics
import vlm.cli
names = [module.name for module in pkgutil.walk_packages(vlm.__path__, "vlm.", onerror=print)]
print(json.dumps({
    "vlm": vlm.__file__,
    "train": vlm.train.__file__,
    "example": vlm.data.example.__file__,
    "strays": [n for n in ("train", "eval", "data", "vlm.vlm", "tests") if importlib.util.find_spec(n)],
    "finders": [type(f).__name__ for f in sys.meta_path].count("_CloneFinder"),
    "again": sum(".vlm." in name for name in names),
    "same": sys.modules["vlm.data"] is vlm.data,
    "help": vlm.cli.main(["--help"]),
}))
"""


# Sets an editable install up from a folder, as the start of Python would; the one that the environment
# itself may hold is forgotten first (its module has the same name).
INSTALLED = """
import site, sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
for name in [name for name in sys.modules if name.startswith("__editable__")]:
    del sys.modules[name]
sys.path.insert(0, {0!r})
site.addsitedir({0!r})
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the checkout."""
    folder = tmp_path_factory.mktemp("clone") / "checkout"
    folder.mkdir()
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    for paper in PAPERS:
        shutil.copy2(ROOT / paper, folder / paper)
    (folder / "tests").mkdir()
    (folder / "tests" / "stray.py").write_text("")
    return folder


def build(what: str, clone: Path, out: Path) -> Path:
    """Build with this environment's setuptools, without downloading any."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.{what}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=clone, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def wheel(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("build_wheel", clone, tmp_path_factory.mktemp("wheel"))


def probe(cwd: Path, *paths: Path, prelude: str = "") -> dict[str, object]:
    """Run the probe with `paths` (and, as ever, the third-party packages) to import from."""
    places = os.pathsep.join(map(str, paths))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": places}
    done = subprocess.run(
        [sys.executable, "-P", "-c", prelude + PROBE],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] is True
    assert found["help"] == 0
    assert found["again"] == 0
    return found


def test_the_wheel_holds_vlm_and_nothing_else(wheel: Path, clone: Path) -> None:
    assert wheel.name == f"vlm_adapters-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"vlm", f"vlm_adapters-{__version__}.dist-info"}
    expected = {
        ("vlm/" if room == "vlm" else f"vlm/{room}/") + path.relative_to(clone / room).as_posix()
        for room in ROOMS
        for path in (clone / room).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == expected
    assert {"vlm/py.typed", "vlm/data/samples/cat.jpg", "vlm/data/samples/README.md"} <= set(names)


def test_the_wheel_holds_every_file_that_is_no_module(wheel: Path, clone: Path) -> None:
    """Assets, recipes, pages, word lists, samples: whatever lies in the four rooms."""
    names = set(zipfile.ZipFile(wheel).namelist())
    files = [
        ("vlm/" if room == "vlm" else f"vlm/{room}/") + path.relative_to(clone / room).as_posix()
        for room in ROOMS
        for path in (clone / room).rglob("*")
        if path.is_file() and path.suffix != ".py" and not path.name.startswith(".")
    ]
    assert len(files) > 8
    assert sorted(set(files) - names) == []


def test_the_wheels_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    folder = f"vlm_adapters-{__version__}.dist-info"
    metadata = archive.read(f"{folder}/METADATA").decode()
    assert "Name: vlm-adapters\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "vlm = vlm.cli:main" in archive.read(f"{folder}/entry_points.txt").decode()
    assert "Apache License" in archive.read(f"{folder}/licenses/LICENSE").decode()
    for extra in ("serve", "eval", "lmms", "test", "lint", "all"):
        assert f"Provides-Extra: {extra}\n" in metadata
    core = [r for r in metadata.splitlines() if r.startswith("Requires-Dist") and "extra ==" not in r]
    assert not any(
        name in line for line in core for name in ("fastapi", "uvicorn", "pytest", "pycocoevalcap")
    )


def test_an_installed_wheel_works(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    found = probe(tmp_path, site)
    assert found["train"] == str(site / "vlm" / "train" / "__init__.py")
    assert found["example"] == str(site / "vlm" / "data" / "example.py")
    assert found["strays"] == []
    assert found["finders"] == 0


def test_the_sdist_builds_the_same_wheel(clone: Path, wheel: Path, tmp_path: Path) -> None:
    archive = build("build_sdist", clone, tmp_path)
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path, filter="data")
    unpacked = tmp_path / f"vlm_adapters-{__version__}"
    (tmp_path / "out").mkdir()
    again = build("build_wheel", unpacked, tmp_path / "out")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(zipfile.ZipFile(wheel).namelist())


def test_an_editable_install_works(clone: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    editable = build("build_editable", clone, tmp_path / "out")
    site = tmp_path / "site"
    zipfile.ZipFile(editable).extractall(site)
    found = probe(tmp_path, prelude=INSTALLED.format(str(site)))
    assert found["vlm"] == str(clone / "vlm" / "__init__.py")
    assert found["train"] == str(clone / "train" / "__init__.py")
    assert found["strays"] == []


def test_a_bare_clone_works(clone: Path) -> None:
    found = probe(clone, clone)
    assert found["train"] == str(clone / "train" / "__init__.py")
    assert found["example"] == str(clone / "data" / "example.py")
    assert found["finders"] == 1
    done = subprocess.run(
        [sys.executable, "-m", "vlm", "--help"], cwd=clone, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: vlm COMMAND")


def test_a_bare_clone_beside_an_editable_install_of_another(clone: Path, tmp_path: Path) -> None:
    """`vlm` from the one and `vlm.train` from the other would be a mixture that nobody asked for."""
    other = tmp_path / "other"
    shutil.copytree(clone, other, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    (tmp_path / "out").mkdir()
    site = tmp_path / "site"
    zipfile.ZipFile(build("build_editable", other, tmp_path / "out")).extractall(site)
    found = probe(clone, clone, prelude=INSTALLED.format(str(site)))
    assert found["vlm"] == str(clone / "vlm" / "__init__.py")
    assert found["train"] == str(clone / "train" / "__init__.py")


def test_a_reload_adds_no_second_finder(clone: Path) -> None:
    """Importing the package again (notebooks reload) leaves one finder."""
    found = probe(clone, clone, prelude="import importlib, vlm; importlib.reload(vlm)\n")
    assert found["finders"] == 1


def test_every_extra_but_the_other_harness_is_in_all() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = set(project["optional-dependencies"])
    (everything,) = project["optional-dependencies"]["all"]
    assert set(everything.partition("[")[2].rstrip("]").split(",")) == extras - {"all", "lmms"}
