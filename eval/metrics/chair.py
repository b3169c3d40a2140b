"""CHAIR: objects in captions that are not in the picture (Rohrbach et al. 2018, Object Hallucination in Image
Captioning, EMNLP).

The paper knows a picture's objects from COCO's outlines and reference captions, and 80 kinds with their
synonyms. Here kinds and synonyms are those of `vlm.data.lexicon`, and a thing that a caption names counts as
not there where no reference has a word for it, for a kind of it, for what it is a kind of, or one that makes
its unseen presence likely (a street for a car); all people are one kind, as in the paper. Figures are
comparable among runs on the same set, not with the paper's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np

from vlm.data.captions import read_caption, tokenise, word_forms
from vlm.data.lexicon import Lexicon, load

PEOPLE = "person"
KINDS = ("animal", "vehicle")  # all of these are objects, also those that no question asks after


def chair_counts(captions: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    """(n, 2) float64: objects that each caption names, and those of them that no reference names."""
    rows = [_counts(caption, texts) for caption, texts in zip(captions, references, strict=True)]
    return np.asarray(rows, dtype=np.float64).reshape(-1, 2)


def _counts(caption: str, references: Iterable[str]) -> tuple[int, int]:
    lexicon = load()
    said = frozenset[str]().union(*(word_forms(tokenise(text)) for text in references))
    named = [
        things
        for mention in read_caption(caption, lexicon).mentions
        if (things := [thing for thing in mention.things if thing in _objects()])
    ]
    wrong = [things for things in named if not any(_is_there(thing, said, lexicon) for thing in things)]
    return len(named), len(wrong)


@functools.cache
def _objects() -> frozenset[str]:
    """The things that count: those that captions name when they are there, and every animal and vehicle.

    Clothes, and trees, grass and buildings, are left out: captions pass over them too often.
    """
    lexicon = load()
    return frozenset(
        name
        for name, thing in lexicon.things.items()
        if not thing.needs and (thing.ask or not set(KINDS).isdisjoint(lexicon.ancestors(name)))
    )


def _is_there(thing: str, said: frozenset[str], lexicon: Lexicon) -> bool:
    """Whether the references' word forms leave it possible that the thing is in the picture."""
    kind = PEOPLE if lexicon.is_kind_of(thing, PEOPLE) else thing
    return any(lexicon.blocks(kind, form) for form in said)


def chair(counts: np.ndarray) -> np.ndarray:
    """(..., 2) summed counts -> (..., 1) CHAIR_i in percent: the share of named objects not there."""
    return np.asarray(100 * counts[..., 1:] / np.maximum(counts[..., :1], 1))
