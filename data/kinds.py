"""Questions after the kind of a thing ("What animal is this?", "What kind of dog is this?"), for ImageNet's.

`kinds.json` says what is a kind of what. Of animals and vehicles a person gives the plain name ("cat" for a
tabby); a question after dogs or musical instruments wants the label itself.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

NAMING = (
    "What is this?",
    "What is that?",
    "What is this called?",
    "What is shown here?",
    "What is in the picture?",
)
"""Questions that a thing's name answers."""
PATH = Path(__file__).with_name("kinds.json")
BROAD = ("What {} is this?", "What {} is in the picture?", "What {} do you see?", "Which {} is shown?")
NARROW = ("What kind of {} is this?", "What kind of {} is in the picture?", "Which kind of {} is it?")
BROAD_KINDS = frozenset(("animal", "vehicle"))
"""Kinds whose members go by their plain names."""


@functools.cache
def _table() -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Label -> the kinds it belongs to; label -> its plain name."""
    raw = json.loads(PATH.read_text(encoding="utf-8"))
    kinds: dict[str, tuple[str, ...]] = {}
    for kind, labels in raw["kinds"].items():
        for label in labels.split(", "):
            kinds[label] = (*kinds.get(label, ()), kind)
    plain = {label: name for name, labels in raw["plain"].items() for label in labels.split(", ")}
    return kinds, plain


def kinds_of(label: str) -> tuple[str, ...]:
    """What a label is a kind of, as a question would say it; () for a label of no listed kind."""
    return _table()[0].get(label, ())


def plain_name(label: str) -> str:
    """What a person who is no expert calls it."""
    return _table()[1].get(label, label)


def kind_questions(label: str) -> list[tuple[str, str]]:
    """Every question after a kind that the label answers, with its answer."""
    asked: list[tuple[str, str]] = []
    for kind in kinds_of(label):
        if kind in BROAD_KINDS:
            asked += [(form.format(kind), plain_name(label)) for form in BROAD]
        else:
            asked += [(form.format(kind), label) for form in (*BROAD, *NARROW)]
    if "dog" in kinds_of(label):
        asked.append(("What breed of dog is this?", label))
    return asked
