"""NLVR: is a sentence true of a picture of shapes? (Suhr et al. 2017), from its PNGs.

Every structure is drawn six times, its boxes in another order each time: each drawing is an example, as the
official script (metrics_images.py) counts them. What it calls precision is `accuracy`. Drawings about one
sentence are no independent draws: intervals resample sentences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.eval import stats
from vlm.eval.scorers import half, item_scores
from vlm.eval.task import Published, Scores, Task, official_id
from vlm.eval.tasks.layouts import Pictures, json_lines, known, text_of

PROMPT = "{} Is this true, yes or no?"
ANSWERS = {"true": "yes", "false": "no"}
DRAWINGS = 6


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The official JSON lines, and for each sentence and structure its six drawings."""
    path, rows = json_lines(root, [f"{split}/{split}.json", f"{split}.json"], "NLVR file")
    find = Pictures(root, (f"{split}/images", "images", ""), pictures)
    examples = []
    for row in rows:
        id = text_of(row, "identifier", path)
        label = known(text_of(row, "label", path).lower(), tuple(ANSWERS), id, path)
        question = PROMPT.format(text_of(row, "sentence", path).strip())
        for number in range(DRAWINGS):
            name = f"{split}-{id}-{number}.png"
            image = find(f"{text_of(row, 'directory', path)}/{name}", name)
            meta = {"sentence": id.partition("-")[0]}
            examples.append(make_example(image, question, [ANSWERS[label]], name, meta))
    return examples


def truth(answer: str) -> str:
    """`true` or `false`, of an answer in the words of the prompt or of the results format; else empty."""
    plain = " ".join(answer.lower().split()).rstrip(".").rstrip()
    return next((label for label, said in ANSWERS.items() if plain in (label, said)), "")


def _right(answer: str, example: Example) -> float:
    return float(truth(answer) == truth(example.answers[0]))


def score(examples: Sequence[Example], answers: Sequence[str]) -> Scores:
    """Accuracy over drawings, then consistency: the share of sentences with every drawing right."""
    found = item_scores({"accuracy": _right}, group="sentence")(examples, answers)
    whole: dict[str, float] = {}
    for example, value in zip(examples, found.per_item["accuracy"], strict=True):
        sentence = str(example.meta["sentence"])
        whole[sentence] = min(whole.get(sentence, 100.0), float(value))
    values = np.array(list(whole.values()))
    return replace(
        found,
        metrics=found.metrics | {"consistency": float(values.mean())},
        intervals=found.intervals | {"consistency": stats.interval(values)},
    )


def submission(examples: Sequence[Example], answers: Sequence[str]) -> str:
    """The official CSV, without header: a drawing's file name, and true, false or, where unread, nothing."""
    return "".join(f"{official_id(e)},{truth(answer)}\n" for e, answer in zip(examples, answers, strict=True))


TASKS = (
    Task(
        name="nlvr",
        about="is a sentence true of a picture of shapes?",
        read=read,
        main="accuracy",
        score=score,
        split="dev",
        splits=("train", "dev", "test"),
        chance=half,
        unparsed=lambda answer, example: not truth(answer),
        generation={"max_new_tokens": 4},
        id_key="identifier",
        submission=submission,
        published=(Published("accuracy", 66.1, "module networks, Suhr et al. 2017, ACL P17-2034, Test-P"),),
    ),
)
