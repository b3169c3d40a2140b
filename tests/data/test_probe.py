"""Is there an X? Golden questions from a handful of captions, and what holds for the real set."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

import pytest

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.data.lexicon import load
from vlm.data.picture import PictureText
from vlm.data.probe import PICTURES, SETTINGS, THINGS, presence_probe
from vlm.data.sources import read_dataset

CAPTIONS = {
    "beach": ["A dog runs on the beach .", "A dog at the beach .", "The dog is wet ."],
    "snow": ["A dog has a frisbee in the snow .", "A dog plays in snow .", "A dog with a frisbee ."],
    "garden": ["A dog with a frisbee .", "The dog has a frisbee .", "A dog and a fence .", "A fence ."],
    "table": ["A guitar lies on a table .", "A table with a guitar .", "A guitar ."],
    "stage": ["A guitar on a bed .", "The guitar lies on the bed .", "A bed ."],
}


def examples() -> list[Example]:
    return [make_example(f"{name}.jpg", "Describe.", texts, name) for name, texts in CAPTIONS.items()]


def things(found: list[Example], picture: str, setting: str, answer: str) -> set[str]:
    return {
        example.meta["thing"]
        for example in found
        if example.id.startswith(f"{picture}#{setting}/") and example.answers == (answer,)
    }


def test_golden() -> None:
    found = presence_probe(examples())
    for setting in SETTINGS:
        assert things(found, "beach", setting, "yes") == {"dog", "beach"}
        assert things(found, "table", setting, "yes") == {"guitar", "table"}
        assert things(found, "garden", setting, "yes") == {"dog", "frisbee", "fence"}
    # With a dog elsewhere: a frisbee twice, then a fence and snow; with a guitar: a table.
    assert things(found, "beach", "adversarial", "no") == {"frisbee", "fence"}
    assert "table" in things(found, "stage", "adversarial", "no")
    assert "table" not in things(found, "stage", "popular", "no")
    # Most pictures show a dog, then frisbees and guitars.
    assert things(found, "table", "popular", "no") == {"dog", "frisbee"}
    assert things(found, "beach", "popular", "no") == {"frisbee", "guitar"}
    asked = {example.turns[0].text for example in found}
    assert "Is there a dog in the picture?" in asked
    assert "Is there snow in the picture?" in asked


def test_neither_the_order_nor_the_day_matters() -> None:
    found = presence_probe(examples())
    again = presence_probe(examples()[::-1])
    assert [(e.id, e.answers) for e in again] == [(e.id, e.answers) for e in found]
    other = presence_probe(examples(), seed=1)
    assert {e.id for e in other} != {e.id for e in found}


def test_on_real_captions(datasets_dir: Path) -> None:
    source = read_dataset("flickr8k", datasets_dir, "dev")
    lexicon = load()
    pictures = {e.id: PictureText.read(e, lexicon) for e in source}
    found = presence_probe(source)
    assert len({e.id for e in found}) == len(found)
    by_picture: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for example in found:
        picture, _, rest = example.id.rpartition("#")
        by_picture[picture, rest.partition("/")[0]][example.answers[0]] += 1
        thing, text = example.meta["thing"], pictures[picture]
        assert text.surely_has(thing) if example.answers == ("yes",) else text.surely_lacks(thing)
    assert len(by_picture) == PICTURES * len(SETTINGS)
    assert all(2 <= row["yes"] == row["no"] <= THINGS for row in by_picture.values())
    absent = [example for example in found if example.answers == ("no",)]
    kinds = {s: {e.meta["thing"] for e in absent if f"#{s}/" in e.id} for s in SETTINGS}
    # Absent things drawn at random are of many kinds, popular ones of few.
    assert len(kinds["popular"]) < len(kinds["adversarial"]) < len(kinds["random"]) / 2


@pytest.mark.parametrize("answer", ["yes", "no"])
def test_the_task_scores_each_setting(answer: str, tmp_path: Path) -> None:
    from vlm.eval.tasks import get

    lists = "\n".join(f"{name}.jpg" for name in CAPTIONS)
    (tmp_path / "Flickr_8k.devImages.txt").write_text(lists, encoding="utf-8")
    rows = [f"{name}.jpg#{n}\t{text}" for name, texts in CAPTIONS.items() for n, text in enumerate(texts)]
    (tmp_path / "Flickr8k.token.txt").write_text("\n".join(rows), encoding="utf-8")
    task = get("flickr8k-pope")
    asked = task.examples(tmp_path, None, pictures=False)
    assert {e.id.partition("#")[0] for e in asked} == {f"flickr8k/{name}.jpg" for name in CAPTIONS}
    scores = task.scores(asked, [answer] * len(asked))
    assert scores.main == "accuracy"
    for setting in SETTINGS:
        row = scores.breakdown[f"setting={setting}"]
        assert row["n"] == len(asked) / 3
        assert (row["accuracy"], row["yes_rate"]) == (50.0, 100.0 * (answer == "yes"))
        assert row["f1"] == pytest.approx(200 / 3 if answer == "yes" else 0.0)
    right = task.scores(asked, [example.answers[0] for example in asked])
    assert right.breakdown["setting=adversarial"]["f1"] == 100.0
    assert task.chance(asked) == 50.0
