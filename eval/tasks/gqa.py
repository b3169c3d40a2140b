"""GQA: compositional questions from scene graphs, the balanced parts (Hudson and Manning 2019)."""

from __future__ import annotations

from pathlib import Path

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.eval.scorers import exact, item_scores, uniform_chance
from vlm.eval.task import Published, Task
from vlm.eval.tasks.layouts import Pictures, field, load

PARTS = {"train": "train", "dev": "val", "testdev": "testdev"}


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The official question file, and the pictures in images."""
    name = f"{PARTS[split]}_balanced_questions.json"
    path, found = load(root, [name, f"questions1.2/{name}", f"questions/{name}"], "GQA question file")
    find = Pictures(root, ("images", "allImages/images", ""), pictures)
    examples = []
    for id, row in found.items():
        kinds = row.get("types", {}) if isinstance(row, dict) else {}
        meta = {"key": id, "question_type": str(kinds.get("structural", ""))}
        image = find(f"{field(row, 'imageId', path)}.jpg")
        answer = str(field(row, "answer", path))
        examples.append(make_example(image, str(field(row, "question", path)), [answer], id, meta))
    return examples


def equal(answer: str, example: Example) -> float:
    """The official accuracy: the very string."""
    return float(answer == example.answers[0])


TASKS = (
    Task(
        name="gqa",
        about="compositional questions, balanced",
        read=read,
        score=item_scores({"accuracy": equal, "exact_match": exact}),
        split="testdev",
        splits=("train", "dev", "testdev"),
        chance=uniform_chance,
        generation={"max_new_tokens": 8},
        id_key="questionId",
        answer_key="prediction",
        published=(
            Published("accuracy", 41.1, "question only, Hudson and Manning 2019, arXiv:1902.09506, test"),
            Published("accuracy", 54.1, "MAC, Hudson and Manning 2019, arXiv:1902.09506, test"),
            Published("accuracy", 44.7, "BLIP-2 FlanT5-XXL, no shots, arXiv:2301.12597, Table 2, test-dev"),
            Published("accuracy", 89.3, "people, Hudson and Manning 2019, arXiv:1902.09506, test"),
        ),
    ),
)
