"""The words of photograph captions: what names what, what is a kind of what, what makes a "no" doubtful.

The table is `lexicon.json`. It is curated, not a dictionary: a few thousand word forms cover the nouns of
Flickr8k-like captions, and a curated "near" list knows what no thesaurus does (that a picture of a street
may show a car that no caption names).
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.data.grammar import verbs
from vlm.kinds import plural

PATH = Path(__file__).with_name("lexicon.json")


@dataclass(frozen=True)
class Thing:
    """A concept that captions name."""

    name: str
    parent: str | None
    words: frozenset[str]
    """Singular and plural forms that name it, hyponyms among them."""
    near: frozenset[str]
    """Forms that make a "no" doubtful, besides its own, its hypernyms' and its hyponyms' words."""
    needs: frozenset[str]
    """If not empty, a "no" is asked only where a caption has one of these (elsewhere it goes unsaid)."""
    rivals: tuple[str, ...]
    """Concepts that people take for it: a "yes" is not asked where captions disagree between the two."""
    ask: bool
    """Whether its presence is asked after."""
    min_captions: int
    """Captions that must name it before a "yes" is asked."""


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


@dataclass(frozen=True)
class Lexicon:
    """Everything in the table, indexed for lookup."""

    things: dict[str, Thing]
    singular: dict[str, tuple[str, ...]]
    """Singular (or mass) form -> the concepts that it names ("meadow" is grass and a field)."""
    plurals: dict[str, tuple[str, ...]]
    """Plural form -> concepts."""
    singular_of: dict[str, str]
    """Plural form -> singular form."""
    mass: frozenset[str]
    """Forms that are not counted."""
    verbs_too: frozenset[str]
    """Noun forms that are verbs as well: their place in the sentence tells which."""
    colours: dict[str, str]
    """Colour word -> the answer that is given for it."""
    similar: frozenset[frozenset[str]]
    """Pairs of colours that two people may give to one thing."""

    def ancestors(self, name: str) -> list[str]:
        """Hypernyms of a concept, the nearest first."""
        found: list[str] = []
        parent = self.things[name].parent
        while parent is not None:
            found.append(parent)
            parent = self.things[parent].parent
        return found

    @functools.cached_property
    def descendants(self) -> dict[str, frozenset[str]]:
        """Concept -> its hyponyms, itself not among them."""
        below: dict[str, set[str]] = {name: set() for name in self.things}
        for name in self.things:
            for above in self.ancestors(name):
                below[above].add(name)
        return {name: frozenset(names) for name, names in below.items()}

    @functools.cached_property
    def blocking(self) -> dict[str, frozenset[str]]:
        """Concept -> forms that must stand in no caption of a picture whose answer is "no"."""
        table = {}
        for name, thing in self.things.items():
            forms = set(thing.words | thing.near)
            for other in (*self.ancestors(name), *self.descendants[name]):
                forms |= self.things[other].words
            table[name] = frozenset(forms)
        return table

    def blocks(self, thing: str, form: str) -> bool:
        """Whether a word (group) of a caption leaves a "no" about `thing` in doubt.

        Besides the listed words, a word that begins or ends with the thing's own name does ("snowboard" for
        snow), if that has four letters or more.
        """
        stem = thing.rpartition(" ")[2]
        if form in self.blocking[thing]:
            return True
        return len(stem) >= 4 and " " not in form and (form.startswith(stem) or form.endswith(stem))

    def allows_no(self, thing: str, forms: frozenset[str]) -> bool:
        """Whether captions with these word forms let "Is there a ...?" be answered "no"."""
        needs = self.things[thing].needs
        return (not needs or bool(forms & needs)) and not any(self.blocks(thing, form) for form in forms)

    def is_kind_of(self, name: str, kind: str) -> bool:
        """Whether `name` is `kind` or one of its hyponyms."""
        return name == kind or name in self.descendants[kind]


def _thing(name: str, row: dict[str, Any], irregular: dict[str, str]) -> tuple[Thing, list[str], list[str]]:
    singular = _words(row.get("words", ""))
    many = _words(row["plural"]) if "plural" in row else [plural(word, irregular) for word in singular]
    near = _words(row.get("near", ""))
    thing = Thing(
        name=name,
        parent=row.get("is"),
        words=frozenset((*singular, *many)),
        near=frozenset((*near, *(plural(word, irregular) for word in near), *_as_verbs(near))),
        needs=frozenset(_words(row.get("needs", ""))),
        rivals=tuple(_words(row.get("rivals", ""))),
        ask=bool(row.get("ask", True)),
        min_captions=int(row.get("min", 2)),
    )
    return thing, singular, many


def _as_verbs(words: Iterable[str]) -> frozenset[str]:
    """The forms of those of the words that are verbs ("surf" -> "surfs", "surfing")."""
    table = verbs()
    actions = {table.base[word] for word in words if word in table.base}
    return frozenset(
        form
        for forms in (table.base, table.ing, table.third, table.past)
        for form, action in forms.items()
        if action in actions
    )


def _with_plurals(words: Iterable[str], irregular: dict[str, str]) -> frozenset[str]:
    words = list(words)
    return frozenset((*words, *(plural(word, irregular) for word in words)))


@functools.cache
def load() -> Lexicon:
    """The table that ships with the package (read once)."""
    table = json.loads(PATH.read_text(encoding="utf-8"))
    irregular = table["irregular_plurals"]
    mass = frozenset(_words(table["mass"]))
    things: dict[str, Thing] = {}
    singular: dict[str, tuple[str, ...]] = {}
    plurals: dict[str, tuple[str, ...]] = {}
    singular_of: dict[str, str] = {}
    for name, row in table["things"].items():
        thing, ones, many = _thing(name, row, irregular)
        things[name] = thing
        for word in ones:
            if word == "people":  # a plural without a singular of its own
                continue
            singular[word] = (*singular.get(word, ()), name)
        if "plural" not in row:
            singular_of.update(zip(many, ones, strict=True))
        for word in many:
            if word not in mass:
                plurals[word] = (*plurals.get(word, ()), name)
    colours = {word: name for name, words in table["colours"].items() for word in _words(words)}
    return Lexicon(
        things=things,
        singular=singular,
        plurals=plurals,
        singular_of=singular_of,
        mass=mass,
        verbs_too=_with_plurals(_words(table["verbs_too"]), irregular),
        colours=colours,
        similar=frozenset(
            frozenset(pair) for row in table["similar_colours"] for pair in itertools.combinations(row, 2)
        ),
    )
