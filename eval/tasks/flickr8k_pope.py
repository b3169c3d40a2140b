"""Objects that are not there, asked after on Flickr8k: POPE's three settings (Li et al. 2023), from captions.

Settings stand side by side in one run: the scores are over all of them, the breakdown has each.
"""

from __future__ import annotations

from pathlib import Path

from vlm.data.example import Example
from vlm.data.probe import presence_probe
from vlm.eval.scorers import half, neither
from vlm.eval.task import Task
from vlm.eval.tasks import flickr8k, pope


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The probe of a split's captions: up to 500 pictures, up to six questions in each setting."""
    return flickr8k.keyed(presence_probe(flickr8k.read(root, split, pictures)))


TASKS = (
    Task(
        name="flickr8k-pope",
        about="is there an X? random, popular and adversarial negatives made from captions",
        read=read,
        main="accuracy",
        score=pope.score,
        split="dev",
        splits=("train", "dev", "test"),
        chance=half,
        unparsed=neither,
        generation={"max_new_tokens": 8},
    ),
)
