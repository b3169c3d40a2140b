"""The model card says what the reports hold, draws what can be drawn of them, refuses what is no report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vlm.adapter_file import read_adapter
from vlm.checkpoint import save_adapter
from vlm.errors import DataError
from vlm.train.card import main, write_card

if TYPE_CHECKING:
    from vlm.model import VLM
    from vlm.train.config import TrainConfig


def report(path: Path, task: str, metric: str, **other: Any) -> Path:
    found = {
        "task": task,
        "split": "dev",
        "n": 1000,
        "comparable": False,
        "main_metric": metric,
        "metrics": {metric: 61.25},
        "intervals": {metric: [58.0, 64.5]},
        "controls": {"blank": {"metrics": {metric: 12.5}}, "prior": {"metrics": None, "reason": "no train"}},
        "decoding": {"num_beams": 3},
        "hashes": {"adapter": "ab" * 32},
        "calibration": {"curve": [[50.0, 61.25]], "risk": [[50.0, 80.0], [100.0, 61.25]]},
    } | other
    path.write_text(json.dumps(found), "utf-8")
    return path


@pytest.fixture
def folder(make_tiny: Callable[..., VLM], tmp_path: Path) -> Path:
    save_adapter(make_tiny("flamingo"), tmp_path / "mine", card="")
    return tmp_path / "mine"


def test_scores_stand_beside_their_controls(folder: Path, tmp_path: Path) -> None:
    of_another = report(tmp_path / "b.json", "flickr8k-yesno", "exact_match")
    with pytest.raises(DataError, match="of another adapter"):
        main([str(folder), "--reports", str(of_another)])
    hashes = {"adapter": read_adapter(folder).sha256}
    answers = report(tmp_path / "a.json", "flickr8k-yesno", "exact_match", hashes=hashes)
    assert main([str(folder), "--reports", str(answers)]) == 0
    text = (folder / "README.md").read_text("utf-8")
    for part in ("### flickr8k-yesno, dev (1,000 examples; limited", "| exact_match | 61.2 | 58.0 to 64.5 |",
                 "| exact_match, control: blank | 12.5 |", "(no train)", "num_beams 3"):  # fmt: skip
        assert part in text
    assert "](risk.png)" in text
    assert (folder / "risk.png").read_bytes().startswith(b"\x89PNG")
    assert "--abstain" not in text  # nobody has fitted a threshold


def test_a_fitted_threshold_is_told(folder: Path, tmp_path: Path) -> None:
    about = json.loads((folder / "config.json").read_text("utf-8"))
    about["abstain"] = {"threshold": 0.7941, "task": "flickr8k-yesno", "split": "dev", "target": 0.8,
                        "accuracy": 0.801, "coverage": 0.72}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(about), "utf-8")
    write_card(folder, [report(tmp_path / "a.json", "flickr8k-yesno", "exact_match")])
    text = (folder / "README.md").read_text("utf-8")
    assert "a confidence of 0.79 or more: 72 % of the questions of flickr8k-yesno, dev, 80 % of them" in text


def test_the_loss_of_pictures_set_aside_is_told(recipe: Callable[..., TrainConfig]) -> None:
    from vlm.train.run import train

    config = recipe(dev=4, steps=1)
    assert train(config, offline=True)
    loss = json.loads((Path(config.out) / "dev.json").read_text("utf-8"))["loss"]
    card = (Path(config.out) / "README.md").read_text("utf-8")
    assert f"| loss of pictures set aside | {loss:.3f} nats per token, 4 pictures |" in card


def test_captions_are_neither_right_nor_wrong(folder: Path, tmp_path: Path) -> None:
    write_card(folder, [report(tmp_path / "c.json", "flickr8k", "cider")])
    assert "risk.png" not in (folder / "README.md").read_text("utf-8")
    assert not (folder / "risk.png").exists()


def test_no_report_is_no_card(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]", "utf-8")
    before = (folder / "README.md").read_bytes()
    report(tmp_path / "bare.json", "vqav2", "accuracy_strict", metrics=None, reason="not published")
    for name in ("list.json", "missing.json", "bare.json holds no scores: not published"):
        with pytest.raises(DataError, match=name):
            write_card(folder, [tmp_path / name.partition(" ")[0]])
    assert (folder / "README.md").read_bytes() == before
