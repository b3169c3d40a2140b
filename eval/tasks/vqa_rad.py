"""VQA-RAD: questions about radiology images (Lau et al. 2018), closed and open ones."""

from __future__ import annotations

from pathlib import Path

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.eval.scorers import exact, item_scores, uniform_chance
from vlm.eval.task import Published, Task
from vlm.eval.tasks.layouts import Pictures, field, known, load

FILES = ("VQA_RAD Dataset Public.json", "VQA_RAD_Dataset_Public.json", "trainset.json", "dataset.json")
FOLDERS = ("VQA_RAD Image Folder", "VQA_RAD_Image_Folder", "images", "")


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The public file; its test questions are those whose phrase type begins with "test"."""
    path, rows = load(root, FILES, "VQA-RAD file")
    find = Pictures(root, FOLDERS, pictures)
    examples = []
    for row in rows:
        if str(field(row, "phrase_type", path)).startswith("test") != (split == "test"):
            continue
        id = str(field(row, "qid", path))
        kind = known(str(field(row, "answer_type", path)).strip(), ("CLOSED", "OPEN"), id, path)
        meta = {"key": id, "answer_type": kind.lower(), "question_type": str(row.get("question_type", ""))}
        image = find(str(field(row, "image_name", path)))
        answer = str(field(row, "answer", path)).strip().lower()
        examples.append(make_example(image, str(field(row, "question", path)), [answer], id, meta))
    return examples


def _of(kind: str, answer: str, example: Example) -> float:
    return exact(answer, example) if example.meta["answer_type"] == kind else float("nan")


TASKS = (
    Task(
        name="vqa-rad",
        about="radiology, yes/no and open questions",
        read=read,
        score=item_scores(
            {
                "exact_match": exact,
                "closed": lambda answer, example: _of("closed", answer, example),
                "open": lambda answer, example: _of("open", answer, example),
            },
            by=("answer_type", "question_type"),
        ),
        split="test",
        splits=("train", "test"),
        chance=uniform_chance,
        generation={"max_new_tokens": 16},
        id_key="qid",
        published=(
            Published("closed", 75.1, "MEVF and BAN, Nguyen et al. 2019, arXiv:1909.11867, test"),
            Published("open", 43.9, "MEVF and BAN, Nguyen et al. 2019, arXiv:1909.11867, test"),
        ),
    ),
)
