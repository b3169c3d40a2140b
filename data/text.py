"""Small, exact text rules that training, evaluation and the converters share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from vlm.config import CAPTION_PROMPT
from vlm.data.example import Example
from vlm.data.rows import BadRow

_SPACES = re.compile(r"\s+")
_SPACE_BEFORE_MARK = re.compile(r"\s+([,.;:!?])")


def normalise_caption(caption: str) -> str:
    """A caption as training writes it: lower case, single spaces, no final full stop.

    Marks that the caption files set apart ("a dog , a cat .") are joined to the word before them.
    The result is empty only for a caption that holds no word.
    """
    text = _SPACES.sub(" ", caption).strip().strip('"').strip().lower()
    text = _SPACE_BEFORE_MARK.sub(r"\1", text)
    return text.rstrip(". ").rstrip()


def spoken(example: Example) -> Example:
    """Captions in lower case without the final full stop; other answers as they are."""
    if example.turns[-1].text != CAPTION_PROMPT:
        return example
    answers = tuple(filter(None, map(normalise_caption, example.answers)))
    return replace(example, answers=answers)


def all_spoken(examples: Iterable[Example]) -> tuple[list[Example], list[BadRow]]:
    """The examples the way the model is to speak, and those that then say nothing (a caption of ".")."""
    said: list[Example] = []
    silent: list[BadRow] = []
    for example in map(spoken, examples):
        if any(answer.strip() for answer in example.answers):
            said.append(example)
        else:
            silent.append(BadRow(example.id, "nothing is said", "no word is left of its text"))
    return said, silent
