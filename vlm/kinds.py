"""What ImageNet's kinds of things are kinds of, and what people call them (`kinds.json`)."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

PATH = Path(__file__).with_name("kinds.json")
BROAD_KINDS = frozenset(("animal", "vehicle"))
"""Kinds that say too little: their members go by their plain names."""
IRREGULAR = {"wolf": "wolves", "goose": "geese", "ox": "oxen", "mouse": "mice", "loaf": "loaves"}
"""Plurals of the table's nouns that follow no rule."""


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
    some = {name.lower() for name in names}
    forms = map(re.escape, sorted(some | {plural(name, IRREGULAR) for name in some}))
    return re.compile(rf"(?<![\w'-])(?:{'|'.join(forms)})(?![\w-])")


def plural(word: str, irregular: dict[str, str]) -> str:
    """The plural of an English noun or noun phrase (its last word's)."""
    first, _, last = word.rpartition(" ")
    if last in irregular:
        changed = irregular[last]
    elif last.endswith(("s", "x", "z", "ch", "sh")):
        changed = last + "es"
    elif last.endswith("y") and last[-2:-1] not in "aeiou":
        changed = last[:-1] + "ies"
    else:
        changed = last + "s"
    return f"{first} {changed}".strip()
