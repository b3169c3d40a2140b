"""Questions whose answers are a word or two: counts, colours, places, actions, who.

Each is asked only where the captions agree; what two captions contradict is left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from vlm.data.agents import agent_of, agents_of, first_kind, main_action
from vlm.data.grammar import verbs, words
from vlm.data.objectq import kind_questions, object_questions, worn_questions
from vlm.data.picture import PictureText
from vlm.data.yesno import NUMBER_WORDS, Pair, unit

COUNTED = {
    "dog": "dogs", "person": "people", "child": "children", "man": "men", "woman": "women", "boy": "boys",
    "girl": "girls", "bird": "birds", "horse": "horses", "bicycle": "bikes", "boat": "boats",
}  # fmt: skip
PLURAL_CLOTHES = frozenset(("shorts", "pants", "clothes"))
BY_THE_CAPTIONS_WORD = frozenset(("suit", "bag", "toy"))
CERTAIN_PEOPLE = frozenset(("man", "woman", "boy", "girl", "baby"))


def count_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "How many dogs are there?" """
    for thing, noun in COUNTED.items():
        number = picture.count(thing)
        if number is not None and 1 <= number <= 6:
            where = " in the picture" if unit(picture.example.id, noun) < 0.5 else ""
            yield Pair(
                index, f"How many {noun} are there{where}?", NUMBER_WORDS[number], "count", thing=thing
            )


def _asks_colour(picture: PictureText, thing: str, worn: bool) -> bool:
    """Whether "the shirt" or "the ball" can mean only one thing in the picture."""
    if thing not in picture.support:
        return False
    if worn and not picture.single_person:
        return False
    if thing == "collar" and not picture.is_single("dog"):
        return False
    return thing in PLURAL_CLOTHES or picture.is_single(thing)


def colour_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "What colour is the shirt?" (spelled "color" half of the time)."""
    for thing in (*sorted(words("worn")), *sorted(words("coloured"))):
        worn = thing in words("worn")
        colour = picture.colour(thing) if _asks_colour(picture, thing, worn) else None
        if colour is None or (worn and (" and " in colour or picture.dressed_in - {colour})):
            continue
        name = {"bicycle": "bike"}.get(thing, thing)
        if thing in BY_THE_CAPTIONS_WORD:
            forms = Counter(m.form for ms in picture.mentions(thing) for m in ms if m.colours)
            if thing == "suit" and len(forms) != 1:
                continue
            name = max(forms, key=lambda form: (forms[form], form))
        spelling = "colour" if unit(picture.example.id, thing) < 0.5 else "color"
        verb = "are" if name in PLURAL_CLOTHES else "is"
        yield Pair(index, f"What {spelling} {verb} the {name}?", colour, "colour", thing=thing)


def place_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "Where is the dog?": a place that at least two captions name, more than name any other."""
    said: Counter[str] = Counter()
    first: dict[str, Counter[str]] = {}
    for caption in picture.captions:
        kind = first_kind(caption, picture.lexicon)
        for place in {
            thing
            for mention in caption.mentions
            for thing in mention.things
            if thing in words("places") and mention.preposition in words("place_prepositions")
        }:
            said[place] += 1
            first.setdefault(place, Counter())[kind] += 1
    ranked = said.most_common(2)
    if not ranked or ranked[0][1] < 2 or (len(ranked) > 1 and ranked[1][1] == ranked[0][1]):
        return
    place = ranked[0][0]
    kind = max(sorted(first[place]), key=lambda name: first[place][name])
    agent = agent_of(picture, kind) if kind in ("person", "dog") else None
    if agent:
        yield Pair(index, f"Where {agent.verb} the {agent.noun}?", place, "place")
    elif place not in words("small_places"):
        yield Pair(index, "Where was the picture taken?", place, "place")


def action_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "What is the dog doing?": the action that at least two captions begin with, more than any other."""
    for kind in ("person", "dog"):
        agent = agent_of(picture, kind)
        action = main_action(picture, kind) if agent else None
        if agent and action and action not in verbs().never:
            yield Pair(index, f"What {agent.verb} the {agent.noun} doing?", action, "action")


def who_questions(index: int, picture: PictureText) -> Iterator[Pair]:
    """ "Who is in the picture?" where one person is, and who does the action where one does."""
    agents = agents_of(picture)
    if len(agents) != 1 or agents[0].many:
        return
    agent = agents[0]
    if agent.noun in CERTAIN_PEOPLE and picture.single_person:
        yield Pair(index, "Who is in the picture?", agent.noun, "who")
    action = main_action(picture, agent.kind)
    other = "animal" if agent.kind == "person" else "person"
    certain = agent.noun in CERTAIN_PEOPLE or agent.noun == "dog"
    if action and action not in verbs().never and certain and other not in picture.support:
        yield Pair(index, f"Who is {action}?", agent.noun, "who")


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


def open_questions(pictures: Sequence[PictureText]) -> list[Pair]:
    """Every open question that the captions support, picture by picture."""
    return [
        pair for index, picture in enumerate(pictures) for maker in MAKERS for pair in maker(index, picture)
    ]
