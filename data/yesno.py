"""Balanced yes/no questions: every question string gets exactly as many "no" as "yes".

A "no" is asked only where it is safe: no caption has a word for the object, its synonyms, hypernyms or
hyponyms, or a word that makes its unseen presence likely. Half of the "no" pictures are hard ones, drawn by
how often the object stands in other pictures together with what this one holds (the "adversarial" setting
of POPE, Li et al. 2023); the others are drawn at random.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

from vlm.data.agents import actions as action_counts
from vlm.data.agents import agent_of
from vlm.data.grammar import verbs, words
from vlm.data.lexicon import Lexicon
from vlm.data.picture import PictureText

TEMPLATES = (
    "Is there {} in the picture?",
    "Can you see {}?",
    "Does the picture show {}?",
    "Is there {} here?",
)
COLOUR_THINGS = (
    "dog",
    "shirt",
    "jacket",
    "hat",
    "helmet",
    "ball",
    "car",
    "shorts",
    "dress",
    "pants",
    "bicycle",
)
NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


@dataclass(frozen=True)
class Pair:
    """One question with its answer, about one picture."""

    picture: int
    question: str
    answer: str
    question_type: str
    probe: str = ""
    """What a yes/no question probes: presence, colour, count, action, scene."""
    thing: str = ""
    hard: bool = False


def unit(*key: Hashable) -> float:
    """A number in (0, 1) that is a function of the key alone."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return (int.from_bytes(digest[:8], "big") + 1) / (2**64 + 2)


def with_article(thing: str, lexicon: Lexicon) -> str:
    """The thing as a question names it: "a dog", "an umbrella", "snow"."""
    if thing in lexicon.mass or thing in ("stairs",):
        return thing
    return f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"


class Load:
    """How many yes/no questions each picture has so far, so that they are spread evenly."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.counts: Counter[tuple[int, str]] = Counter()

    def take(
        self, candidates: Iterable[int], answer: str, number: int, key: Callable[[int], float]
    ) -> list[int]:
        """Up to `number` pictures below the limit; those with fewer questions first, then by `key`."""
        free = [index for index in candidates if self.counts[index, answer] < self.limit]
        free.sort(key=lambda index: (self.counts[index, answer], key(index)))
        return free[:number]

    def add(self, pictures: Iterable[int], answer: str) -> None:
        """Count one more question each."""
        for index in pictures:
            self.counts[index, answer] += 1


def _association(pictures: Sequence[PictureText], asked: Sequence[str]) -> dict[str, dict[str, float]]:
    """thing -> other thing -> share of the other's pictures that hold the thing."""
    together: dict[str, Counter[str]] = defaultdict(Counter)
    alone: Counter[str] = Counter()
    for picture in pictures:
        names = [name for name in picture.support if name in picture.lexicon.things]
        alone.update(names)
        for name in names:
            if name in asked:
                together[name].update(other for other in names if other != name)
    return {
        thing: {other: count / alone[other] for other, count in others.items() if alone[other] >= 3}
        for thing, others in together.items()
    }


def absence_index(pictures: Sequence[PictureText], lexicon: Lexicon) -> Callable[[str], list[int]]:
    """thing -> pictures that surely lack it: `PictureText.surely_lacks`, by word instead of by picture."""
    holders: dict[str, list[int]] = defaultdict(list)
    for index, picture in enumerate(pictures):
        for form in picture.forms:
            holders[form].append(index)

    single = [form for form in holders if " " not in form]

    def lookup(thing: str) -> list[int]:
        blocked: set[int] = set()
        needed: set[int] = set()
        for form in (*lexicon.blocking[thing], *(word for word in single if lexicon.blocks(thing, word))):
            blocked.update(holders.get(form, ()))
        for form in lexicon.things[thing].needs:
            needed.update(holders.get(form, ()))
        free = needed if lexicon.things[thing].needs else range(len(pictures))
        return sorted(set(free) - blocked)

    return lookup


