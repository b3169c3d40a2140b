"""Before and after: what the model says of pictures that were set aside, and how right that is."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from vlm.config import CAPTION_DECODING, CAPTION_PROMPT
from vlm.data.collate import seeded
from vlm.data.example import Example
from vlm.eval.metrics.answers import exact_match
from vlm.eval.metrics.captions import score_captions
from vlm.eval.metrics.vqa import vqa_accuracy
from vlm.model import VLM

FILE = "holdout.json"
EXACT = "questions: exact match"
SHOWN = 4
MOST = 400
"""Examples asked at most, drawn from all: a look, not a benchmark."""


class Judge(Protocol):
    """What a model is asked before and after a run; answers are plain values, kept as JSON meanwhile."""

    @property
    def file(self) -> str:
        """Name of the report in the run's folder."""

    @property
    def asked(self) -> str:
        """A hash of what is asked, in order: a continued run must ask the same."""

    def ask(self, model: VLM) -> dict[str, Any]:
        """What the model says now."""

    def report(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        """Both beside each other."""

    def show(self, found: dict[str, Any]) -> None:
        """The report for people, on standard output."""


@dataclass(frozen=True)
class Held:
    """Asks about the pictures that were set aside, or about `MOST` examples of them."""

    examples: Sequence[Example]
    file: str = FILE

    @cached_property
    def chosen(self) -> list[Example]:
        """What is asked: the same examples whenever a run is continued, in their own order."""
        if len(self.examples) <= MOST:
            return list(self.examples)
        drawn = seeded("holdout", len(self.examples)).sample(range(len(self.examples)), MOST)
        return [self.examples[i] for i in sorted(drawn)]

    @property
    def asked(self) -> str:
        return digest(self.chosen)

    def ask(self, model: VLM) -> dict[str, Any]:
        return vars(ask(model, self.chosen))

    def report(self, before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
        return report(self.chosen, Asked(**before), Asked(**after)) | {"set_aside": len(self.examples)}

    def show(self, found: dict[str, Any]) -> None:
        show(found)


def digest(examples: Sequence[Example]) -> str:
    """SHA-256 of everything said in examples, in order; where their pictures lie is no part of it."""
    said = [([turn.text for turn in example.turns], example.answers) for example in examples]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


@dataclass
class Asked:
    """Answers to the examples that were set aside, and their scores in percent."""

    answers: list[str]
    scores: dict[str, float]


def ask(model: VLM, examples: Sequence[Example]) -> Asked:
    """Asks every example: captions by beam search, questions greedily."""
    captions = [i for i, e in enumerate(examples) if is_caption(e)]
    questions = [i for i, e in enumerate(examples) if not is_caption(e)]
    answers = [""] * len(examples)
    for places, options in (
        (captions, CAPTION_DECODING),
        (questions, {"max_new_tokens": 24}),
    ):
        found = model.ask_batch([examples[i] for i in places], **options) if places else []
        for place, answer in zip(places, found, strict=True):
            answers[place] = answer.text
    return Asked(answers, _scores(examples, answers, captions, questions))


def is_caption(example: Example) -> bool:
    """Whether a caption is asked for."""
    return example.turns[-1].text == CAPTION_PROMPT


def _scores(
    examples: Sequence[Example], answers: Sequence[str], captions: Sequence[int], questions: Sequence[int]
) -> dict[str, float]:
    scores: dict[str, float] = {}
    if captions:
        found = score_captions(
            [answers[i] for i in captions], [examples[i].answers for i in captions], java=False
        )
        scores |= {"captions: CIDEr": found.metrics["cider"], "captions: BLEU-4": found.metrics["bleu_4"]}
    if questions:
        count = len(questions)
        right = sum(exact_match(answers[i], examples[i].answers) for i in questions)
        near = sum(vqa_accuracy(answers[i], examples[i].answers, strict=False) for i in questions)
        scores |= {
            EXACT: 100 * right / count,
            "questions: VQA accuracy": 100 * near / count,
        }
    return scores


def report(examples: Sequence[Example], before: Asked, after: Asked) -> dict[str, Any]:
    """Everything asked, with both answers."""
    rows = [
        {
            "id": example.id,
            "question": example.turns[-1].text,
            "references": list(example.answers),
            "before": one,
            "after": other,
        }
        for example, one, other in zip(examples, before.answers, after.answers, strict=True)
    ]
    pictures = len({example.images for example in examples})
    return {"pictures": pictures, "before": before.scores, "after": after.scores, "answers": rows}


def write_report(path: Path, found: dict[str, Any]) -> None:
    """Writes a report whole, or leaves the one that is there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def show(found: dict[str, Any]) -> None:
    """The table, and some answers, on standard output."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    asked = len(found["answers"])
    some = f" ({asked} of {found['set_aside']} examples asked)" if asked < found["set_aside"] else ""
    title = f"{found['pictures']} pictures that training has not seen{some}"
    table = Table(title=title, title_justify="left")
    for name in ("score", "before", "after"):
        table.add_column(name, justify="left" if name == "score" else "right")
    for name, value in found["after"].items():
        table.add_row(name, f"{found['before'][name]:.1f}", f"{value:.1f}")
    console.print(table)
    answers = Table(box=None, pad_edge=False)
    for name in ("question", "reference", "before", "after"):
        answers.add_column(name, overflow="fold")
    step = max(1, len(found["answers"]) // SHOWN)
    for row in found["answers"][::step][:SHOWN]:
        answers.add_row(row["question"], row["references"][0], row["before"], row["after"])
    console.print(answers, markup=False)
