"""What ImageNet's kinds of things are kinds of, and what people call them (`kinds.json`)."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

PATH = Path(__file__).with_name("kinds.json")
BROAD_KINDS = frozenset(("animal", "vehicle"))
"""Kinds that say too little: their members go by their plain names."""
PLURALS = {
    "wolf": "wolves",
    "goose": "geese",
    "ox": "oxen",
    "mouse": "mice",
    "knife": "knives",
    "loaf": "loaves",
}
"""Endings that change otherwise than by rule."""


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


def naming(label: str) -> re.Pattern[str]:
    """Finds a text in small letters that names a label: itself, its plain name or its kind, one or many."""
    names = {label, plain_name(label), *kinds_of(label)} - BROAD_KINDS
    forms = sorted(re.escape(form) for name in names for form in (name.lower(), _plural(name.lower())))
    return re.compile(rf"(?<![\w'-])(?:{'|'.join(forms)})(?![\w-])")


def _plural(noun: str) -> str:
    """More than one of it, as English has it."""
    for end, several in PLURALS.items():
        if noun.endswith(end):
            return noun.removesuffix(end) + several
    if noun.endswith("y") and noun[-2:-1] not in set("aeiou"):
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s")
