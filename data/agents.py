"""Who a picture is about, and what they do, as its captions agree."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from vlm.data.captions import Caption
from vlm.data.grammar import words
from vlm.data.lexicon import Lexicon
from vlm.data.picture import PictureText

# The more particular first: of two nouns that as many captions use, the first is asked after.
NOUNS = ("man", "woman", "boy", "girl", "baby", "child", "person", "dog")
PLURALS = {
    "man": "men", "woman": "women", "boy": "boys", "girl": "girls", "child": "children", "dog": "dogs",
}  # fmt: skip
GAMES = frozenset(
    ("soccer", "football", "basketball", "baseball", "tennis", "volleyball", "hockey", "rugby", "lacrosse",
     "golf", "frisbee", "fetch", "tug-of-war", "guitar", "cricket", "badminton", "drums", "piano", "softball",
     "accordion", "violin", "saxophone", "trumpet")
)  # fmt: skip
RIDES = {
    "bicycle": "riding a bike", "motorcycle": "riding a motorcycle", "horse": "riding a horse",
    "skateboard": "skateboarding", "wave": "surfing", "surfboard": "surfing", "snowboard": "snowboarding",
    "scooter": "riding a scooter", "atv": "riding an atv", "cow": "riding a bull", "sled": "sledding",
}  # fmt: skip
# These say nothing of what someone does; the next verb may.
EMPTY_VERBS = frozenset(("wearing", "dressing", "trying", "getting", "going"))


@dataclass(frozen=True)
class Agent:
    """Who the picture is about: `noun` as a question says it ("dog", "dogs", "people")."""

    kind: str
    """`person` or `dog`."""
    noun: str
    many: bool

    @property
    def verb(self) -> str:
        """ "is" or "are"."""
        return "are" if self.many else "is"


def agent_of(picture: PictureText, kind: str) -> Agent | None:
    """How a question names the picture's people (`person`) or dogs (`dog`); None if captions disagree."""
    values = picture.counts(kind)
    if len(values) < 2:
        return None
    mentions = [m for per_caption in picture.mentions(kind) for m in per_caption]
    names = Counter(m.thing for m in mentions)
    if all(value == 1 for value in values) and words("void_one").isdisjoint(picture.forms):
        known = [
            name for name in NOUNS if names[name] >= 2 and name != "person" and not picture.disputed(name)
        ]
        noun = max(known, key=lambda name: names[name], default=kind)
        return Agent(kind, noun, False)
    if all(m.many for m in mentions):
        name, support = names.most_common(1)[0]
        everyone = "dogs" if kind == "dog" else "people"
        return Agent(kind, PLURALS.get(name, everyone) if support == len(mentions) else everyone, True)
    return None


def agents_of(picture: PictureText) -> list[Agent]:
    """The people and the dogs, where captions agree on them."""
    return [agent for agent in (agent_of(picture, "person"), agent_of(picture, "dog")) if agent]


def first_kind(caption: Caption, lexicon: Lexicon) -> str:
    """`person`, `dog` or another animal: whom the caption names first; empty if nobody."""
    for mention in caption.mentions:
        for kind in ("person", "dog", "animal"):
            if any(lexicon.is_kind_of(thing, kind) for thing in mention.things):
                return kind
    return ""


def _first_action(caption: Caption, start: int, end: int) -> str | None:
    for verb in caption.verbs:
        if verb.at < start or verb.name in EMPTY_VERBS:
            continue
        if verb.at >= end:
            return None
        if verb.name == "playing":
            game = next(
                (token for token in caption.tokens[verb.at + 1 : verb.at + 3] if token in GAMES), None
            )
            return f"playing {game}" if game else "playing"
        if verb.name == "biking":
            return "riding a bike"
        if verb.name == "riding":
            ridden = next((m for m in caption.mentions if verb.at < m.start <= verb.at + 5), None)
            return (
                next((RIDES[thing] for thing in ridden.things if thing in RIDES), "riding")
                if ridden
                else "riding"
            )
        return verb.name
    return None


def actions(picture: PictureText, kind: str) -> Counter[str]:
    """What captions say that their first person (or dog) does, objects included ("riding a bike").

    A caption counts only if nobody else is named before, and only the words up to the next agent are read.
    """
    found: Counter[str] = Counter()
    kinds = picture.lexicon.descendants[kind] | {kind}
    living = (
        {"person", "animal"} | picture.lexicon.descendants["person"] | picture.lexicon.descendants["animal"]
    )
    for caption in picture.captions:
        everyone = [m for m in caption.mentions if not living.isdisjoint(m.things)]
        if not everyone or kinds.isdisjoint(everyone[0].things):
            continue
        end = everyone[1].start if len(everyone) > 1 else len(caption.tokens)
        action = _first_action(caption, everyone[0].end, end)
        if action:
            found[action] += 1
    return found


def main_action(picture: PictureText, kind: str) -> str | None:
    """The action that at least two captions give, more than give any other; None if there is none."""
    ranked = actions(picture, kind).most_common(2)
    if not ranked or ranked[0][1] < 2 or (len(ranked) > 1 and ranked[1][1] == ranked[0][1]):
        return None
    return ranked[0][0]
