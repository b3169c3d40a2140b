"""VizWiz-VQA: questions by blind people about their own photographs (Gurari et al. 2018).

`accuracy_strict` is by VizWiz's own code: the answer is always normalised, the references never.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.eval.scorers import vqa_scores
from vlm.eval.task import Published, Task
from vlm.eval.tasks import hub
from vlm.eval.tasks.layouts import Entry, Pictures, known, load, rows_of, text_of

HIDDEN = ("test",)
TYPES = ("yes/no", "number", "other", "unanswerable")


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The official file, or lmms-lab/VizWiz-VQA; an example is known by its picture's name, as in the results
    format."""
    hidden = split in HIDDEN
    if hub.holds(root):
        return [
            _example(entry, f"{entry.text('question_id').removesuffix('.jpg')}.jpg", "category")
            for entry in hub.entries(root, split, pictures, hidden=hidden)
        ]
    part = "val" if split == "dev" else split
    path, found = load(
        root, [f"{part}.json", f"Annotations/{part}.json", f"annotations/{part}.json"], "VizWiz file"
    )
    find = Pictures(root, (part, "images", "Images", ""), pictures)
    examples = []
    for row in rows_of(found, path):
        name = text_of(row, "image", path)
        examples.append(_example(Entry(path, row, find(name), hidden=hidden), name, "answer_type"))
    return examples


def _example(entry: Entry, name: str, kind: str) -> Example:
    if entry.kept("answers"):
        return make_example(entry.image, entry.text("question"), (), name, {"key": name})
    answers = entry.texts("answers")
    meta = {"key": name, "answer_type": known(entry[kind], TYPES, name, entry.where)}
    sure = [str(each.get("answer_confidence", "")) for each in entry["answers"] if isinstance(each, Mapping)]
    if sure:  # the hub's answers are texts alone
        meta["confidences"] = "|".join(sure)
    return make_example(entry.image, entry.text("question"), answers, name, meta)


TASKS = (
    Task(
        name="vizwiz",
        about="questions by blind people about their photographs, 10 answers",
        read=read,
        main="accuracy_strict",
        score=vqa_scores("vizwiz"),
        split="dev",
        splits=("train", "dev", "test"),
        hidden=HIDDEN,
        generation={"max_new_tokens": 16},
        id_key="image",
        published=(Published("accuracy_strict", 31.6, "Flamingo-80B, no shots, arXiv:2204.14198, test-dev"),),
    ),
)
