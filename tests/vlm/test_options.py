"""Options that commands share: what `keep_memory` spares."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

TAKE_AND_FREE = """
import resource
from vlm.options import keep_memory
{first}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
begin = faults()
for _ in range(12):
    bytearray(96 << 20)
print(faults() - begin)
"""


def faults(first: str) -> int:
    """Pages of memory that a process is given while it takes and frees the same 96 MiB twelve times."""
    code = TAKE_AND_FREE.format(first=first)
    return int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc alone")
def test_freed_memory_is_kept() -> None:
    assert 4 * faults("keep_memory()") < faults("")


COMMON = ["--offline", "--device", "cpu", "--dtype", "float32", "--threads", "1"]


@pytest.mark.parametrize(
    "command",
    [
        ["ask", "x.png", "?"], ["caption", "x.png"], ["chat", "x.png"], ["weights", "verify", "nobody/none"],
        ["weights", "average", "out", "a", "b"], ["weights", "resize", "out", "a", "8"],
        ["weights", "shrink", "nowhere"], ["weights", "push", "nowhere", "a/b"], ["train", "no-recipe"],
        ["train", "plan", "no-recipe"], ["train", "selftest", "no-recipe"], ["train", "ladder", "no-recipe"],
        ["train", "card", "nowhere"], ["train", "answers", "nowhere", "x"], ["data", "check", "nowhere"],
        ["train", "consensus", "nowhere", "x"], ["data", "convert", "no-set", "x", "y"],
        ["data", "questions", "nowhere", "y"], ["data", "remember", "nowhere", "y"], ["eval", "no-task"],
        ["eval", "score", "no-task", "--predictions", "x"], ["eval", "compare", "x.json", "y.json"],
        ["eval", "calibrate", "x.json", "--target", "0.5"],
        ["eval", "audit", "no-task", "--predictions", "x"],
        ["serve", "feedback", "export", "--db", "x", "--out", "y"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_every_command_takes_the_common_options(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It fails for what it lacks, in one line, and not for the options: 2 where a name can never be right."""
    from vlm.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wrong = any(word.startswith("no-") for word in command)
    assert main([*command, *COMMON]) == (2 if wrong else 1)
    assert "unrecognized" not in capsys.readouterr().err
