"""A-OKVQA: knowledge and common sense, as direct answers and as four choices (Schwenk et al. 2022)."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.errors import DataError
from vlm.eval.metrics.answers import direct_answer
from vlm.eval.scorers import choice_chance, choice_scores, chosen, item_scores, no_choice, options
from vlm.eval.task import Published, Task, official_id
from vlm.eval.tasks import hub
from vlm.eval.tasks.layouts import COCO_FOLDERS, Entry, Pictures, chosen_of, coco_names, load, rows_of

HIDDEN = ("test",)


def _read(root: Path | None, split: str, pictures: bool, choices: bool) -> list[Example]:
    hidden = split in HIDDEN
    if hub.holds(root):
        found = hub.entries(root, split, pictures, hidden=hidden)
        return [_example(entry, choices) for entry in found if choices or not _difficult(entry.row)]
    part = "val" if split == "dev" else split
    path, found = load(root, [f"aokvqa_v1p0_{part}.json", f"aokvqa/aokvqa_v1p0_{part}.json"], "A-OKVQA file")
    find = Pictures(root, COCO_FOLDERS, pictures)
    examples = []
    for row in rows_of(found, path):
        if not choices and _difficult(row):
            continue
        image = find(*coco_names(row, "test2015" if hidden else f"{part}2014", path))
        examples.append(_example(Entry(path, row, image, hidden=hidden), choices))
    return examples


def _difficult(row: Any) -> bool:
    return isinstance(row, Mapping) and row.get("difficult_direct_answer") is True


def _example(entry: Entry, choices: bool) -> Example:
    id = entry.text("question_id")
    listed, right = chosen_of(entry, "choices", "correct_choice_idx")
    meta = {"key": id, "options": json.dumps(listed)}
    answers = right if choices else _direct_answers(entry)
    return make_example(entry.image, entry.text("question"), answers, id, meta)


def _direct_answers(entry: Entry) -> list[str]:
    """A list, or one that is written out as text ("['cat', 'cat']"), as in HuggingFaceM4/A-OKVQA."""
    name = "direct_answers"
    text = entry.row.get(name)
    if isinstance(text, str):
        try:
            entry = replace(entry, row={name: ast.literal_eval(text)})
        except (ValueError, SyntaxError):
            raise DataError(f"{entry.where}: {name!r} is no list: {text[:80]}") from None
    return entry.published(name)


def read_direct(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """Direct answers, without the questions that the official evaluation leaves out as too difficult."""
    return _read(root, split, pictures, False)


def read_choices(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """Four choices."""
    return _read(root, split, pictures, True)


def submission(key: str, examples: Sequence[Example], answers: Sequence[str]) -> dict[str, dict[str, str]]:
    """The leaderboard's format: question id -> {"direct_answer" or "multiple_choice": answer}.

    A choice stands there in its own words, also where the answer was its letter.
    """
    said = map(_in_words, answers, examples) if key == "multiple_choice" else answers
    return {official_id(e): {key: answer} for e, answer in zip(examples, said, strict=True)}


def _in_words(answer: str, example: Example) -> str:
    read = chosen(answer, options(example))
    return answer if read is None else options(example)[read]


def _direct(answer: str, example: Example) -> float:
    return direct_answer(answer, example.answers)


TASKS = (
    Task(
        name="aokvqa",
        about="knowledge and common sense, direct answers",
        read=read_direct,
        main="accuracy",
        score=item_scores({"accuracy": _direct}),
        split="dev",
        splits=("train", "dev", "test"),
        hidden=HIDDEN,
        generation={"max_new_tokens": 12},
        answer_key="direct_answer",
        surplus=True,  # questions that are too difficult without choices
        submission=partial(submission, "direct_answer"),
        published=(Published("accuracy", 48.6, "GPV-2, Schwenk et al. 2022, arXiv:2206.01718, val"),),
    ),
    Task(
        name="aokvqa-choice",
        about="knowledge and common sense, 4 choices",
        read=read_choices,
        main="accuracy",
        score=choice_scores,
        split="dev",
        splits=("train", "dev", "test"),
        hidden=HIDDEN,
        chance=choice_chance,
        unparsed=no_choice,
        choices=True,
        generation={"max_new_tokens": 12},
        answer_key="multiple_choice",
        submission=partial(submission, "multiple_choice"),
        published=(Published("accuracy", 60.3, "GPV-2, Schwenk et al. 2022, arXiv:2206.01718, val"),),
    ),
)
