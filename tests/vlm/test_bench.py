"""`vlm bench ask` on a small model: real processes, real answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vlm.bench.ask import main

if TYPE_CHECKING:
    from vlm.model import VLM


def test_times_a_whole_process_and_many_answers(
    make_tiny: Callable[..., VLM], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.checkpoint import save_adapter

    model = make_tiny()
    save_adapter(model, tmp_path / "adapter")
    words = ["--adapter", str(tmp_path / "adapter"), "--repeats", "1", "--pictures", "2", "--threads", "1"]
    assert main([*words, "--offline", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    seconds = found["command"]["seconds"]
    assert 0 < seconds["load"] < seconds["total"]
    assert found["command"]["peak_memory"] > 100e6
    assert found["many"]["pictures"] == 2
    for job in ("answers", "captions"):
        row = found["many"][job]
        assert row["packed / plain"] == pytest.approx(row["packed"] / row["plain"], rel=0.2)


def test_wrong_numbers_are_usage_errors() -> None:
    with pytest.raises(SystemExit) as left:
        main(["--repeats", "0"])
    assert left.value.code == 2
