"""POPE: is there an X in the picture? Three settings of the absent objects (Li et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.eval.metrics.answers import POPE, pope_answer, pope_counts, pope_metrics, pope_scores
from vlm.eval.scorers import half, item_scores, neither
from vlm.eval.stats import corpus_interval
from vlm.eval.task import Published, Scores, Task
from vlm.eval.tasks import hub
from vlm.eval.tasks.layouts import COCO_FOLDERS, Entry, Pictures, json_lines, known, text_of

SETTINGS = ("random", "popular", "adversarial")


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The official JSON lines of a setting, and COCO's val2014 pictures; or lmms-lab/POPE."""
    if hub.holds(root):
        found = hub.entries(root, split, pictures, names=(split, "test"))
        return [_example(entry, "question", "answer") for entry in found if entry["category"] == split]
    name = f"coco_pope_{split}.json"
    path, rows = json_lines(root, [name, f"coco/{name}", f"output/coco/{name}"], "POPE file")
    find = Pictures(root, COCO_FOLDERS, pictures)
    examples = []
    for row in rows:
        examples.append(_example(Entry(path, row, find(text_of(row, "image", path))), "text", "label"))
    return examples


def _example(entry: Entry, asked: str, said: str) -> Example:
    id = entry.text("question_id")
    label = known(entry.text(said).strip().lower(), ("yes", "no"), id, entry.where)
    return make_example(entry.image, entry.text(asked), [label], id)


def _accuracy(answer: str, example: Example) -> float:
    return float(pope_answer(answer) == example.answers[0])


def score(examples: Sequence[Example], answers: Sequence[str]) -> Scores:
    """Accuracy first, then precision, recall, F1, the rate of yes and of unparsed answers; all by setting
    where the examples name theirs."""
    found = item_scores({"accuracy": _accuracy})(examples, answers)
    labels = [example.answers[0] for example in examples]
    settings = [str(example.meta.get("setting", "")) for example in examples]
    table: dict[str, dict[str, float]] = {}
    for setting in filter(None, dict.fromkeys(settings)):
        places = [number for number, each in enumerate(settings) if each == setting]
        row = pope_metrics([answers[n] for n in places], [labels[n] for n in places])
        table[f"setting={setting}"] = {"n": len(places), **row}
    ends = corpus_interval(pope_counts(answers, labels), pope_scores)
    intervals = {name: (float(low), float(high)) for name, (low, high) in zip(POPE, ends, strict=True)}
    return replace(found, metrics=pope_metrics(answers, labels), intervals=intervals, breakdown=table)


TASKS = (
    Task(
        name="pope",
        about="is there an X? objects that are not there",
        read=read,
        main="accuracy",
        score=score,
        split="adversarial",
        splits=SETTINGS,
        train=None,
        chance=half,
        unparsed=neither,
        generation={"max_new_tokens": 8},
        published=(
            Published("f1", 89.3, "InstructBLIP, Li et al. 2023, arXiv:2305.10355, random"),
            Published("f1", 78.5, "InstructBLIP, Li et al. 2023, arXiv:2305.10355, adversarial"),
        ),
    ),
)
