"""Verbs and small words of photograph captions, from `grammar.json`."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATH = Path(__file__).with_name("grammar.json")


@dataclass(frozen=True)
class Verbs:
    """Surface form -> the action as an answer says it ("runs" -> "running")."""

    ing: dict[str, str]
    third: dict[str, str]
    base: dict[str, str]
    past: dict[str, str]
    never: frozenset[str]
    """Actions that are no answer to "What is the man doing?": vague, or true of half the pictures."""
    blurs: frozenset[str]
    """Actions that go together with any other, so that they leave a "no" in doubt."""
    rows: tuple[frozenset[str], ...]
    """Whoever does an action of one row does none of another row's."""
    not_before: frozenset[str]
    """Nouns that make an -ing form an adjective ("swimming pool")."""


@functools.cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
    return table


@functools.cache
def words(name: str) -> frozenset[str]:
    """One of the sets of small words: `boundary`, `prepositions`, `unsure`, ..."""
    return frozenset(_table()["sets"][name].split())


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def inflect(base: str) -> tuple[str, str]:
    """The -ing form and the third person of a regular verb."""
    ing = base[:-1] + "ing" if base.endswith("e") and not base.endswith("ee") else base + "ing"
    if base.endswith(("s", "x", "z", "ch", "sh")):
        return ing, base + "es"
    if base.endswith("y") and base[-2] not in "aeiou":
        return ing, base[:-1] + "ies"
    return ing, base + "s"


@functools.cache
def verbs() -> Verbs:
    """The verbs that ship with the package (read once)."""
    table = _table()
    ing: dict[str, str] = {}
    third: dict[str, str] = {}
    base: dict[str, str] = {}
    past: dict[str, str] = {}
    for answer, bases in table["verbs"].items():
        for word in _listed(bases):
            irregular = table["irregular"].get(word)
            forms = _listed(irregular) if irregular else list(inflect(word))
            ing.setdefault(forms[0], answer)
            for form in forms[1:2]:
                third.setdefault(form, answer)
            for form in forms[2:]:
                past.setdefault(form, answer)
            base.setdefault(word, answer)
    return Verbs(
        ing=ing,
        third=third,
        base=base,
        past=past,
        never=frozenset(_listed(table["never_answers"])),
        blurs=frozenset(_listed(table["blurs"])),
        rows=tuple(frozenset(row) for row in table["apart"]),
        not_before=frozenset(_listed(table["not_verbs_before"])),
    )
