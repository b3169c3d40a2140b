"""From examples to training rows: everything said of one picture goes into one row.

What an epoch shows (which captions, which questions, mirrored or not) is a function of the seed, the
epoch and the picture's content alone: neither the number of processes, nor the order of work, nor the place
where the data lies changes it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from vlm.conversation import ImageSource, Turn
from vlm.data.example import Example
from vlm.data.mirror import mirrored, says_sides
from vlm.data.rows import BadRow, TextRow
from vlm.errors import DataError

if TYPE_CHECKING:
    from vlm.language import LanguageModel
    from vlm.processor import Processor, Row, Tokens


ROOM = 32
"""Tokens that a picture's hints, and the frame around a turn, stay below."""


@dataclass(frozen=True)
class Source:
    """Examples that are drawn from together.

    Attributes:
        per_image: how many (example, answer) pairs a row takes from this source at most.
        weight: weight of this source's tokens in the loss.
        bad: rows that could not be used.
        unused: sound rows that say nothing to learn (an opinion that makes no pair).
        passed_by: sound rows of pictures that the recipe leaves out.
        texts: sound rows that are about no picture.
    """

    examples: Sequence[Example]
    per_image: int = 5
    weight: float = 1.0
    bad: Sequence[BadRow] = ()
    unused: int = 0
    passed_by: int = 0
    texts: Sequence[TextRow] = ()


@dataclass(frozen=True)
class Pair:
    """One example with one of its answers."""

    example: Example
    answer: str
    weight: float

    @property
    def sided(self) -> bool:
        """Whether a left or a right stands in its words."""
        return says_sides(self.answer) or any(says_sides(turn.text) for turn in self.example.turns)

    def mirrored(self) -> Pair | None:
        """What is true of the mirrored picture; None where that cannot be told.

        "The left picture" of several stays where it is: with sides, only a single picture has a mirror image.
        """
        if not self.sided:
            return self
        turns = [_mirrored_turn(turn) for turn in self.example.turns]
        answer = mirrored(self.answer)
        if answer is None or None in turns or len(self.example.images) > 1:
            return None
        told = tuple(turn for turn in turns if turn is not None)
        return replace(self, example=replace(self.example, turns=told), answer=answer)


def _mirrored_turn(turn: Turn) -> Turn | None:
    parts = [mirrored(part) if isinstance(part, str) else part for part in turn.parts]
    known = tuple(part for part in parts if part is not None)
    return Turn(turn.role, known) if len(known) == len(parts) else None


@dataclass
class Group:
    """Everything that is said of one picture (or one sequence of pictures), by source.

    Attributes:
        id: names the pictures to people: their paths.
        key: what every drawing for the group depends on. The id, until the pictures have been read
            (`FeatureStore`); then their contents, so that the data may lie anywhere.
    """

    id: str
    images: tuple[ImageSource, ...]
    by_source: list[list[Pair]]
    per_image: tuple[int, ...]
    key: str = ""

    def __post_init__(self) -> None:
        self.key = self.key or self.id

    @cached_property
    def mirrors(self) -> bool:
        """Whether everything that is said can be said of the mirrored pictures too."""
        return all(pair.mirrored() is not None for pairs in self.by_source for pair in pairs)

    @cached_property
    def sided(self) -> bool:
        """Whether anything that is said has a left or a right in it."""
        return any(pair.sided for pairs in self.by_source for pair in pairs)

    def seen(self, pairs: Sequence[Pair], view: str) -> list[Pair]:
        """Pairs of this group as they are true of a view of its pictures."""
        if view != "flip":
            return list(pairs)
        return [turned for pair in pairs if (turned := pair.mirrored()) is not None]

    def draw(self, seed: int, epoch: int) -> list[Pair]:
        """This epoch's pairs, in a fixed order."""
        chance = seeded(seed, epoch, self.key)
        drawn: list[Pair] = []
        for pairs, most in zip(self.by_source, self.per_image, strict=True):
            drawn += pairs if len(pairs) <= most else chance.sample(pairs, most)
        return drawn


