"""What one caption says, read by rules: which things it names, how many, in which colours, who does what.

The rules are narrow on purpose. What they cannot read they leave unread, so that a question made from a
caption is right rather than plentiful.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vlm.data.grammar import verbs, words
from vlm.data.lexicon import Lexicon

NUMBERS = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "2": 2, "3": 3, "4": 4, "5": 5, "6": 6,
}  # fmt: skip
DETERMINERS = frozenset(("a", "an", "the", "his", "her", "its", "their", "some", "this"))
CLAUSE_STARTS = frozenset(("and", "that", "who", "which", "it", "he", "she", "while"))
# After these, a word that is noun and verb is a verb ("a man and surfs"); after other small words a noun.
VERB_AFTER = frozenset((",", ".", "and", "to", "who", "which", "that", "is", "are", "while", "where"))
_TOKEN = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*|[,.;]")
_TEE_SHIRT = re.compile(r"\b(?:tee|t) shirt")


@dataclass(frozen=True)
class Mention:
    """A thing that a caption names: tokens `start` to `end` (exclusive)."""

    things: tuple[str, ...]
    form: str
    """The words that name it, as the lexicon has them."""
    start: int
    end: int
    many: bool
    count: int | None
    """1 for a singular, the number where one stands before a plural, else None."""
    definite: bool
    colours: tuple[str, ...]
    preposition: str
    """The word before its determiner, if that is a preposition, else empty."""

    @property
    def thing(self) -> str:
        """The first of the concepts."""
        return self.things[0]


@dataclass(frozen=True)
class Verb:
    """An action: its answer form ("running") and its place."""

    name: str
    at: int


@dataclass(frozen=True)
class Caption:
    """A caption, read."""

    tokens: tuple[str, ...]
    mentions: tuple[Mention, ...]
    verbs: tuple[Verb, ...]
    forms: frozenset[str]
    """Every word, every part of a hyphenated word, every group of two or three words."""


def tokenise(caption: str) -> list[str]:
    """Lower-case words (hyphens and apostrophes kept inside) and the marks , . ;"""
    return _TOKEN.findall(_TEE_SHIRT.sub("t-shirt", caption.lower()))


def bare(token: str) -> str:
    """A word without its possessive ending."""
    return token.removesuffix("'s").removesuffix("'")


def word_forms(tokens: list[str]) -> frozenset[str]:
    """Every word, every part of a hyphenated word, and every group of two or three words."""
    plain = [bare(token) for token in tokens]
    found = set(plain)
    for token in plain:
        found.update(token.split("-"))
    for size in (2, 3):
        found.update(" ".join(plain[i : i + size]) for i in range(len(plain) - size + 1))
    return frozenset(found)


def _modifiers(tokens: list[str], start: int, lexicon: Lexicon) -> tuple[int, tuple[str, ...], list[str]]:
    """(index of the determiner or boundary before the modifiers, colours, modifiers) left of a noun."""
    at = start - 1
    colours: list[str] = []
    seen: list[str] = []
    table, boundary = verbs(), words("boundary")
    while at >= 0 and len(seen) < 6:
        token = tokens[at]
        joins = token in ("and", ",") and at > 0 and tokens[at - 1] in lexicon.colours
        if joins and (tokens[at + 1] in lexicon.colours or tokens[at + 1] == "and"):
            at -= 1  # "black and white dog", "red , white and blue shirt"
            continue
        if token in boundary or token in NUMBERS or token in table.ing or token in table.third:
            break
        colours[:0] = [lexicon.colours[part] for part in token.split("-") if part in lexicon.colours]
        seen.insert(0, token)
        at -= 1
    return at, tuple(dict.fromkeys(colours)), seen


def _quantity(tokens: list[str], at: int, many: bool, mass: bool) -> int | None:
    before = tokens[at] if at >= 0 else ""
    if mass:
        return None
    if not many:
        return 1 if NUMBERS.get(before, 1) == 1 else None
    if before in NUMBERS:
        return NUMBERS[before]
    if before == "both" or (before == "of" and at >= 1 and tokens[at - 1] in ("pair", "couple")):
        return 2
    return None


def _preposition(tokens: list[str], left: int) -> str:
    if left >= 0 and tokens[left] in DETERMINERS:
        left -= 1
    return tokens[left] if left >= 0 and tokens[left] in words("prepositions") else ""


def _is_verb_here(tokens: list[str], start: int, end: int, lexicon: Lexicon) -> bool:
    """Whether a form that is noun and verb stands where a verb would ("a man surfs", not "the surf")."""
    if " ".join(tokens[start:end]) not in lexicon.verbs_too:
        return False
    before = tokens[start - 1] if start else ""
    if not before or before in lexicon.singular or before in lexicon.plurals:
        return True
    noun = before in words("boundary") - VERB_AFTER or before in lexicon.colours or before in NUMBERS
    return not (noun or len(before) > 3)


def _find_noun(
    tokens: list[str], start: int, lexicon: Lexicon
) -> tuple[int, tuple[str, ...], bool, str] | None:
    """(end, things, whether a plural, form) of the longest noun that begins at `start`."""
    for size in (3, 2, 1):
        found = tokens[start : start + size]
        if len(found) < size:
            continue
        form = " ".join([*found[:-1], bare(found[-1])])
        for table, many in ((lexicon.singular, False), (lexicon.plurals, True)):
            if form in table:
                return start + size, table[form], many, form
    return None


def _is_modifier(tokens: list[str], end: int, many: bool, lexicon: Lexicon) -> bool:
    """Whether the noun that ends here only describes the next: "dog collar" needs no dog."""
    if tokens[end - 1].endswith(("'s", "'")):
        return False
    if tokens[end : end + 1] and tokens[end] in ("shaped", "costume", "print", "like", "themed"):
        return True
    following = _find_noun(tokens, end, lexicon)
    return following is not None and not many and not _is_verb_here(tokens, end, following[0], lexicon)


def _is_doubtful(tokens: list[str], left: int, modifiers: list[str]) -> bool:
    """Whether a word near a noun says that the thing is not really there ("toy", "no", "dressed as a")."""
    nearby = tokens[max(0, left - 2) : left + 1]
    doubtful = {*modifiers, *nearby} & words("unsure")
    if doubtful == {"as"} and "dressed" not in tokens[max(0, left - 4) : left]:
        table = verbs()  # "... as a dog looks on" is time, not likeness
        return not any(t in table.third or t in ("is", "are") for t in tokens[left + 1 : left + 6])
    return bool(doubtful)


def _read_mentions(tokens: list[str], lexicon: Lexicon) -> list[Mention]:
    found: list[Mention] = []
    at = 0
    while at < len(tokens):
        match = _find_noun(tokens, at, lexicon)
        if match is None:
            at += 1
            continue
        start, (at, things, many, form) = at, match
        if _is_verb_here(tokens, start, at, lexicon) or _is_modifier(tokens, at, many, lexicon):
            continue
        left, colours, modifiers = _modifiers(tokens, start, lexicon)
        if _is_doubtful(tokens, left, modifiers):
            continue
        found.append(
            Mention(
                things=things,
                form=form,
                start=start,
                end=at,
                many=many,
                count=_quantity(tokens, left, many, form in lexicon.mass),
                definite=left >= 0 and tokens[left] in words("definite"),
                colours=colours,
                preposition=_preposition(tokens, left),
            )
        )
    return found


def _read_verbs(tokens: list[str], mentions: list[Mention]) -> list[Verb]:
    table = verbs()
    ends = {mention.end: mention for mention in mentions}
    inside = {i for mention in mentions for i in range(mention.start, mention.end)}
    found = []
    for at, token in enumerate(tokens):
        before = tokens[at - 1] if at else ""
        after = tokens[at + 1] if at + 1 < len(tokens) else ""
        name = None
        if at in inside:
            continue
        if token in table.ing:
            if before not in DETERMINERS and after not in table.not_before:
                name = table.ing[token]
        elif token in table.past:
            if before not in ("the", "a", "an"):
                name = table.past[token]
        elif token in table.third:
            if (at in ends and not ends[at].many) or before in CLAUSE_STARTS:
                name = table.third[token]
        elif token in table.base and ((at in ends and ends[at].many) or before in ("they", "each")):
            name = table.base[token]
        if name is not None:
            found.append(Verb(name, at))
    return found


def read_caption(caption: str, lexicon: Lexicon) -> Caption:
    """Read one caption; a caption without a known word gives empty lists, never an error."""
    tokens = tokenise(caption)
    mentions = _read_mentions(tokens, lexicon)
    return Caption(tuple(tokens), tuple(mentions), tuple(_read_verbs(tokens, mentions)), word_forms(tokens))
