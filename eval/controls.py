"""What a model gets without looking: blank, shuffled and no images, a question-only prior, chance.

A VQA score means little beside these. The text-only score, which "over text-only" always means, is the
highest of blank, shuffled, no image and prior, in the task's main metric.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.conversation import Conversation, ImageSource, Turn
from vlm.data.example import Example
from vlm.eval.task import question

if TYPE_CHECKING:
    from PIL.Image import Image

SEED = 7
RUNS = ("blank", "shuffled", "no_image")  # the controls that the model answers
TEXT_ONLY = (*RUNS, "prior")

Conversations = list[Conversation]


def blank(conversations: Sequence[Conversation], picture: Image) -> Conversations:
    """Every image replaced by one whose pixels are the encoder's mean."""
    return [replace(each, images=(picture,) * len(each.images)) for each in conversations]


def shuffled(conversations: Sequence[Conversation], seed: int = SEED) -> Conversations:
    """Every example asked about other pictures: a permutation of the distinct pictures that moves each one.

    Examples keep their number of pictures; all questions about one picture get the same other one.
    """
    by_count: dict[int, dict[tuple[str, ...], tuple[ImageSource, ...]]] = defaultdict(dict)
    for each in conversations:
        by_count[len(each.images)].setdefault(_names(each), each.images)
    swapped: dict[tuple[str, ...], tuple[ImageSource, ...]] = {}
    for _, groups in sorted(by_count.items()):
        names = sorted(groups)
        random.Random(seed).shuffle(names)
        # One long cycle moves every picture; a single picture has nowhere to go and stays.
        swapped |= {name: groups[other] for name, other in zip(names, names[1:] + names[:1], strict=True)}
    return [replace(each, images=swapped[_names(each)]) for each in conversations]


def _names(conversation: Conversation) -> tuple[str, ...]:
    return tuple(
        str(image) if isinstance(image, str | Path) else str(id(image)) for image in conversation.images
    )


def no_image(conversations: Sequence[Conversation]) -> Conversations:
    """The same words without any image."""
    return [
        Conversation((), tuple(Turn(turn.role, (turn.text,)) for turn in each.turns))
        for each in conversations
    ]


def run(name: str, conversations: Sequence[Conversation], blank_image: Callable[[], Image]) -> Conversations:
    """The conversations of the control called `name`."""
    if name == "blank":
        return blank(conversations, blank_image())
    return shuffled(conversations) if name == "shuffled" else no_image(conversations)


def prior(train: Sequence[Example], examples: Sequence[Example]) -> list[str]:
    """For every question the commonest training answer to the same words; else to its type; else of all."""
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    overall: Counter[str] = Counter()
    for example in train:
        answer = _commonest(Counter(example.answers))
        by_question[_plain(example)][answer] += 1
        by_type[_kind(example)][answer] += 1
        overall[answer] += 1
    return [_commonest(by_question.get(_plain(e)) or by_type.get(_kind(e)) or overall) for e in examples]


def _plain(example: Example) -> str:
    return " ".join(question(example).lower().split())


def _kind(example: Example) -> str:
    """The question type, or the first two words where the set has none."""
    return str(example.meta.get("question_type") or " ".join(_plain(example).split()[:2]))


def _commonest(answers: Counter[str]) -> str:
    """The most frequent answer; among equals one that a hash chooses, so that order never matters."""
    return min(answers, key=lambda text: (-answers[text], hashlib.sha256(text.encode()).digest()))