def seeded(*parts: object) -> random.Random:
    """A random generator that depends on its arguments only, the same on every machine."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def group_by_image(sources: Sequence[Source]) -> list[Group]:
    """One group for each picture (each sequence of pictures), sorted by name.

    Raises:
        DataError: an example with no answer to learn.
    """
    groups: dict[str, Group] = {}
    for number, source in enumerate(sources):
        for example in source.examples:
            if not any(answer.strip() for answer in example.answers):
                raise DataError(f"example {example.id!r} has no answer to learn")
            name = group_name(example.images)
            if name not in groups:
                limits = tuple(s.per_image for s in sources)
                groups[name] = Group(name, example.images, [[] for _ in sources], limits)
            pairs = [Pair(example, answer, source.weight) for answer in example.answers if answer.strip()]
            groups[name].by_source[number].extend(pairs)
    return [groups[name] for name in sorted(groups)]


def group_name(images: Sequence[ImageSource]) -> str:
    """The id of the group of these pictures."""
    return "|".join(map(image_name, images))


def image_name(image: ImageSource) -> str:
    """A path as it is; the digest of a picture that comes as bytes or pixels."""
    if isinstance(image, str | Path):
        return str(image)
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    from vlm.images import open_picture

    return open_picture(image).sha256


def epoch_batches(
    groups: Sequence[Group], size: int, seed: int, epoch: int, by_length: bool = True
) -> list[list[int]]:
    """Indices of an epoch's batches: shuffled, rows of like length together; the last one may be short."""
    chance = seeded(seed, epoch, "order")
    order = list(range(len(groups)))
    chance.shuffle(order)
    batches = []
    window = size * 16
    for begin in range(0, len(order), window):
        part = order[begin : begin + window]
        if by_length:
            part = sorted(part, key=lambda i: told_length(groups[i], seed, epoch))
        cut = [part[i : i + size] for i in range(0, len(part), size)]
        chance.shuffle(cut)
        batches += cut
    return batches


def told_length(group: Group, seed: int, epoch: int) -> int:
    """Letters that a group tells in an epoch."""
    return sum(len(p.answer) + len(p.example.turns[-1].text) for p in group.draw(seed, epoch))


def batches_from(
    groups: Sequence[Group], size: int, seed: int, start: int = 0, by_length: bool = True
) -> Iterator[tuple[int, list[int]]]:
    """(epoch, batch) without end, from the `start`-th batch on."""
    epoch, skipped = 0, 0
    while True:
        count = -(-len(groups) // size)
        if start < skipped + count:
            batches = epoch_batches(groups, size, seed, epoch, by_length)
            for batch in batches[max(0, start - skipped) :]:
                yield epoch, batch
        skipped += count
        epoch += 1


def told_of(
    group: Group, processor: Processor, seed: int, epoch: int, hints: Sequence[str] = (), view: str = "whole"
) -> list[tuple[Tokens, float]]:
    """What a group tells in one epoch, as the model reads it, with its weight in the loss.

    What is said is what is true of the `view` of its pictures.
    """
    drawn = group.seen(group.draw(seed, epoch), view)
    return [(processor.tokens(pair.example, pair.answer, hints), pair.weight) for pair in drawn]


def rows_of(told: Sequence[tuple[Tokens, float]], processor: Processor, shared: bool = True) -> list[Row]:
    """One row for all that shows the pictures in the same places.

    One for each answer, where not `shared` or where the adapter reads the question too.
    """
    if processor.question_aware or not shared:
        return [processor.row([tokens], [weight]) for tokens, weight in told]
    alike: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[Tokens, float]]] = {}
    for tokens, weight in told:
        places = (tuple(tokens.images), tuple(tokens.image_places))
        alike.setdefault(places, []).append((tokens, weight))
    return [processor.row([t for t, _ in same], [weight for _, weight in same]) for same in alike.values()]


def all_fitting(examples: Iterable[Example], processor: Processor) -> tuple[list[Example], list[BadRow]]:
    """The examples that the model can read whole, and those with too many words or pictures."""
    fitting: list[Example] = []
    unfit: list[BadRow] = []
    for example in examples:
        try:
            _require_fit(example, processor)
        except DataError as problem:
            unfit.append(BadRow(example.id, "too much for the model", str(problem)))
        else:
            fitting.append(example)
    return fitting, unfit


def _require_fit(example: Example, processor: Processor) -> None:
    """Raises:
    DataError: as `Processor.tokens`; what is short enough in bytes, of which a token has one at least, is not
        made into tokens for it.
    """
    answer = max(example.answers, key=len)
    size = sum(len(text.encode()) for text in (answer, *(turn.text for turn in example.turns)))
    size += ROOM * (len(example.turns) + len(example.images)) + processor.soft_tokens * len(example.images)
    if size > processor.max_positions or len(example.images) > processor.max_group:
        tokens = len(processor.tokens(example, answer)) + ROOM * len(example.images)
        if tokens > processor.max_positions:
            raise DataError(f"{tokens} tokens; the language model reads {processor.max_positions}")


def masked_text(tokens: Tokens, language: LanguageModel) -> str:
    """A conversation as the model reads it; what it learns to say stands in [[double brackets]].

    A soft token is shown as a small square.
    """
    pieces: list[str] = []
    begin = 0
    for end in range(1, len(tokens) + 1):
        if end < len(tokens) and tokens.supervised[end] == tokens.supervised[begin]:
            continue
        codes = tokens.codes[begin:end]
        soft = "\u25a1" * sum(code < 0 for code in codes)
        text = soft + str(language.tokenizer.decode([code for code in codes if code >= 0]))
        pieces.append(f"[[{text}]]" if tokens.supervised[begin] else text)
        begin = end
    return "".join(pieces)
