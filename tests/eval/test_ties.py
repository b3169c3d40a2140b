"""A real (tiny) model through the whole command: batches, processes, near ties, maps, controls."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vlm.conversation import Conversation
from vlm.eval.compare import compare
from vlm.eval.main import main

if TYPE_CHECKING:
    from PIL import Image

    from vlm.model import VLM

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ("what?", "what is on the grass in the picture?", "is the man in the red shirt? " * 4)
PICTURES = 6


@pytest.fixture(scope="module")
def place(
    make_tiny: Callable[..., VLM], draw: Callable[..., Image.Image], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A saved tiny model, and questions about six pictures, every second of which it gets right."""
    from vlm.checkpoint import save_adapter

    root = tmp_path_factory.mktemp("ties")
    model = make_tiny()
    save_adapter(model, root / "adapter")
    for split in ("train", "test"):
        folder = root / "data" / split
        folder.mkdir(parents=True)
        rows = []
        for number in range(PICTURES):
            draw(number).save(folder / f"{number}.png")
            picture = folder / f"{number}.png"
            for at, asked in enumerate(QUESTIONS):
                said = model.ask_batch([Conversation.ask([picture], asked)], max_new_tokens=24)[0].text
                rows.append(
                    {
                        "file_name": f"{number}.png",
                        "question": asked,
                        "answer": said if (number + at) % 2 and said else "no",
                    }
                )
        (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


@pytest.fixture
def surroundings(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLM_CACHE", str(place / "cache"))


def command(place: Path, out: Path, batch: int, *extra: str) -> list[str]:
    named = ["--data", str(place / "data"), "--adapter", str(place / "adapter"), "--out", str(out)]
    sizes = ["--batch-size", str(batch), "--feature-cache", str(out.with_suffix(".features"))]
    return ["folder-vqa", *named, *sizes, "--offline", "--threads", "1", "--device", "cpu", *extra]


def read(out: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The report without its times, and its items."""
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    lines = out.with_name(f"{out.stem}.items.jsonl").read_text(encoding="utf-8").splitlines()
    report = {key: value for key, value in found.items() if key not in ("seconds", "predictions")}
    return report, [json.loads(line) for line in lines]


def alike(one: Path, other: Path) -> None:
    """The same report but for its times, and the same items but for the last bits."""
    (report, rows), (other_report, other_rows) = read(one), read(other)
    assert report == other_report
    assert [row["answer"] for row in rows] == [row["answer"] for row in other_rows]
    for name in ("logprob", "margin"):
        assert [row[name] for row in rows] == pytest.approx([row[name] for row in other_rows], abs=1e-3)


@pytest.mark.usefixtures("surroundings")
def test_batches_and_processes_give_the_same_report(place: Path, tmp_path: Path) -> None:
    whole, single, two = (tmp_path / f"{name}.json" for name in ("whole", "single", "two"))
    assert main(command(place, whole, 32)) == 0
    assert main(command(place, single, 1)) == 0
    alike(whole, single)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "vlm", "eval", *command(place, two, 3)],
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": str(ROOT)},
        )
        for rank in (0, 1)
    ]
    assert [each.wait(timeout=200) for each in both] == [0, 0]
    alike(whole, two)
    report, rows = read(whole)
    assert report["near_ties"] == sum(row["margin"] < 1e-3 for row in rows)
    assert 30 < report["metrics"]["exact_match"] < 70
    assert len({row["answer"] for row in rows}) > 3
    assert report["controls"]["prior"]["metrics"] is not None
    found = compare(whole, two)
    assert (found["answers_differ"], found["near_ties"]) == (0, 0)


@pytest.mark.usefixtures("surroundings")
def test_beams_in_batches_of_any_size(place: Path, tmp_path: Path) -> None:
    whole, single = tmp_path / "whole.json", tmp_path / "single.json"
    for out, batch in ((whole, 32), (single, 1)):
        extra = ("--beams", "3", "--max-new-tokens", "8", "--controls", "none", "--no-html")
        assert main(command(place, out, batch, *extra)) == 0
    alike(whole, single)


@pytest.mark.usefixtures("surroundings")
def test_maps_of_the_best_and_the_worst(place: Path, tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    assert main(command(place, out, 32, "--maps", "2", "--controls", "none")) == 0
    report, rows = read(out)
    ranked = sorted(rows, key=lambda row: (row["scores"]["exact_match"], row["id"]))
    drawn = [row["id"] for row in rows if "maps" in row]
    assert sorted(drawn) == sorted(row["id"] for row in (*ranked[:2], *ranked[-2:]))
    for row in rows:
        for grid in row.get("maps", ()):
            assert len(grid) == len(grid[0]) > 1
            assert max(map(max, grid)) == 1.0
            assert min(map(min, grid)) >= 0.0
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    assert len(re.findall('class="map"', page)) == 4
    assert report["maps"] == 2
