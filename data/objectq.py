"""Questions that a thing answers: "What is the man holding?", "What animal is in the picture?"."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from vlm.data.agents import agent_of
from vlm.data.captions import Caption, Mention
from vlm.data.grammar import verbs, words
from vlm.data.lexicon import Lexicon
from vlm.data.picture import PictureText
from vlm.data.yesno import Pair

KINDS = (
    ("What animal is in the picture?", "animal"),
    ("What vehicle is in the picture?", "vehicle"),
)
# Of the animals and vehicles, these are names that a person would give; the rest are gathered ones.
NAMED = frozenset(
    ("dog", "cat", "horse", "cow", "sheep", "bird", "fish", "rabbit", "monkey", "goat", "elephant", "camel",
     "squirrel", "car", "truck", "bus", "train", "airplane", "boat", "bicycle", "motorcycle", "scooter",
     "atv")
)  # fmt: skip
SPORTS = {
    "soccer": ("soccer",), "football": ("football",), "basketball": ("basketball",),
    "baseball": ("baseball",), "tennis": ("tennis",), "volleyball": ("volleyball",), "hockey": ("hockey",),
    "rugby": ("rugby",), "lacrosse": ("lacrosse",), "golf": ("golf", "golfer"),
    "wrestling": ("wrestling", "wrestler", "wrestlers"),
    "surfing": ("surfing", "surfer", "surfs", "surfers"),
    "kayaking": ("kayaking", "kayaker", "kayak", "kayaks"),
    "skateboarding": ("skateboarding", "skateboarder", "skateboarders", "skateboards", "skateboard"),
    "snowboarding": ("snowboarding", "snowboarder", "snowboarders", "snowboard", "snowboards"),
    "skiing": ("skiing", "skier", "skiers", "skis", "ski"),
}  # fmt: skip
OBJECT_VERBS = {
    "holding": "holding", "carrying": "carrying", "riding": "riding", "throwing": "throwing",
    "kicking": "kicking", "eating": "eating", "drinking": "drinking", "catching": "catching",
    "chasing": "chasing", "reading": "reading", "climbing": "climbing", "chewing": "chewing on",
    "pulling": "pulling", "pushing": "pushing",
}  # fmt: skip
PARTICLES = {
    "sitting": "on", "standing": "on", "leaning": "on", "jumping": "over", "playing": "with",
    "sliding": "down",
}  # fmt: skip
# These are answered by their concept's name although their presence is not asked after.
PLAIN = frozenset(("hat", "helmet", "shirt", "leash", "wave"))
PEOPLE = frozenset(("man", "woman", "boy", "girl", "child", "person", "people", "baby"))
WHOSE = frozenset(("its", "his", "her", "the", "their"))
CALLED = {"bicycle": "bike"}


def answer_for(mention: Mention, lexicon: Lexicon) -> str:
    """What names a mention in an answer: its concept where that is plain speech, else its own word."""
    thing = lexicon.things[mention.thing]
    if thing.name in words("specific") or not (thing.ask or thing.name in PLAIN) or thing.name == "cow":
        return lexicon.singular_of.get(mention.form, mention.form) if mention.many else mention.form
    return CALLED.get(thing.name, thing.name)


def kind_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "What animal is in the picture?", "What vehicle ...?", "What is this?", "What sport is this?" """
    for question, kind in KINDS:
        named = [name for name in picture.support if name != kind and picture.lexicon.is_kind_of(name, kind)]
        if len(named) == 1 and named[0] in NAMED and picture.surely_has(named[0]):
            answer = CALLED.get(named[0], named[0])
            yield Pair(index, question, answer, "object", thing=named[0])
            if "person" not in picture.support and len(picture.support[named[0]]) >= 4:
                yield Pair(index, "What is this?", answer, "object", thing=named[0])
    said: Counter[str] = Counter()
    for caption in picture.captions:
        said.update(name for name, signs in SPORTS.items() if not caption.forms.isdisjoint(signs))
    if len(said) == 1 and not {"toy", "mask"} & picture.forms and "dog" not in picture.support:
        sport, support = said.most_common(1)[0]
        if support >= 2:
            yield Pair(index, "What sport is this?", sport, "object")


def _object_after(caption: Caption, at: int) -> Mention | None:
    """The noun phrase that begins right after token `at` (a determiner and modifiers may stand before it)."""
    for mention in caption.mentions:
        if mention.start > at:
            between = caption.tokens[at + 1 : mention.start]
            unbroken = words("breaks").isdisjoint(between) and verbs().ing.keys().isdisjoint(between)
            return mention if len(between) <= 5 and unbroken else None
    return None


def _objects(picture: PictureText, kind: str) -> dict[str, Counter[str]]:
    """Phrase ("holding", "sitting on") -> what captions say stands after it, where a `kind` does it."""
    lexicon = picture.lexicon
    table: dict[str, Counter[str]] = {}
    for caption in picture.captions:
        doers = [
            m for m in caption.mentions if any(lexicon.is_kind_of(m.thing, k) for k in ("person", "animal"))
        ]
        for verb in caption.verbs:
            phrase, at = OBJECT_VERBS.get(verb.name, ""), verb.at
            particle = PARTICLES.get(verb.name)
            if particle and caption.tokens[at + 1 : at + 2] == (particle,):
                phrase, at = f"{verb.name} {particle}", at + 1
            before = [m for m in doers if m.end <= verb.at]
            if not phrase or not before or not lexicon.is_kind_of(before[-1].thing, kind):
                continue
            mention = _object_after(caption, at)
            if mention and mention.form not in words("not_objects"):
                table.setdefault(phrase, Counter())[answer_for(mention, lexicon)] += 1
    return table


def object_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "What is the man holding?", where every caption that says so says the same."""
    for kind in ("person", "dog"):
        agent = agent_of(picture, kind)
        if agent is None:
            continue
        for phrase, said in _objects(picture, kind).items():
            answer = next(iter(said))
            if len(said) == 1 and answer not in PEOPLE and not (agent.many and phrase == "holding"):
                yield Pair(index, f"What {agent.verb} the {agent.noun} {phrase}?", answer, "object")
    if picture.is_single("dog"):
        yield from _in_the_mouth(index, picture)


def _in_the_mouth(index: int, picture: PictureText) -> Iterator[Pair]:
    said: Counter[str] = Counter()
    for caption in picture.captions:
        for mention in caption.mentions:
            after = caption.tokens[mention.end : mention.end + 3]
            if len(after) == 3 and after[0] == "in" and after[1] in WHOSE and after[2] == "mouth":
                said[answer_for(mention, picture.lexicon)] += 1
    if len(said) == 1 and next(iter(said)) not in words("not_objects"):
        yield Pair(index, "What is in the dog's mouth?", next(iter(said)), "object")


def worn_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "What is the man wearing on his head?" """
    agent = agent_of(picture, "person")
    if agent is None or not picture.single_person or agent.noun not in ("man", "woman", "boy", "girl"):
        return
    hat, helmet = "hat" in picture.support, "helmet" in picture.support
    if hat != helmet:
        whose = "his" if agent.noun in ("man", "boy") else "her"
        question = f"What is the {agent.noun} wearing on {whose} head?"
        yield Pair(index, question, "hat" if hat else "helmet", "object")
