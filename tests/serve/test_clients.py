"""Two major versions of the official client, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
HERE = Path(__file__).parent
OLD = Path(os.environ.get("VLM_TEST_OPENAI1", HERE.parents[1] / "build" / "openai-1"))


@pytest.mark.parametrize("version", ["current", "1."])
def test_the_journey(server: Any, make: Any, version: str) -> None:
    environment = dict(os.environ)
    if version == "1.":
        if not OLD.is_dir():
            pytest.skip(f"no {OLD}: pip install --target build/openai-1 'openai<2'")
        environment["PYTHONPATH"] = str(OLD)
    command = [sys.executable, str(HERE / "openai_journey.py"), server.url, make.url(1)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("openai " + (version if version == "1." else ""))
