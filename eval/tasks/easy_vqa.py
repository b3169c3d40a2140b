"""easy-VQA: questions about one coloured shape, 13 answers (V. Zhou, 2019). The package carries the set."""

from __future__ import annotations

from pathlib import Path

from vlm.data.example import Example
from vlm.data.sources import read_dataset
from vlm.eval.scorers import exact_scores, uniform_chance
from vlm.eval.task import Published, Task


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """One example per question."""
    return read_dataset("easy-vqa", root, split, pictures=pictures)


TASKS = (
    Task(
        name="easy-vqa",
        about="shapes and colours, 13 answers",
        read=read,
        main="exact_match",
        score=exact_scores,
        split="test",
        splits=("train", "train-rest", "dev", "test"),
        chance=uniform_chance,
        generation={"max_new_tokens": 8},
        data_optional=True,
        published=(
            Published("exact_match", 93.8, "the author's Keras model, victorzhou.com/blog/easy-vqa, test"),
            Published("exact_match", 67.0, "question-only prior, computed from the set, test"),
            Published("exact_match", 37.3, "majority answer, computed from the set, test"),
        ),
    ),
)
