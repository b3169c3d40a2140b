"""What all captions of one picture say together: who and what is there, how many, in which colours."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from vlm.data.captions import Caption, Mention, read_caption
from vlm.data.example import Example
from vlm.data.grammar import verbs, words
from vlm.data.lexicon import Lexicon

AGENTS = ("man", "woman", "boy", "girl", "baby", "child", "person", "dog")


@dataclass(frozen=True)
class Agent:
    """Who the picture is about: `noun` as a question says it ("dog", "dogs", "people")."""

    kind: str
    """`person` or `dog`."""
    noun: str
    many: bool

    @property
    def verb(self) -> str:
        return "are" if self.many else "is"


@dataclass(frozen=True)
class PictureText:
    """The captions of one picture, read."""

    example: Example
    captions: tuple[Caption, ...]
    lexicon: Lexicon

    @classmethod
    def read(cls, example: Example, lexicon: Lexicon) -> PictureText:
        """Read an example's captions (`example.answers`)."""
        return cls(example, tuple(read_caption(text, lexicon) for text in example.answers), lexicon)

    @cached_property
    def forms(self) -> frozenset[str]:
        """Every word and word group of every caption."""
        return frozenset().union(*(caption.forms for caption in self.captions))

    @cached_property
    def support(self) -> dict[str, frozenset[int]]:
        """Thing (hypernyms included) -> indices of the captions that name it."""
        table: dict[str, set[int]] = {}
        for index, caption in enumerate(self.captions):
            for mention in caption.mentions:
                for thing in mention.things:
                    for name in (thing, *self.lexicon.ancestors(thing)):
                        table.setdefault(name, set()).add(index)
        return {name: frozenset(indices) for name, indices in table.items()}

    def mentions(self, thing: str) -> list[list[Mention]]:
        """Per caption, the mentions of `thing` or a hyponym."""
        return [
            [m for m in caption.mentions if any(self.lexicon.is_kind_of(name, thing) for name in m.things)]
            for caption in self.captions
        ]

    def disputed(self, thing: str) -> bool:
        """Whether captions disagree between `thing` and something that it is taken for."""
        mine = self.support.get(thing, frozenset())
        for rival in self.lexicon.things[thing].rivals:
            theirs = self.support.get(rival, frozenset())
            if theirs and not mine & theirs and not self.lexicon.is_kind_of(rival, thing):
                return True
        return False

    def surely_has(self, thing: str) -> bool:
        """Whether enough captions name it and none takes it for something else."""
        needed = self.lexicon.things[thing].min_captions
        return len(self.support.get(thing, ())) >= needed and not self.disputed(thing)

    def surely_lacks(self, thing: str) -> bool:
        """Whether no caption has a word for it, its synonyms, hypernyms, hyponyms, or a near word."""
        return self.lexicon.allows_no(thing, self.forms)

    def counts(self, thing: str) -> list[int | None]:
        """Per caption that names it: how many it says, None where it doesn't."""
        found: list[int | None] = []
        for caption, mentions in zip(self.captions, self.mentions(thing), strict=True):
            if not mentions:
                continue
            total = 0
            seen: set[str] = set()
            known = True
            for mention in mentions:
                if mention.definite and not mention.many and mention.thing in seen:
                    continue
                known = known and mention.count is not None
                total += mention.count or 0
                seen.add(mention.thing)
            if total == 1 and words("void_one") & set(caption.tokens):
                known = False
            found.append(total if known else None)
        return found

    def count(self, thing: str) -> int | None:
        """The number that at least two captions (three for one) give and none contradicts, else None."""
        values = self.counts(thing)
        known = Counter(value for value in values if value is not None)
        if len(known) != 1:
            return None
        number, support = next(iter(known.items()))
        if number == 1:
            plural = any(mention.many for mentions in self.mentions(thing) for mention in mentions)
            vague = self.lexicon.is_kind_of(thing, "person") and bool(words("people_words") & self.forms)
            return 1 if support >= 3 and not plural and not vague else None
        return number if support >= 2 else None

    def is_single(self, thing: str) -> bool:
        """Whether no caption speaks of more than one (weaker than `count == 1`)."""
        many = any(mention.many for mentions in self.mentions(thing) for mention in mentions)
        return (
            not many and all(value in (None, 1) for value in self.counts(thing)) and bool(self.counts(thing))
        )

    @cached_property
    def single_person(self) -> bool:
        """Whether there is one person as far as anyone says."""
        return (
            self.is_single("person")
            and not words("people_words") & self.forms
            and "another" not in self.forms
        )

    def colour(self, thing: str) -> str | None:
        """The colour (or two, as "black and white") that captions agree on, else None."""
        said: Counter[tuple[str, ...]] = Counter()
        for mentions in self.mentions(thing):
            for mention in mentions:
                if mention.colours:
                    said[mention.colours] += 1
        if not said or any(len(colours) > 2 for colours in said):
            return None
        best, _ = max(said.items(), key=lambda item: (item[1], -len(item[0]), item[0]))
        for other in said:
            if frozenset(other) == frozenset(best):
                continue
            if len(best) > 1 or len(other) > 1 or frozenset((*best, *other)) not in self.lexicon.similar:
                return None
        order = sorted(best, key=lambda colour: (colour == "white", colour))
        return " and ".join(order)

    def agent(self, kind: str) -> Agent | None:
        """How a question names the picture's people (`person`) or dogs (`dog`), if captions agree."""
        values = self.counts(kind)
        mentions = [m for per_caption in self.mentions(kind) for m in per_caption]
        if len(values) < 2:
            return None
        many = {value is None or value > 1 for value in values}
        plural = [m.many for m in mentions]
        if many == {False}:
            names = Counter(m.thing for m in mentions if m.thing in AGENTS)
            if names and not words("void_one") & self.forms:
                name = max(names, key=lambda n: (names[n] * (n != "person"), -AGENTS.index(n)))
                if names[name] >= 2 and not self.disputed(name):
                    return Agent(kind, name, False)
                return Agent(kind, "dog" if kind == "dog" else "person", False)
        if all(plural):
            names = Counter(m.thing for m in mentions)
            name, support = names.most_common(1)[0]
            plurals = {
                "man": "men",
                "woman": "women",
                "boy": "boys",
                "girl": "girls",
                "child": "children",
                "dog": "dogs",
            }
            if support == len(mentions) and name in plurals:
                return Agent(kind, plurals[name], True)
            return Agent(kind, "dogs" if kind == "dog" else "people", True)
        return None

    def actions(self, kind: str) -> list[str]:
        """Per caption that says so: what the first person (or dog) that it names does, objects included."""
        found = []
        for caption in self.captions:
            agents = [m for m in caption.mentions if any(self.lexicon.is_kind_of(t, kind) for t in m.things)]
            everyone = [
                m for m in caption.mentions
                if any(self.lexicon.is_kind_of(t, k) for t in m.things for k in ("person", "animal"))
            ]  # fmt: skip
            if not agents or not everyone or everyone[0] is not agents[0]:
                continue
            later = [m.start for m in everyone[1:] if m.start > agents[0].end]
            action = _first_action(caption, agents[0].end, min(later, default=len(caption.tokens)))
            if action:
                found.append(action)
        return found

    @cached_property
    def said_verbs(self) -> frozenset[str]:
        """Every action of every caption, whoever does it, noun uses and infinitives included."""
        table = verbs()
        found = set()
        for form in self.forms:
            for forms in (table.ing, table.third, table.base, table.past):
                if form in forms:
                    found.add(forms[form])
        return frozenset(found)


