"""CHAIR on captions whose objects a person can count."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlm.data.convert.common import make_example
from vlm.eval.compare import compare
from vlm.eval.metrics.chair import chair, chair_counts
from vlm.eval.scorers import object_caption_scores
from vlm.eval.tasks import get

DOG = ["A brown dog runs over the grass .", "The puppy is outside ."]


@pytest.mark.parametrize(
    ("caption", "references", "named", "wrong"),
    [
        ("a dog runs", DOG, 1, 0),
        ("a puppy runs in the snow", DOG, 2, 1),
        ("a cat sits on a bench", DOG, 2, 2),
        ("an animal runs", DOG, 1, 0),  # the references name a kind of it
        ("a horse in a field", ["An animal stands in a field ."], 2, 0),  # and here what it is a kind of
        ("a man holds a guitar", ["A girl plays the guitar ."], 2, 0),  # people are one kind
        ("a man holds a guitar", ["A dog sleeps ."], 2, 2),
        ("a car on the street", ["People walk down a street ."], 2, 0),  # a street may well have one
        ("a boy in a red shirt", ["A boy runs ."], 1, 0),  # clothes are passed over: they are no objects here
        ("a dog collar on a bench", ["A bench ."], 1, 0),  # a dog collar is no dog
        ("two dogs and a dog", ["A cat ."], 2, 2),  # every mention counts, as in the paper
        ("an elephant", ["A dog ."], 1, 1),  # an animal that no question asks after is an object still
        ("", DOG, 0, 0),
    ],
)
def test_counts(caption: str, references: list[str], named: int, wrong: int) -> None:
    assert chair_counts([caption], [references]).tolist() == [[named, wrong]]


def test_shares_are_of_captions_and_of_objects() -> None:
    counts = chair_counts(["a dog runs", "a cat sits on a bench"], [DOG, DOG])
    assert chair(counts.sum(axis=0)) == pytest.approx([100 * 2 / 3])
    assert chair(np.zeros(2)).tolist() == [0.0]


def test_beside_the_other_caption_scores() -> None:
    said = ["a dog runs", "a cat sits on a bench", "a dog in the snow", "something"]
    examples = [make_example("x.jpg", "Describe the picture.", DOG, str(n)) for n in range(4)]
    scores = object_caption_scores(examples, said, java=False)
    assert scores.main == "cider"
    assert scores.metrics["chair_s"] == 50.0
    assert scores.metrics["chair_i"] == pytest.approx(60.0)
    assert scores.per_item["chair_s"].tolist() == [0.0, 100.0, 100.0, 0.0]
    for name in ("chair_s", "chair_i"):
        low, high = scores.intervals[name]
        assert 0 <= low < scores.metrics[name] < high <= 100
    nothing = object_caption_scores(examples, ["something"] * 4, java=False)
    assert nothing.metrics["chair_s"] == 0.0
    assert "chair_i" not in nothing.metrics
    assert nothing.skipped["chair_i"] == "no caption names an object"


def test_fewer_are_better_where_runs_are_compared(tmp_path: Path) -> None:
    from vlm.eval.main import main

    (tmp_path / "Flickr_8k.devImages.txt").write_text("a.jpg\nb.jpg\n", encoding="utf-8")
    rows = [f"{name},{text}" for name in ("a.jpg", "b.jpg") for text in DOG]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *rows]), encoding="utf-8")
    assert len(get("flickr8k").examples(tmp_path, "dev", pictures=False)) == 2
    outs = []
    for name, said in (("one", "a cat runs"), ("two", "a dog runs")):
        file = tmp_path / f"{name}.txt"
        file.write_text(f"{said}\na dog\n", encoding="utf-8")
        outs.append(tmp_path / f"{name}.json")
        where = ["--data", str(tmp_path), "--predictions", str(file), "--out", str(outs[-1]), "--no-java"]
        assert main(["score", "flickr8k", *where]) == 0
    row = compare(*outs)["metrics"]["chair_s"]
    assert (row["difference"], row["better"], row["worse"]) == (-50.0, 1, 0)
    assert json.loads(outs[0].read_text(encoding="utf-8"))["metrics"]["chair_i"] == 50.0
    assert "chair_s (lower is better)" in outs[0].with_suffix(".html").read_text(encoding="utf-8")
