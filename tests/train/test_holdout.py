"""What is asked of the pictures that were set aside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from vlm.conversation import ImageSlot, Turn
from vlm.data.example import Example
from vlm.eval import tasks
from vlm.train.config import SourceConfig
from vlm.train.holdout import MOST, Asked, Held
from vlm.train.prepare import read_source, set_aside

if TYPE_CHECKING:
    from vlm.train.config import TrainConfig


def examples(count: int) -> list[Example]:
    """Two questions about each picture, sorted by subject as people's tables often are."""
    turn = Turn("user", (ImageSlot(0), "What is it?"))
    return [Example((f"{n // 2}.png",), (turn,), ("dog",), str(n)) for n in range(count)]


def asked(held: Held) -> dict[str, object]:
    answers = Asked(["dog"] * len(held.chosen), {"questions: exact match": 100.0})
    return held.report(vars(answers), vars(answers))


def test_some_of_many_are_drawn_from_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    many = examples(3 * MOST)
    held = Held(many)
    places = [int(example.id) for example in held.chosen]
    assert len(set(places)) == MOST
    assert places == sorted(places)
    assert {place // MOST for place in places} == {0, 1, 2}
    assert held.chosen == Held(many).chosen, "a continued run asks the same ones"
    found = asked(held)
    pictures = len({place // 2 for place in places})
    assert (found["pictures"], found["set_aside"]) == (pictures, 3 * MOST)
    held.show(found)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{pictures} pictures that training has not seen ({MOST} of {3 * MOST} examples asked)" in said


def test_few_are_all_asked(capsys: pytest.CaptureFixture[str]) -> None:
    held = Held(examples(10))
    assert held.chosen == held.examples
    held.show(asked(held))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.strip() == "5 pictures that training has not seen"


def test_what_is_set_aside_of_a_folder_is_what_dev_asks_about(
    recipe: Callable[..., TrainConfig], tmp_path: Path, draw: Callable[..., Any]
) -> None:
    rows = ["file_name,question,answer"]
    for number in range(20):
        draw(number).save(tmp_path / f"{number}.png")
        rows += [f"{number}.png,What is it?,dog", f"{number}.png,And this?,man"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows) + "\n")
    config = recipe(sources=(SourceConfig(),), data=str(tmp_path), holdout=0.2)
    kept, held = set_aside([read_source(config.sources[0], config)], config.holdout)
    dev, rest = (tasks.get("folder-vqa").examples(tmp_path, part) for part in ("dev", "train-rest"))
    assert _asked(held) == _asked(dev)
    assert _asked(kept[0].examples) == _asked(rest)
    assert (len(dev), len(rest)) == (8, 32)


def _asked(examples: Sequence[Example]) -> set[tuple[str, str]]:
    return {(str(example.images[0]), example.turns[0].text) for example in examples}
