"""VQA-RAD: questions about radiology images (Lau et al. 2018), closed and open ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.eval.scorers import exact, item_scores, uniform_chance
from vlm.eval.task import Published, Task
from vlm.eval.tasks import hub
from vlm.eval.tasks.layouts import Entry, Pictures, known, load, rows_of, text_of

FILES = ("VQA_RAD Dataset Public.json", "VQA_RAD_Dataset_Public.json", "dataset.json")
TEST_FILE, TRAIN_FILE = "testset.json", "trainset.json"  # as MEVF and later papers divide the public file
FOLDERS = ("VQA_RAD Image Folder", "VQA_RAD_Image_Folder", "images", "")


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The public file, whose test questions are those whose phrase type begins with "test"; or trainset.json
    and testset.json; or flaviagiammarino/vqa-rad."""
    if hub.holds(root):
        return [_from_hub(entry) for entry in hub.entries(root, split, pictures)]
    own = (TEST_FILE, TRAIN_FILE) if split == "test" else (TRAIN_FILE,)  # that may be the whole file, too
    path, found = load(root, [*FILES, *own], "VQA-RAD file")
    find = Pictures(root, FOLDERS, pictures)
    examples = []
    for row in rows_of(found, path):
        tests = path.name == TEST_FILE or text_of(row, "phrase_type", path).startswith("test")
        if tests != (split == "test"):
            continue
        examples.append(_example(Entry(path, row, find(text_of(row, "image_name", path)))))
    return examples


def _from_hub(entry: Entry) -> Example:
    """The hub's rows have neither ids nor types: their number is the id, and a question is closed if its
    answer is yes or no, which is the data set card's definition; of the official closed questions some
    offer other words."""
    closed = entry.text("answer").strip().lower() in ("yes", "no")
    supplied = {"qid": entry.number, "answer_type": "CLOSED" if closed else "OPEN"}
    return _example(replace(entry, row=supplied | dict(entry.row)))


def _example(entry: Entry) -> Example:
    id = entry.text("qid")
    kind = known(entry.text("answer_type").strip(), ("CLOSED", "OPEN"), id, entry.where)
    asks = str(entry.row.get("question_type", ""))
    meta = {"key": id, "answer_type": kind.lower(), "question_type": asks}
    answer = entry.text("answer").strip().lower()
    return make_example(entry.image, entry.text("question"), [answer], id, meta)


def _of(kind: str, answer: str, example: Example) -> float:
    return exact(answer, example) if example.meta["answer_type"] == kind else float("nan")


TASKS = (
    Task(
        name="vqa-rad",
        about="radiology, yes/no and open questions",
        read=read,
        main="exact_match",
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