SPORTS = {
    "soccer": "soccer", "football": "football", "basketball": "basketball", "baseball": "baseball",
    "tennis": "tennis", "volleyball": "volleyball", "hockey": "hockey", "rugby": "rugby", "lacrosse": "lacrosse",
    "golf": "golf", "frisbee": "frisbee", "fetch": "fetch", "tug-of-war": "tug-of-war", "guitar": "guitar",
    "cricket": "cricket", "badminton": "badminton", "drums": "drums", "piano": "piano", "softball": "softball",
    "accordion": "accordion", "violin": "violin", "saxophone": "saxophone", "trumpet": "trumpet",
}  # fmt: skip
RIDES = {
    "bicycle": "riding a bike", "motorcycle": "riding a motorcycle", "horse": "riding a horse",
    "skateboard": "skateboarding", "wave": "surfing", "surfboard": "surfing", "snowboard": "snowboarding",
    "scooter": "riding a scooter", "atv": "riding an atv", "cow": "riding a bull", "sled": "sledding",
}  # fmt: skip


def _first_action(caption: Caption, start: int, end: int) -> str | None:
    for verb in caption.verbs:
        if verb.at < start:
            continue
        if verb.at >= end:
            return None
        if verb.name in ("wearing", "dressing", "having", "trying", "getting", "going"):
            continue
        after = caption.tokens[verb.at + 1 : verb.at + 4]
        if verb.name == "playing":
            game = next((SPORTS[token] for token in after[:2] if token in SPORTS), None)
            return f"playing {game}" if game else "playing"
        if verb.name == "biking":
            return "riding a bike"
        if verb.name == "riding":
            ridden = next((m for m in caption.mentions if verb.at < m.start <= verb.at + 5), None)
            name = next((RIDES[t] for t in ridden.things if t in RIDES), None) if ridden else None
            return name or "riding"
        return verb.name
    return None
