"""ScienceQA-IMG: the school questions that come with a picture, two to five choices (Lu et al. 2022)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vlm.data.convert.common import make_example
from vlm.data.example import Example
from vlm.eval.scorers import choice_chance, choice_scores, chosen, no_choice, options
from vlm.eval.task import Published, Task, official_id
from vlm.eval.tasks import hub
from vlm.eval.tasks.layouts import Entry, Pictures, chosen_of, field, load, rows_by_id


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """problems.json, and the pictures in images/SPLIT/ID/image.png; or derek-thomas/ScienceQA.

    The hub's rows have no ids: a problem is known by its place in the part.
    """
    if hub.holds(root):
        return [_example(e, str(e.number)) for e in hub.entries(root, split, pictures, bare=True)]
    part = "val" if split == "dev" else split
    path, problems = load(root, ["problems.json", "data/scienceqa/problems.json"], "ScienceQA file")
    find = Pictures(root, ("images", "data/scienceqa/images", ""), pictures)
    examples = []
    for id, row in rows_by_id(problems, path).items():
        if field(row, "split", path) != part or not row.get("image"):
            continue
        image = find(f"{part}/{id}/{row['image']}", f"{id}/{row['image']}")
        examples.append(_example(Entry(path, row, image), id))
    return examples


def _example(entry: Entry, id: str) -> Example:
    listed, right = chosen_of(entry, "choices", "answer")
    hint = str(entry.row.get("hint") or "").strip()
    question = entry.text("question")
    meta = {"key": id, "options": json.dumps(listed), "question_type": str(entry.row.get("subject", ""))}
    return make_example(entry.image, f"{hint}\n{question}" if hint else question, right, id, meta)


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
        main="accuracy",
        score=choice_scores,
        split="test",
        splits=("train", "dev", "test"),
        chance=choice_chance,
        unparsed=no_choice,
        choices=True,
        surplus=True,  # problems without picture
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
