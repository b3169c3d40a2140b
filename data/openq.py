"""Questions whose answers are a word or two: objects, counts, colours, places, actions, who.

Each is asked only where the captions agree; what two captions contradict is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from vlm.data.captions import Caption, Mention
from vlm.data.grammar import verbs, words
from vlm.data.lexicon import Lexicon
from vlm.data.picture import PictureText
from vlm.data.yesno import NUMBER_WORDS, Pair, unit

ANIMALS = (
    "dog",
    "cat",
    "horse",
    "cow",
    "sheep",
    "bird",
    "fish",
    "rabbit",
    "monkey",
    "goat",
    "elephant",
    "camel",
)
VEHICLES = ("car", "truck", "bus", "train", "airplane", "boat", "bicycle", "motorcycle", "scooter", "atv")
COUNTED = {
    "dog": "dogs", "person": "people", "child": "children", "man": "men", "woman": "women", "boy": "boys",
    "girl": "girls", "bird": "birds", "horse": "horses", "bicycle": "bikes", "boat": "boats",
}  # fmt: skip
WORN = ("shirt", "jacket", "hat", "helmet", "shorts", "dress", "pants", "skirt", "swimsuit", "scarf", "suit")
COLOURED = (
    "dog", "horse", "cat", "bird", "ball", "car", "truck", "bus", "boat", "bicycle", "motorcycle", "frisbee", "couch",
    "slide", "umbrella", "kite", "balloon", "surfboard", "skateboard", "sled", "tent", "toy", "flag", "collar",
    "building", "flower", "train", "airplane", "bag",
)  # fmt: skip
PLACES = {
    "beach": "beach", "street": "street", "forest": "forest", "pool": "pool", "snow": "snow", "field": "field",
    "grass": "grass", "park": "park", "lake": "lake", "river": "river", "ocean": "ocean", "mountain": "mountain",
    "road": "road", "playground": "playground", "yard": "yard", "stage": "stage", "kitchen": "kitchen",
    "sand": "sand", "water": "water", "track": "track", "desert": "desert", "couch": "couch", "bed": "bed",
    "bench": "bench", "ice": "ice", "cliff": "cliff", "bridge": "bridge", "path": "path",
}  # fmt: skip
SPORT_NAMES = (
    "soccer", "football", "basketball", "baseball", "tennis", "volleyball", "hockey", "rugby", "lacrosse", "golf",
    "surfing", "skateboarding", "snowboarding", "skiing", "wrestling", "kayaking",
)  # fmt: skip
SPORT_WORDS = {
    "surfing": ("surfing", "surfer", "surfs", "surfers"), "kayaking": ("kayaking", "kayaker", "kayak", "kayaks"),
    "skateboarding": ("skateboarding", "skateboarder", "skateboarders", "skateboards", "skateboard"),
    "snowboarding": ("snowboarding", "snowboarder", "snowboarders", "snowboard", "snowboards"),
    "skiing": ("skiing", "skier", "skiers", "skis", "ski"), "wrestling": ("wrestling", "wrestler", "wrestlers"),
    "tennis": ("tennis",), "golf": ("golf", "golfer"),
}  # fmt: skip
OBJECT_VERBS = {
    "holding": "holding", "carrying": "carrying", "riding": "riding", "throwing": "throwing", "kicking": "kicking",
    "eating": "eating", "drinking": "drinking", "catching": "catching", "chasing": "chasing", "reading": "reading",
    "climbing": "climbing", "chewing": "chewing on", "pulling": "pulling", "pushing": "pushing",
}  # fmt: skip
PARTICLES = {
    "sitting": ("on", "sitting on"), "standing": ("on", "standing on"), "jumping": ("over", "jumping over"),
    "playing": ("with", "playing with"), "sliding": ("down", "sliding down"), "leaning": ("on", "leaning on"),
}  # fmt: skip


def singular(mention: Mention, lexicon: Lexicon) -> str:
    """The noun of a mention in the singular: "two backpacks" -> "backpack"."""
    return lexicon.singular_of.get(mention.form, mention.form) if mention.many else mention.form


def answer_for(mention: Mention, lexicon: Lexicon) -> str:
    """What a question about this mention is answered with: its concept where that is plain speech."""
    thing = lexicon.things[mention.thing]
    if (
        thing.name in words("specific")
        or not thing.ask
        and thing.name not in ("hat", "helmet", "shirt", "leash", "wave")
    ):
        return singular(mention, lexicon)
    return {"bicycle": "bike", "cow": mention.form}.get(thing.name, thing.name)


def agents(picture: PictureText) -> Iterator[tuple[str, str, bool]]:
    """(kind, noun, many) of the people and the dogs of a picture."""
    for kind in ("person", "dog"):
        agent = picture.agent(kind)
        if agent is not None:
            yield kind, agent.noun, agent.many


def count_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "How many dogs are there?" """
    for thing, noun in COUNTED.items():
        number = picture.count(thing)
        if number is not None and 1 <= number <= 6:
            where = " in the picture" if unit(picture.example.id, noun) < 0.5 else ""
            yield Pair(
                index, f"How many {noun} are there{where}?", NUMBER_WORDS[number], "count", thing=thing
            )


