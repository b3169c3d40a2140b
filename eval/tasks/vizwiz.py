"""VizWiz-VQA: questions by blind people about their own photographs (Gurari et al. 2018)."""

from __future__ import annotations

from pathlib import Path

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.eval.scorers import vqa_scores
from vlm.eval.task import Published, Task
from vlm.eval.tasks.layouts import Pictures, field, known, load

TYPES = ("yes/no", "number", "other", "unanswerable")


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The official file; an example is known by its picture's name, as in the results format."""
    part = "val" if split == "dev" else split
    path, rows = load(
        root, [f"{part}.json", f"Annotations/{part}.json", f"annotations/{part}.json"], "VizWiz file"
    )
    find = Pictures(root, (part, "images", "Images", ""), pictures)
    examples = []
    for row in rows:
        name = str(field(row, "image", path))
        answers = [str(field(each, "answer", path)) for each in field(row, "answers", path)]
        meta = {
            "key": name,
            "answer_type": known(row.get("answer_type", "other"), TYPES, name, path),
            "confidences": "|".join(str(each.get("answer_confidence", "")) for each in row["answers"]),
        }
        examples.append(make_example(find(name), str(field(row, "question", path)), answers, name, meta))
    return examples


TASKS = (
    Task(
        name="vizwiz",
        about="questions by blind people about their photographs, 10 answers",
        read=read,
        score=vqa_scores,
        split="dev",
        splits=("train", "dev"),
        generation={"max_new_tokens": 16},
        id_key="image",
        published=(Published("accuracy_strict", 31.6, "Flamingo-80B, no shots, arXiv:2204.14198, test-dev"),),
    ),
)
