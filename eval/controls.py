"""What a model gets without looking: blank, shuffled and no images, a question-only prior, chance.

A score means little beside these. Each means one thing (`ABOUT`) and has no score, but a reason, where it
cannot be made. The text-only score, which "over text-only" always means, is the highest of blank, shuffled,
no image and prior, in the task's main metric.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from vlm.conversation import Conversation, ImageSlot, ImageSource, Turn
from vlm.data.example import Example
from vlm.errors import VLMError
from vlm.eval.task import picture_names, question

if TYPE_CHECKING:
    from PIL.Image import Image

SEED = 7
RUNS = ("blank", "shuffled", "no_image")  # the controls that the model answers
TEXT_ONLY = (*RUNS, "prior")
ABOUT = {
    "blank": "the model; every picture is one of the encoder's mean colour",
    "shuffled": "the model; every question is about other examples' pictures",
    "no_image": "the model; the words alone, without any picture",
    "prior": "no model; the commonest training answer to the question; for captions a typical one for all",
    "chance": "no model; a guess among the possible answers",
}

Conversations = list[Conversation]


class NoControl(VLMError):
    """A control that these examples cannot have; the message is the reason that a report gives."""


def blank(conversations: Sequence[Conversation], picture: Image) -> Conversations:
    """Every image, those of solved examples too, replaced by one whose pixels are the encoder's mean."""
    return [replace(each, images=(picture,) * len(each.images)) for each in conversations]


def shuffled(conversations: Sequence[Conversation], seed: int = SEED) -> Conversations:
    """Every example asked about other pictures: a permutation of the distinct pictures that moves each one.

    Examples keep their number of pictures; all questions about one picture get the same other one. Solved
    examples before the question keep theirs.

    Raises:
        NoControl: there are no other pictures to ask about.
    """
    asked = [_asked(each) for each in conversations]
    by_count: dict[int, dict[tuple[str, ...], tuple[ImageSource, ...]]] = defaultdict(dict)
    for each, places in zip(conversations, asked, strict=True):
        images = tuple(each.images[place] for place in places)
        by_count[len(images)].setdefault(picture_names(images), images)
    swapped: dict[tuple[str, ...], tuple[ImageSource, ...]] = {}
    for count, groups in sorted(by_count.items()):
        names = sorted(groups)
        if count and len(names) == 1:
            raise NoControl(f"all examples with {count} picture{'s' * (count > 1)} have the same")
        random.Random(seed).shuffle(names)
        # One long cycle moves every picture.
        swapped |= {name: groups[other] for name, other in zip(names, names[1:] + names[:1], strict=True)}
    found = []
    for each, places in zip(conversations, asked, strict=True):
        others = swapped[picture_names([each.images[place] for place in places])]
        other = dict(zip(places, others, strict=True))
        shown = tuple(other.get(place, image) for place, image in enumerate(each.images))
        found.append(replace(each, images=shown))
    return found


def _asked(conversation: Conversation) -> tuple[int, ...]:
    """Which images the last turn asks about: those that stand in it, or all where none does."""
    last = [part.index for part in conversation.turns[-1].parts if isinstance(part, ImageSlot)]
    return tuple(last) or tuple(range(len(conversation.images)))


def no_image(conversations: Sequence[Conversation]) -> Conversations:
    """The same words without any image."""
    return [
        Conversation((), tuple(Turn(turn.role, (turn.text,)) for turn in each.turns))
        for each in conversations
    ]


def run(name: str, conversations: Sequence[Conversation], blank_image: Callable[[], Image]) -> Conversations:
    """The conversations of the control called `name`.

    Raises:
        NoControl: it would be the run itself, or cannot be made.
    """
    if not any(each.images for each in conversations):
        raise NoControl("the examples have no pictures")
    if name == "blank":
        return blank(conversations, blank_image())
    return shuffled(conversations) if name == "shuffled" else no_image(conversations)


def prior(train: Sequence[Example], examples: Sequence[Example], captions: bool = False) -> list[str]:
    """What answers without a model, by the training split alone.

    For every question the commonest training answer to the same words; else to its type; else of all. Where
    the examples are captions, whose words hardly ever repeat, one caption for all: the most typical one.
    """
    if captions:
        from vlm.eval.metrics.typical import most_typical

        return [most_typical([example.answers for example in train])] * len(examples)
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