def colour_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "What colour is the shirt?" (also spelled "color", half of the time)."""
    for thing in (*WORN, *COLOURED):
        if thing not in picture.support:
            continue
        worn = thing in WORN
        if (worn and not picture.single_person) or (
            thing not in ("shorts", "pants") and not picture.is_single(thing)
        ):
            continue
        colour = picture.colour(thing)
        if colour is None or (worn and " and " in colour):
            continue
        spelling = "colour" if unit(picture.example.id, thing) < 0.5 else "color"
        verb = "are" if thing in ("shorts", "pants") else "is"
        name = {"bicycle": "bike"}.get(thing, thing)
        if thing in ("suit", "bag", "toy", "collar"):
            forms = Counter(m.form for ms in picture.mentions(thing) for m in ms if m.colours)
            if thing == "suit" and len(forms) != 1:
                continue
            name = max(forms, key=lambda form: (forms[form], form))
            verb = "are" if name == "clothes" else "is"
        yield Pair(index, f"What {spelling} {verb} the {name}?", colour, "colour", thing=thing)


def place_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "Where is the dog?": a place that at least two captions name and none names another as often."""
    said: Counter[str] = Counter()
    for caption in picture.captions:
        names = {
            PLACES[thing]
            for mention in caption.mentions
            for thing in mention.things
            if thing in PLACES
            and mention.preposition in ("in", "on", "at", "through", "across", "along", "onto", "into")
        }
        said.update(names)
    ranked = said.most_common(2)
    if not ranked or ranked[0][1] < 2 or (len(ranked) > 1 and ranked[1][1] >= ranked[0][1]):
        return
    found = list(agents(picture))
    if found:
        _, noun, many = found[0] if len(found) == 1 else found[int(unit(picture.example.id, "who") * 2)]
        yield Pair(index, f"Where {'are' if many else 'is'} the {noun}?", ranked[0][0], "place")
    else:
        yield Pair(index, "Where was the picture taken?", ranked[0][0], "place")


def action_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "What is the dog doing?": the action that at least two captions begin with, more than any other."""
    never = verbs().never
    for kind, noun, many in agents(picture):
        ranked = Counter(picture.actions(kind)).most_common(2)
        if not ranked or ranked[0][1] < 2 or ranked[0][0] in never:
            continue
        if len(ranked) > 1 and ranked[1][1] >= ranked[0][1]:
            continue
        yield Pair(index, f"What {'are' if many else 'is'} the {noun} doing?", ranked[0][0], "action")


def who_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "Who is in the picture?" where one person is, and who does the action where one does."""
    found = list(agents(picture))
    if len(found) != 1:
        return
    kind, noun, many = found[0]
    if (
        kind == "person"
        and not many
        and picture.single_person
        and noun in ("man", "woman", "boy", "girl", "baby")
    ):
        yield Pair(index, "Who is in the picture?", noun, "who")
    said = Counter(picture.actions(kind)).most_common(1)
    certain = noun not in ("person", "people", "child")
    if said and said[0][1] >= 2 and said[0][0] not in verbs().never and certain and not many:
        others = {"person", "animal"} - {"person" if kind == "person" else "animal"}
        if not others & picture.support.keys():
            yield Pair(index, f"Who is {said[0][0]}?", noun, "who")


