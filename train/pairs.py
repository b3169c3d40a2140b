"""Preference pairs as the loop knows examples: the preferred answers are one source, the others a second.

The two run parallel: the n-th pair of a picture has its chosen answer in the first and its rejected one in
the second, so that setting pictures aside, grouping and hashing need to know nothing of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from vlm.config import CAPTION_PROMPT
from vlm.conversation import Conversation, PreferencePair
from vlm.data.collate import Source
from vlm.data.example import Example
from vlm.data.preferences import read_preferences
from vlm.data.text import normalise_caption
from vlm.errors import ConfigError, DataError


def pair_sources(place: str) -> list[Source]:
    """The pairs of a file: a source of chosen and one of rejected answers.

    Pairs without a picture, and captions that differ only in how they are written, are counted as unused.

    Raises:
        ConfigError: no file is named.
        DataError: it cannot be read, or holds no pair.
    """
    if not place:
        raise ConfigError("say where the preference pairs are: data=PAIRS.jsonl or data=FEEDBACK.db")
    found = read_preferences(Path(place).expanduser())
    pairs = [pair for pair in map(as_spoken, found.pairs) if pair.chosen != pair.rejected]
    pairs = [pair for pair in pairs if pair.chosen and pair.rejected and pair.conversation.images]
    unused = found.unused + len(found.pairs) - len(pairs)
    if not pairs:
        raise DataError(f"{place} holds no preference pair to learn from ({unused} opinions make none)")
    chosen = [_example(pair, pair.chosen) for pair in pairs]
    rejected = [_example(pair, pair.rejected) for pair in pairs]
    return [Source(chosen, unused=unused), Source(rejected)]


def as_spoken(pair: PreferencePair) -> PreferencePair:
    """Captions in the way that training writes them; other answers as they are."""
    if pair.conversation.turns[-1].text != CAPTION_PROMPT:
        return pair
    return replace(pair, chosen=normalise_caption(pair.chosen), rejected=normalise_caption(pair.rejected))


def _example(pair: PreferencePair, answer: str) -> Example:
    asked = pair.conversation
    return Example(images=asked.images, turns=asked.turns, answers=(answer,), id=pair.id)


def paired(examples: Sequence[Example]) -> list[PreferencePair]:
    """The pairs of examples that were set aside: the chosen ones stand first, then the rejected ones."""
    half = len(examples) // 2
    return [
        PreferencePair(Conversation(one.images, one.turns), one.answers[0], other.answers[0], one.id)
        for one, other in zip(examples[:half], examples[half:], strict=True)
    ]
