"""GQA: compositional questions from scene graphs, the balanced parts (Hudson and Manning 2019)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.errors import DataError
from vlm.eval.scorers import exact, item_scores, uniform_chance
from vlm.eval.task import Published, Task
from vlm.eval.tasks import hub
from vlm.eval.tasks.layouts import Entry, Pictures, load, rows_by_id, text_of

PARTS = {
    "train": "train_balanced",
    "dev": "val_balanced",
    "testdev": "testdev_balanced",
    "test": "test_balanced",
    "challenge": "challenge_balanced",
    "submission": "submission_all",
}
HIDDEN = ("test", "challenge", "submission")  # the server takes answers to the last, which holds the others


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The official question file, and the pictures in images; or lmms-lab/GQA."""
    hidden = split in HIDDEN
    if hub.holds(root):
        return _from_hub(root, PARTS[split], pictures, hidden)
    name = f"{PARTS[split]}_questions.json"
    path, found = load(root, [name, f"questions1.2/{name}", f"questions/{name}"], "GQA question file")
    find = Pictures(root, ("images", "allImages/images", ""), pictures)
    examples = []
    for id, row in rows_by_id(found, path).items():
        image = find(f"{text_of(row, 'imageId', path)}.jpg")
        examples.append(_example(Entry(path, row, image, hidden=hidden), id))
    return examples


def _from_hub(root: Path | None, tables: str, pictures: bool, hidden: bool) -> list[Example]:
    """The hub has the questions and the pictures in two tables."""
    part = tables.partition("_")[0]
    asked = list(hub.entries(root, part, False, config=f"{tables}_instructions", hidden=hidden))
    if pictures:
        table = hub.entries(root, part, True, config=f"{tables}_images")
        stored = {str(entry["id"]): entry.image for entry in table}
        for number, entry in enumerate(asked):
            name = entry.text("imageId")
            if name not in stored:
                raise DataError(f"{entry.where}: {tables}_images has no picture {name}")
            asked[number] = replace(entry, image=stored[name])
    return [_example(entry, entry.text("id")) for entry in asked]


def _example(entry: Entry, id: str) -> Example:
    kinds = rows_by_id(entry.row.get("types") or {}, entry.where)
    meta = {"key": id, "question_type": str(kinds.get("structural", ""))}
    answers = [] if entry.kept("answer") else [entry.text("answer")]
    return make_example(entry.image, entry.text("question"), answers, id, meta)


def equal(answer: str, example: Example) -> float:
    """The official accuracy: the very string."""
    return float(answer == example.answers[0])


TASKS = (
    Task(
        name="gqa",
        about="compositional questions, balanced",
        read=read,
        main="accuracy",
        score=item_scores({"accuracy": equal, "exact_match": exact}),
        split="testdev",
        splits=tuple(PARTS),
        hidden=HIDDEN,
        chance=uniform_chance,
        generation={"max_new_tokens": 8},
        id_key="questionId",
        answer_key="prediction",
        surplus=True,  # those of the unbalanced part
        published=(
            Published("accuracy", 41.1, "question only, Hudson and Manning 2019, arXiv:1902.09506, test"),
            Published("accuracy", 54.1, "MAC, Hudson and Manning 2019, arXiv:1902.09506, test"),
            Published("accuracy", 44.7, "BLIP-2 FlanT5-XXL, no shots, arXiv:2301.12597, Table 2, test-dev"),
            Published("accuracy", 89.3, "people, Hudson and Manning 2019, arXiv:1902.09506, test"),
        ),
    ),
)
