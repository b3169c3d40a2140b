"""Small, exact text rules that training, evaluation and the converters share."""

from __future__ import annotations

import re

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
