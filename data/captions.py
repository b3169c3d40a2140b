"""What one caption says, read by rules: which things it names, how many, in which colours, who does what.

The rules are narrow on purpose. What they cannot read they leave unread, so that a question made from a
caption is right rather than plentiful.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from vlm.data.lexicon import Lexicon

VERBS_PATH = Path(__file__).with_name("verbs.json")
NUMBERS = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "2": 2, "3": 3,
    "4": 4, "5": 5, "6": 6,
}  # fmt: skip
ONE = frozenset("a an one another each this that single lone".split())
DEFINITE = frozenset("the his her its their this that".split())
UNSURE = frozenset(
    "toy stuffed fake plastic model statue painted cardboard without no not like as picture painting drawing "
    "imaginary robot sculpture ceramic bronze chocolate replica mechanical pretend shaped plush hot cartoon image "
    "photograph photo costume depicting unseen resembling resembles balloon blow-up dressed either or".split()
)
BOUNDARY = frozenset(
    "in on at of with by to from for into onto over under through near behind beside along across around past "
    "while as who that which and or but wearing is are was were has have the a an his her its their off up down "
    "after before against toward towards , . ; another some several many between above below inside outside out "
    "next dressed where when whose among during about both".split()
)
PREPOSITIONS = frozenset(
    "in on at through across along over under down up into onto inside around near by behind beside with of from "
    "against off above below".split()
)
_TOKEN = re.compile(r"[a-z0-9]+(?:['-][a-z0-9]+)*|[,.;]")


@dataclass(frozen=True)
class Mention:
    """A thing that a caption names: tokens `start` to `end` (exclusive)."""

    things: tuple[str, ...]
    form: str
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
    """Every word and word group of up to three words."""


@dataclass(frozen=True)
class Verbs:
    """The table of verbs: surface form -> answer."""

    ing: dict[str, str]
    third: dict[str, str]
    base: dict[str, str]
    past: dict[str, str]
    never: frozenset[str]
    blurs: frozenset[str]
    rows: tuple[frozenset[str], ...]
    not_before: frozenset[str]


def _inflect(base: str) -> tuple[str, str]:
    if base.endswith("e") and not base.endswith("ee"):
        ing = base[:-1] + "ing"
    else:
        ing = base + "ing"
    if base.endswith(("s", "x", "z", "ch", "sh")):
        third = base + "es"
    elif base.endswith("y") and base[-2] not in "aeiou":
        third = base[:-1] + "ies"
    else:
        third = base + "s"
    return ing, third


@functools.cache
def verbs() -> Verbs:
    """The table that ships with the package (read once)."""
    table = json.loads(VERBS_PATH.read_text(encoding="utf-8"))
    ing: dict[str, str] = {}
    third: dict[str, str] = {}
    base: dict[str, str] = {}
    past: dict[str, str] = {}
    for answer, words in table["verbs"].items():
        for word in (part.strip() for part in words.split(",")):
            forms = table["irregular"].get(word)
            found = [part.strip() for part in forms.split(",")] if forms else list(_inflect(word))
            ing.setdefault(found[0], answer)
            for form in found[1:2]:
                third.setdefault(form, answer)
            for form in found[2:]:
                past.setdefault(form, answer)
            base.setdefault(word, answer)
    return Verbs(
        ing, third, base, past,
        never=frozenset(word.strip() for word in table["never_answers"].split(",")),
        blurs=frozenset(word.strip() for word in table["blurs"].split(",")),
        rows=tuple(frozenset(row) for row in table["apart"]),
        not_before=frozenset(word.strip() for word in table["not_verbs_before"].split(",")),
    )  # fmt: skip


def tokenise(caption: str) -> list[str]:
    """Lower-case words (hyphens and apostrophes kept inside) and the marks , . ;"""
    return _TOKEN.findall(caption.lower().replace("tee shirt", "t-shirt").replace("t shirt", "t-shirt"))


def word_forms(tokens: list[str]) -> frozenset[str]:
    """Every word, every part of a hyphenated word, and every group of two or three words."""
    plain = [token.removesuffix("'s").removesuffix("'") for token in tokens]
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
    while at >= 0 and len(seen) < 6:
        token = tokens[at]
        joins = token in ("and", ",") and 0 < at and tokens[at - 1] in lexicon.colours and tokens[at + 1] in (
            *lexicon.colours, "and"
        )  # fmt: skip
        if joins:
            at -= 1
            continue
        if token in BOUNDARY or token in NUMBERS or token in verbs().ing or token in verbs().third:
            break
        for part in token.split("-"):
            if part in lexicon.colours:
                colours.insert(0, lexicon.colours[part])
        seen.insert(0, token)
        at -= 1
    return at, tuple(dict.fromkeys(colours)), seen


def _quantity(tokens: list[str], at: int, many: bool, mass: bool) -> int | None:
    before = tokens[at] if at >= 0 else ""
    if mass:
        return None
    if not many:
        return None if before in NUMBERS and NUMBERS[before] > 1 else 1
    if before in NUMBERS:
        return NUMBERS[before]
    if before == "both":
        return 2
    if before == "of" and at >= 1 and tokens[at - 1] in ("pair", "couple"):
        return 2
    if before == "the" and at >= 2 and tokens[at - 1] == "of" and tokens[at - 2] in NUMBERS:
        return None
    return None


def _preposition(tokens: list[str], left: int) -> str:
    if left >= 0 and tokens[left] in ("a", "an", "the", "his", "her", "its", "their", "some", "this"):
        left -= 1
    return tokens[left] if left >= 0 and tokens[left] in PREPOSITIONS else ""


def _is_verb_here(tokens: list[str], start: int, end: int, lexicon: Lexicon) -> bool:
    """Whether a form that is noun and verb stands where a verb would ("a man surfs", not "the surf")."""
    form = " ".join(tokens[start:end])
    if form not in lexicon.verbs_too:
        return False
    before = tokens[start - 1] if start else ""
    noun_before = before in lexicon.singular or before in lexicon.plurals
    follows = before in BOUNDARY - {
        ",",
        ".",
        "and",
        "to",
        "who",
        "which",
        "that",
        "is",
        "are",
        "while",
        "where",
    }
    return (
        not before
        or noun_before
        or not (follows or before in lexicon.colours or before in NUMBERS or len(before) > 3)
    )


def _find_noun(
    tokens: list[str], start: int, lexicon: Lexicon
) -> tuple[int, tuple[str, ...], bool, str] | None:
    for size in (3, 2, 1):
        words = tokens[start : start + size]
        if len(words) < size:
            continue
        last = words[-1].removesuffix("'s").removesuffix("'")
        form = " ".join([*words[:-1], last])
        for table, many in ((lexicon.singular, False), (lexicon.plurals, True)):
            if form in table:
                return start + size, table[form], many, form
    return None


def _read_mentions(tokens: list[str], lexicon: Lexicon) -> list[Mention]:
    found: list[Mention] = []
    at = 0
    while at < len(tokens):
        match = _find_noun(tokens, at, lexicon)
        if match is None:
            at += 1
            continue
        end, things, many, form = match
        start, at = at, end
        if _is_verb_here(tokens, start, end, lexicon):
            continue
        possessive = tokens[end - 1].endswith(("'s", "'"))
        following = _find_noun(tokens, end, lexicon)
        if (
            following
            and not many
            and not possessive
            and not _is_verb_here(tokens, end, following[0], lexicon)
        ):
            continue  # a modifier: the dog of "dog collar" need not be there
        if (
            end < len(tokens)
            and tokens[end] in ("shaped", "costume", "print", "like", "themed")
            and not possessive
        ):
            continue
        left, colours, modifiers = _modifiers(tokens, start, lexicon)
        context = {*modifiers, *tokens[max(0, left - 2) : left + 1]}
        if context & UNSURE and not _harmless(tokens, left, modifiers):
            continue
        mass = form in lexicon.mass
        found.append(
            Mention(
                things,
                form,
                start,
                end,
                many,
                _quantity(tokens, left, many, mass),
                definite=left >= 0 and tokens[left] in DEFINITE,
                colours=colours,
                preposition=_preposition(tokens, left),
            )  # fmt: skip
        )
    return found


def _harmless(tokens: list[str], left: int, modifiers: list[str]) -> bool:
    """Whether the doubtful word near a noun is only "as a dog ..." (while), not "dressed as a dog"."""
    nearby = tokens[max(0, left - 2) : left + 1]
    doubtful = {*modifiers, *nearby} & UNSURE
    return (
        doubtful == {"as"}
        and (left < 2 or "dressed" not in tokens[max(0, left - 4) : left])
        and ("as" in nearby and left + 2 < len(tokens) and _verb_follows(tokens, left))
    )


def _verb_follows(tokens: list[str], left: int) -> bool:
    table = verbs()
    return any(token in table.third or token in ("is", "are") for token in tokens[left + 1 : left + 6])


def _read_verbs(tokens: list[str], mentions: list[Mention], lexicon: Lexicon) -> list[Verb]:
    table = verbs()
    ends = {mention.end: mention for mention in mentions}
    inside = {i for mention in mentions for i in range(mention.start, mention.end)}
    found = []
    for at, token in enumerate(tokens):
        before = tokens[at - 1] if at else ""
        after = tokens[at + 1] if at + 1 < len(tokens) else ""
        if at in inside:
            continue
        name = None
        if token in table.ing:
            adjective = before in ("a", "an", "the", "his", "her", "its", "their")
            if not adjective and after not in table.not_before:
                name = table.ing[token]
        elif token in table.past and before not in ("the", "a", "an"):
            name = table.past[token]
        elif token in table.third:
            noun_before = at in ends and not ends[at].many
            if noun_before or before in ("and", "that", "who", "which", "it", "he", "she", "while"):
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
    found = _read_verbs(tokens, mentions, lexicon)
    return Caption(tuple(tokens), tuple(mentions), tuple(found), word_forms(tokens))