def presence(pictures: Sequence[PictureText], lexicon: Lexicon, load: Load, seed: int) -> list[Pair]:
    """ "Is there a dog in the picture?", rarest objects first so that they are not crowded out."""
    asked = [name for name, thing in lexicon.things.items() if thing.ask]
    score = _association(pictures, asked)
    having = {name: [i for i, p in enumerate(pictures) if p.surely_has(name)] for name in asked}
    without = absence_index(pictures, lexicon)
    pairs: list[Pair] = []
    for name in sorted(asked, key=lambda name: (len(having[name]), name)):
        lacking = without(name)
        ids = {i: pictures[i].example.id for i in (*having[name], *lacking)}
        cap = max(40, len(pictures) // 8)

        def chance(index: int, name: str = name, ids: dict[int, str] = ids) -> float:
            return unit(seed, name, ids[index])

        def hardness(index: int, name: str = name, ids: dict[int, str] = ids) -> float:
            others = score.get(name, {})
            best = max((others.get(other, 0.0) for other in pictures[index].support), default=0.0)
            return -(unit(seed, "hard", name, ids[index]) ** (1.0 / (best * best + 1e-3)))

        yes = load.take(having[name], "yes", cap, chance)
        free = [i for i in lacking if load.counts[i, "no"] < load.limit]
        number = min(len(yes), len(free))
        hard = sorted(free, key=hardness)[: (number + 1) // 2]
        rest = load.take([i for i in free if i not in set(hard)], "no", number - len(hard), chance)
        number = min(number, len(hard) + len(rest))
        chosen_no = [*hard, *rest][:number]
        load.add(yes[:number], "yes")
        load.add(chosen_no, "no")
        for rank, (one, other) in enumerate(zip(yes[:number], chosen_no, strict=True)):
            at = int(unit(seed, name, rank) * 2 * len(TEMPLATES))
            question = TEMPLATES[at if at < len(TEMPLATES) else 0].format(with_article(name, lexicon))
            pairs.append(Pair(one, question, "yes", "yes/no", "presence", name))
            pairs.append(Pair(other, question, "no", "yes/no", "presence", name, hard=rank < len(hard)))
    return pairs


def balanced(
    question: str,
    yes: list[int],
    no: list[int],
    probe: str,
    load: Load,
    seed: int,
    ids: Sequence[str],
    cap: int,
) -> list[Pair]:
    """Equally many "yes" and "no" of one question string."""

    def chance(index: int) -> float:
        return unit(seed, question, ids[index])

    chosen_yes = load.take(yes, "yes", cap, chance)
    chosen_no = load.take(no, "no", min(cap, len(chosen_yes)), chance)
    number = min(len(chosen_yes), len(chosen_no))
    load.add(chosen_yes[:number], "yes")
    load.add(chosen_no[:number], "no")
    return [
        Pair(index, question, answer, "yes/no", probe)
        for answer, chosen in (("yes", chosen_yes[:number]), ("no", chosen_no[:number]))
        for index in chosen
    ]


def colours(pictures: Sequence[PictureText], thing: str) -> dict[str, tuple[list[int], list[int]]]:
    """Question -> pictures where `thing` has that colour, pictures where it surely has another."""
    table: dict[str, tuple[list[int], list[int]]] = {}
    wearable = thing not in ("dog", "ball", "car", "bicycle")
    verb = "Are" if thing in ("shorts", "pants") else "Is"
    for index, picture in enumerate(pictures):
        if (wearable and not picture.single_person) or (not wearable and not picture.is_single(thing)):
            continue
        colour = picture.colour(thing)
        if colour is None or " and " in colour:
            continue
        for other in sorted(set(picture.lexicon.colours.values()) - {"mixed"}):
            yes, no = table.setdefault(f"{verb} the {thing} {other}?", ([], []))
            words = {word for word, name in picture.lexicon.colours.items() if name == other}
            if other == colour:
                yes.append(index)
            elif frozenset((other, colour)) not in picture.lexicon.similar and not words & picture.forms:
                no.append(index)
    return table


def counts(pictures: Sequence[PictureText], thing: str, noun: str) -> dict[str, tuple[list[int], list[int]]]:
    """Question -> pictures with that number of things, pictures with another number."""
    table: dict[str, tuple[list[int], list[int]]] = {}
    for index, picture in enumerate(pictures):
        number = picture.count(thing)
        if number is None:
            continue
        for asked in (2, 3):
            yes, no = table.setdefault(f"Are there {NUMBER_WORDS[asked]} {noun} in the picture?", ([], []))
            (yes if number == asked else no).append(index)
    return table


def actions(pictures: Sequence[PictureText], kind: str) -> dict[str, tuple[list[int], list[int]]]:
    """Question -> pictures whose people (or dogs) do that, pictures where what they do excludes it."""
    table: dict[str, tuple[list[int], list[int]]] = {}
    rows = verbs().rows
    row_of = {name: row for row in rows for name in row}
    for index, picture in enumerate(pictures):
        agent = agent_of(picture, kind)
        if agent is None:
            continue
        said = action_counts(picture, kind)
        for row in rows:
            for name in sorted(row):
                yes, no = table.setdefault(f"{agent.verb.capitalize()} the {agent.noun} {name}?", ([], []))
                others = {other for other in said if other in row_of and other not in row}
                if said[name] >= 2 and not others:
                    yes.append(index)
                elif _does_not(picture, row, said, row_of):
                    no.append(index)
    return table


def _does_not(
    picture: PictureText, row: frozenset[str], said: Counter[str], row_of: dict[str, frozenset[str]]
) -> bool:
    """Whether two captions say an action of another row, and none has a word of this row or a blur."""
    blurs = verbs().blurs
    sure = [name for name, count in said.items() if count >= 2 and name in row_of and name not in row]
    return bool(sure) and not picture.said_verbs & row and not picture.said_verbs & blurs


def scenes(pictures: Sequence[PictureText]) -> dict[str, tuple[list[int], list[int]]]:
    """Indoors or outdoors, where at least two captions have a word that settles it."""
    inside, outside = [], []
    for index, picture in enumerate(pictures):
        indoor = sum(bool(caption.forms & words("indoors")) for caption in picture.captions)
        outdoor = sum(bool(caption.forms & words("outdoors")) for caption in picture.captions)
        if indoor >= 2 and not outdoor and not picture.forms & {"stage", "concert", "train"}:
            inside.append(index)
        elif outdoor >= 2 and not indoor:
            outside.append(index)
    return {
        "Is this indoors?": (inside, outside),
        "Was the picture taken outdoors?": (outside, inside),
    }


def yes_no(pictures: Sequence[PictureText], lexicon: Lexicon, seed: int) -> list[Pair]:
    """All yes/no questions of a set of pictures: about four of presence a picture, one or two of the rest."""
    pairs = presence(pictures, lexicon, Load(2), seed)
    load = Load(1)
    ids = [picture.example.id for picture in pictures]
    tables = [("colour", colours(pictures, thing)) for thing in COLOUR_THINGS]
    nouns = [("dog", "dogs"), ("person", "people"), ("child", "children"), ("man", "men")]
    tables += [("count", counts(pictures, thing, noun)) for thing, noun in nouns]
    tables += [("action", actions(pictures, kind)) for kind in ("dog", "person")]
    tables.append(("scene", scenes(pictures)))
    flat = [(question, yes, no, probe) for probe, table in tables for question, (yes, no) in table.items()]
    for question, yes, no, probe in sorted(flat, key=lambda row: (min(len(row[1]), len(row[2])), row[0])):
        pairs += balanced(question, yes, no, probe, load, seed, ids, max(20, len(pictures) // 20))
    return pairs
