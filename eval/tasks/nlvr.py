"""NLVR: is a sentence true of a picture of shapes? (Suhr et al. 2017), from its PNGs."""

from __future__ import annotations

from pathlib import Path

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.eval.scorers import exact, half, item_scores, neither
from vlm.eval.task import Published, Task
from vlm.eval.tasks.layouts import Pictures, field, json_lines, known

PROMPT = "{} Is this true, yes or no?"
ANSWERS = {"true": "yes", "false": "no"}


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The official JSON lines, and for each sentence the first rendering of its structure."""
    path, rows = json_lines(root, [f"{split}/{split}.json", f"{split}.json"], "NLVR file")
    find = Pictures(root, (f"{split}/images", "images", ""), pictures)
    examples = []
    for row in rows:
        id = str(field(row, "identifier", path))
        label = known(str(field(row, "label", path)).lower(), ("true", "false"), id, path)
        name = f"{split}-{id}-0.png"
        image = find(f"{field(row, 'directory', path)}/{name}", name)
        question = PROMPT.format(str(field(row, "sentence", path)).strip())
        examples.append(make_example(image, question, [ANSWERS[label]], id))
    return examples


def _right(answer: str, example: Example) -> float:
    """The official format says true and false."""
    return exact(ANSWERS.get(answer.strip().lower(), answer), example)


TASKS = (
    Task(
        name="nlvr",
        about="is a sentence true of a picture of shapes?",
        read=read,
        main="accuracy",
        score=item_scores({"accuracy": _right}),
        split="dev",
        splits=("train", "dev", "test"),
        chance=half,
        unparsed=neither,
        generation={"max_new_tokens": 4},
        id_key="identifier",
        published=(Published("accuracy", 66.1, "module networks, Suhr et al. 2017, ACL P17-2034, Test-P"),),
    ),
)
