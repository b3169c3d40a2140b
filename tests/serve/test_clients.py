"""Two major versions of the official client, each in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
JOURNEY = Path(__file__).parent / "openai_journey.py"


@pytest.fixture(scope="session")
def old_client(pytestconfig: pytest.Config) -> Path:
    """A folder with openai 1.x, installed beside the tests once and kept in pytest's cache."""
    assert pytestconfig.cache is not None
    cache = pytestconfig.cache.mkdir("openai-1")
    folder = cache / f"python-{sys.version_info.major}.{sys.version_info.minor}"
    if folder.is_dir():
        return folder
    partial = folder.with_suffix(".partial")  # renamed when it is whole: an interrupted one does not count
    shutil.rmtree(partial, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    done = subprocess.run(
        [*pip, "--timeout", "10", "--target", str(partial), "openai>=1.50,<2"],
        capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    if "connection broken" in done.stderr or "from versions: none" in done.stderr:
        pytest.skip("openai 1.x is not here, and the package registry cannot be reached to install it")
    assert done.returncode == 0, done.stderr
    return partial.rename(folder)


def journey(server: Any, make: Any, **environment: str) -> str:
    """What the journey says of itself."""
    command = [sys.executable, str(JOURNEY), server.url, make.url(1)]
    environment = {**os.environ, **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_current_client(server: Any, make: Any) -> None:
    from openai import __version__ as current

    assert int(current.split(".")[0]) > 1
    assert journey(server, make) == f"openai {current}: fine\n"


def test_the_client_of_version_1(server: Any, make: Any, old_client: Path) -> None:
    assert journey(server, make, PYTHONPATH=str(old_client)).startswith("openai 1.")