def kind_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "What animal is in the picture?", "What vehicle ...?", "What sport is this?" """
    for question, names, kind in (
        ("What animal is in the picture?", ANIMALS, "animal"),
        ("What vehicle is in the picture?", VEHICLES, "vehicle"),
    ):
        named = [name for name in picture.support if name != kind and picture.lexicon.is_kind_of(name, kind)]
        if len(named) == 1 and named[0] in names and picture.surely_has(named[0]):
            yield Pair(index, question, {"bicycle": "bike"}.get(named[0], named[0]), "object", thing=named[0])
    said: Counter[str] = Counter()
    for caption in picture.captions:
        said.update(
            {name for name in SPORT_NAMES if set(SPORT_WORDS.get(name, (name,))) & set(caption.tokens)}
        )
    if len(said) == 1:
        sport, support = said.most_common(1)[0]
        if support >= 2 and not {"toy", "ball dog"} & picture.forms and "dog" not in picture.support:
            yield Pair(index, "What sport is this?", sport, "object")


def _object_after(caption: Caption, at: int, limit: int) -> Mention | None:
    """The noun phrase that begins right after token `at` (a determiner and modifiers may stand before it)."""
    for mention in caption.mentions:
        if mention.start <= at:
            continue
        between = caption.tokens[at + 1 : mention.start]
        if len(between) > limit or any(t in (",.") or t in words("breaks") for t in between):
            return None
        return mention
    return None


def _objects(picture: PictureText, kind: str) -> dict[str, Counter[str]]:
    """Phrase ("holding", "sitting on") -> what captions say stands after it."""
    table: dict[str, Counter[str]] = {}
    for caption in picture.captions:
        firsts = [
            m
            for m in caption.mentions
            if any(picture.lexicon.is_kind_of(t, k) for t in m.things for k in ("person", "animal"))
        ]
        for verb in caption.verbs:
            phrase, at = OBJECT_VERBS.get(verb.name, ""), verb.at
            if verb.name in PARTICLES and caption.tokens[at + 1 : at + 2] == (PARTICLES[verb.name][0],):
                phrase, at = PARTICLES[verb.name][1], at + 1
            before = [m for m in firsts if m.end <= verb.at]
            if not phrase or not before or not picture.lexicon.is_kind_of(before[-1].thing, kind):
                continue
            mention = _object_after(caption, at, 5)
            if mention is None or mention.form in words("not_objects") or mention.thing == "person":
                continue
            table.setdefault(phrase, Counter())[answer_for(mention, picture.lexicon)] += 1
    return table


def object_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "What is the man holding?", where every caption that says so says the same."""
    for kind, noun, many in agents(picture):
        for phrase, said in _objects(picture, kind).items():
            if len(said) != 1 or (many and phrase == "holding"):
                continue
            answer = next(iter(said))
            if (
                answer in ("man", "woman", "boy", "girl", "child", "person", "people", "baby")
                or answer == noun
            ):
                continue
            yield Pair(index, f"What {'are' if many else 'is'} the {noun} {phrase}?", answer, "object")
    if picture.is_single("dog"):
        yield from _in_the_mouth(index, picture)


def _in_the_mouth(index: int, picture: PictureText) -> Iterator[Pair]:
    said: Counter[str] = Counter()
    for caption in picture.captions:
        for mention in caption.mentions:
            after = caption.tokens[mention.end : mention.end + 3]
            if (
                len(after) == 3
                and after[0] == "in"
                and after[1] in ("its", "his", "her", "the", "their")
                and after[2] == "mouth"
            ):
                said[answer_for(mention, picture.lexicon)] += 1
    if len(said) == 1 and next(iter(said)) not in words("not_objects"):
        yield Pair(index, "What is in the dog's mouth?", next(iter(said)), "object")


def worn_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "What is the man wearing on his head?" """
    agent = picture.agent("person")
    if (
        agent is None
        or agent.many
        or not picture.single_person
        or agent.noun not in ("man", "woman", "boy", "girl")
    ):
        return
    hat, helmet = picture.support.get("hat", ()), picture.support.get("helmet", ())
    if bool(hat) != bool(helmet):
        whose = "his" if agent.noun in ("man", "boy") else "her"
        question = f"What is the {agent.noun} wearing on {whose} head?"
        yield Pair(index, question, "hat" if hat else "helmet", "object")


MAKERS: tuple[Callable[[int, PictureText], Iterator[Pair]], ...] = (
    count_questions,
    colour_questions,
    place_questions,
    action_questions,
    who_questions,
    kind_questions,
    object_questions,
    worn_questions,
)


def open_questions(pictures: list[PictureText]) -> list[Pair]:
    """Every open question that the captions support, picture by picture."""
    return [
        pair for index, picture in enumerate(pictures) for maker in MAKERS for pair in maker(index, picture)
    ]
