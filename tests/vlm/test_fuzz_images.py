"""The fuzz target of the image door: exercised without atheris, and by atheris where it is installed."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

TARGET = Path(__file__).parent / "fuzz_images.py"
RUNS = 4_000


@pytest.fixture(scope="module")
def target() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_images", TARGET)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_seeds_are_read_and_their_beginnings_refused(target: ModuleType) -> None:
    for name, content in target.seeds().items():
        assert target.one_input(content), name
        assert not target.one_input(content[: len(content) // 2]), name
    assert not target.one_input(b"")


@pytest.mark.parametrize("kind", ["error", "mode"])
def test_it_notices_a_door_that_breaks(
    target: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from PIL import Image

    from vlm.images import Picture

    def broken(content: bytes) -> Picture:
        if kind == "error":
            raise ZeroDivisionError
        return Picture(Image.new("L", (1, 1)), "", "")

    monkeypatch.setattr("vlm.images.open_picture", broken)
    with pytest.raises(ZeroDivisionError if kind == "error" else AssertionError):
        target.one_input(b"x")


def test_atheris_finds_no_bytes_that_break_the_door(tmp_path: Path) -> None:
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install atheris (Linux, where there is a wheel)")
    corpus = tmp_path / "corpus"
    command = [sys.executable, str(TARGET), f"-runs={RUNS}", "-seed=1", str(corpus)]
    # libFuzzer's peak of memory is inherited from the process that starts it: here a shell, and not this one.
    command = ["sh", "-c", '"$@"; exit $?', "sh", *command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Done {RUNS} runs" in done.stderr
    # It is led by coverage: what it found to be new lies beside the seeds now.
    assert len(list(corpus.glob("[!s]*"))) > 20
    covered = [int(number) for number in re.findall(r"cov: (\d+)", done.stderr)]
    assert covered[-1] > covered[0]
