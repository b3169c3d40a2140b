"""Questions made from Flickr8k's captions: balanced yes/no ones, and all of them.

Yes and no are equally many for every question string, so a model that does not look gets half of them.
"""

from __future__ import annotations

from pathlib import Path

from vlm.data.example import Example
from vlm.data.questions import questions_from_captions
from vlm.eval.scorers import exact_scores, half, neither, uniform_chance
from vlm.eval.task import Task
from vlm.eval.tasks import flickr8k

SEED = 0
_SHORT = {"max_new_tokens": 12}


def read_all(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """Every generated question of a split."""
    return flickr8k.keyed(questions_from_captions(flickr8k.read(root, split, pictures), seed=SEED))


def read_yes_no(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The yes/no questions of a split."""
    return [e for e in read_all(root, split, pictures) if e.meta["question_type"] == "yes/no"]


TASKS = (
    Task(
        name="flickr8k-yesno",
        about="balanced yes/no questions made from captions",
        read=read_yes_no,
        main="exact_match",
        score=exact_scores,
        split="dev",
        splits=("train", "dev", "test"),
        chance=half,
        unparsed=neither,
        generation=_SHORT,
    ),
    Task(
        name="flickr8k-questions",
        about="questions with short answers made from captions",
        read=read_all,
        main="exact_match",
        score=exact_scores,
        split="dev",
        splits=("train", "dev", "test"),
        chance=uniform_chance,
        generation=_SHORT,
    ),
)
