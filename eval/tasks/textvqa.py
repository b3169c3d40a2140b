"""TextVQA: questions that need reading (Singh et al. 2019).

`accuracy_strict` is by EvalAI's answer processor, as figures are published since M4C.
"""

from __future__ import annotations

from pathlib import Path

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.eval.metrics.answers import anls
from vlm.eval.scorers import item_scores, vqa_metrics
from vlm.eval.task import Published, Task
from vlm.eval.tasks import hub
from vlm.eval.tasks.layouts import Entry, Pictures, load, rows_of, text_of

HIDDEN = ("test",)


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The official file, and the pictures in train_images or test_images; or lmms-lab/textvqa."""
    hidden = split in HIDDEN
    if hub.holds(root):
        return [_example(entry) for entry in hub.entries(root, split, pictures, hidden=hidden)]
    part = "val" if split == "dev" else split
    path, found = load(root, [f"TextVQA_0.5.1_{part}.json"], "TextVQA file")
    find = Pictures(root, ("train_images", "images", "test_images", ""), pictures)
    return [
        _example(Entry(path, row, find(f"{text_of(row, 'image_id', path)}.jpg"), hidden=hidden))
        for row in rows_of(found, path, "data")
    ]


def _example(entry: Entry) -> Example:
    id = entry.text("question_id")
    return make_example(entry.image, entry.text("question"), entry.published("answers"), id)


def _anls(answer: str, example: Example) -> float:
    return anls(answer, example.answers)


TASKS = (
    Task(
        name="textvqa",
        about="questions that need reading, 10 answers",
        read=read,
        main="accuracy_strict",
        score=item_scores({**vqa_metrics("textvqa"), "anls": _anls}),
        split="dev",
        splits=("train", "dev", "test"),
        hidden=HIDDEN,
        generation={"max_new_tokens": 16},
        published=(
            Published("accuracy_strict", 26.6, "LoRRA, Singh et al. 2019, arXiv:1904.08920, val"),
            Published("accuracy_strict", 39.4, "M4C, Hu et al. 2020, arXiv:1911.06258, val"),
        ),
    ),
)
