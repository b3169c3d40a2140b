"""What all captions of one picture say together: what is there, how many, in which colours."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from vlm.data.captions import Caption, Mention, read_caption
from vlm.data.example import Example
from vlm.data.grammar import verbs, words
from vlm.data.lexicon import Lexicon


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

    @cached_property
    def said_verbs(self) -> frozenset[str]:
        """Every action of every caption, whoever does it, noun uses and infinitives included."""
        table = verbs()
        forms = (table.ing, table.third, table.base, table.past)
        return frozenset(known[form] for form in self.forms for known in forms if form in known)

    @cached_property
    def _found(self) -> dict[str, list[list[Mention]]]:
        return {}

    def mentions(self, thing: str) -> list[list[Mention]]:
        """Per caption, the mentions of `thing` or a hyponym."""
        if thing not in self.support:
            return [[] for _ in self.captions]
        if thing not in self._found:
            kinds = self.lexicon.descendants[thing] | {thing}
            self._found[thing] = [
                [m for m in caption.mentions if not kinds.isdisjoint(m.things)] for caption in self.captions
            ]
        return self._found[thing]

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
                    continue  # "a dog ... the dog" is one
                known = known and mention.count is not None
                total += mention.count or 0
                seen.add(mention.thing)
            if total == 1 and not words("void_one").isdisjoint(caption.tokens):
                known = False  # "a dog and the other"
            found.append(total if known else None)
        return found

    def has_plural(self, thing: str) -> bool:
        """Whether a caption names it in the plural."""
        return any(mention.many for mentions in self.mentions(thing) for mention in mentions)

    def count(self, thing: str) -> int | None:
        """The number that at least two captions (three for one) give and none contradicts, else None."""
        known = Counter(value for value in self.counts(thing) if value is not None)
        if len(known) != 1 or any(_another_acts(caption) for caption in self.captions):
            return None  # "three children swing while another watches"
        number, support = next(iter(known.items()))
        people = self.lexicon.is_kind_of(thing, "person")
        if number > 1:
            more = people and not words("uncounted").isdisjoint(self.forms)
            return number if support >= 2 and not more else None
        vague = people and not words("people_words").isdisjoint(self.forms)
        return 1 if support >= 3 and not self.has_plural(thing) and not vague else None

    def is_single(self, thing: str) -> bool:
        """Whether some caption names it and none speaks of more than one (weaker than `count == 1`)."""
        values = self.counts(thing)
        return bool(values) and not self.has_plural(thing) and all(value in (None, 1) for value in values)

    @cached_property
    def single_person(self) -> bool:
        """Whether there is one person as far as anyone says."""
        alone = words("people_words").isdisjoint(self.forms) and "another" not in self.forms
        return alone and self.is_single("person")

    @cached_property
    def dressed_in(self) -> frozenset[str]:
        """Colours that someone is said to be dressed in without a garment being named ("a man in pink")."""
        colours = self.lexicon.colours
        return frozenset(
            colours[colour]
            for caption in self.captions
            for word, colour, after in zip(
                caption.tokens, caption.tokens[1:], (*caption.tokens[2:], "."), strict=False
            )
            if word in ("in", "wearing")
            and colour in colours
            and after in words("boundary") | {"who", "doing"}
        )

    def colour(self, thing: str) -> str | None:
        """The colour (or two, as "black and white") that captions agree on, else None.

        Two colours that people give to one thing (brown, tan) do not disagree; "colorful" agrees with none.
        """
        said = Counter(m.colours for mentions in self.mentions(thing) for m in mentions if m.colours)
        if not said or any(len(colours) > 2 or "mixed" in colours for colours in said):
            return None
        best, _ = max(said.items(), key=lambda item: (item[1], -len(item[0]), item[0]))
        for other in said:
            if frozenset(other) == frozenset(best):
                continue
            if len(best) > 1 or len(other) > 1 or frozenset((*best, *other)) not in self.lexicon.similar:
                return None
        return " and ".join(sorted(best, key=lambda colour: (colour == "white", colour)))


def _another_acts(caption: Caption) -> bool:
    """Whether "another" (or "others") stands alone as the one who does something."""
    table = verbs()
    for token, after in zip(caption.tokens, (*caption.tokens[1:], "."), strict=True):
        acts = after in table.third or after in table.ing or after in table.base or after in words("boundary")
        if token in ("another", "others") and acts:
            return True
    return False
