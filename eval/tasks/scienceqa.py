"""ScienceQA-IMG: the school questions that come with a picture, two to five choices (Lu et al. 2022)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.errors import DataError
from vlm.eval.scorers import choice_chance, choice_scores, chosen, no_choice, options
from vlm.eval.task import Published, Task, official_id
from vlm.eval.tasks.layouts import Pictures, field, load


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """problems.json, and the pictures in images/SPLIT/ID/image.png."""
    part = "val" if split == "dev" else split
    path, problems = load(root, ["problems.json", "data/scienceqa/problems.json"], "ScienceQA file")
    find = Pictures(root, ("images", "data/scienceqa/images", ""), pictures)
    examples = []
    for id, row in problems.items():
        if field(row, "split", path) != part or not row.get("image"):
            continue
        listed, right = field(row, "choices", path), field(row, "answer", path)
        if not isinstance(right, int) or not 0 <= right < len(listed):
            raise DataError(f"{path}: problem {id} has no right choice ({right!r} of {len(listed)})")
        hint = str(row.get("hint") or "").strip()
        question = str(field(row, "question", path))
        meta = {"key": id, "options": json.dumps(listed), "question_type": str(row.get("subject", ""))}
        image = find(f"{part}/{id}/{row['image']}", f"{id}/{row['image']}")
        asked = f"{hint}\n{question}" if hint else question
        examples.append(make_example(image, asked, [listed[right]], id, meta))
    return examples


def submission(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, dict[str, int]]:
    """The leaderboard's format: {"results": {problem: number of the choice}}; -1 where none is named."""
    results = {}
    for example, answer in zip(examples, answers, strict=True):
        read = chosen(answer, options(example))
        results[official_id(example)] = -1 if read is None else read
    return {"results": results}


TASKS = (
    Task(
        name="scienceqa-img",
        about="school questions with a picture, 2 to 5 choices",
        read=read,
        score=choice_scores,
        split="test",
        splits=("train", "dev", "test"),
        chance=choice_chance,
        unparsed=no_choice,
        choices=True,
        submission=submission,
        published=(
            Published("accuracy", 40.1, "guessing, Lu et al. 2022, arXiv:2209.09513, IMG, test"),
            Published(
                "accuracy", 67.4, "GPT-3, chain of thought, Lu et al. 2022, arXiv:2209.09513, IMG, test"
            ),
            Published("accuracy", 87.5, "people, Lu et al. 2022, arXiv:2209.09513, IMG, test"),
        ),
    ),
)
