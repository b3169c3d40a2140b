"""Rows as instruction files have them: one picture in several places, too many pictures, too many words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from vlm.train.config import TrainConfig

Recipe = Callable[..., "TrainConfig"]
COUNT = 8


def talk(id: str, asked: str, answer: str, *images: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": list(images), "conversations": turns}


@pytest.fixture
def mix(tmp_path: Path, draw: Callable[..., Any]) -> Callable[..., Path]:
    """`mix(*rows)`: 8 pictures, 240 rows about one of them each, and some rows more."""

    def make(*more: dict[str, Any]) -> Path:
        folder = tmp_path / "mix"
        folder.mkdir()
        for number in range(COUNT):
            draw(number).save(folder / f"{number}.png")
        rows = [talk(f"r{n}", f"<image>\nWhat is {n}?", "dog", f"{n % COUNT}.png") for n in range(240)]
        (folder / "mix.json").write_text(json.dumps([*rows, *more]))
        return folder

    return make


def learn(recipe: Recipe, folder: Path, **keys: Any) -> tuple[bool, dict[str, Any]]:
    from vlm.train.config import SourceConfig
    from vlm.train.run import train

    keys = {"steps": 2, "batch": 16} | keys
    config = recipe(sources=(SourceConfig(per_image=2),), data=str(folder), **keys)
    return train(config, offline=True), json.loads((Path(config.out) / "run.json").read_text())


def test_pictures_may_stand_in_other_places_of_another_row(mix: Callable[..., Path], recipe: Recipe) -> None:
    two = ("0.png", "1.png")
    beside = talk("a", "<image>\n<image>\nAlike?", "no", *two)
    apart = talk("b", "Is <image> like <image>?", "no", *two)
    done, facts = learn(recipe, mix(beside, apart))
    assert done and facts["left_out"] == []


@pytest.mark.parametrize("holdout", [0.0, 0.5])
def test_what_the_model_cannot_read_whole_is_left_out_before_the_first_step(
    mix: Callable[..., Path], recipe: Recipe, holdout: float
) -> None:
    long = talk("long", "<image>\nWhat?", "word " * 4_000, "0.png")
    many = talk("many", "<image>" * 20 + "Alike?", "no", *["1.png"] * 20)
    done, facts = learn(recipe, mix(long, many), holdout=holdout)
    assert done
    assert sorted(row.split(":")[0] for row in facts["left_out"]) == ["long", "many"]
    assert all(": too much for the model (" in row for row in facts["left_out"])
