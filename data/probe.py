"""Is there an X in the picture? The three settings of POPE (Li et al. 2023), from captions.

Every picture is asked about things that are surely there and, in each setting, about as many that surely are
not: drawn at random, the most popular ones of the set, or those that most often stand together with what the
picture shows. What is sure is what `vlm.data.lexicon` says: two captions name it, or none has a word for it,
its synonyms, hypernyms and hyponyms, or a word that makes its unseen presence likely.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType

from vlm.conversation import ImageSlot, Turn
from vlm.data.example import Example
from vlm.data.lexicon import Lexicon, load
from vlm.data.picture import PictureText
from vlm.data.yesno import TEMPLATES, absence_index, unit, with_article

SETTINGS = ("random", "popular", "adversarial")
PICTURES = 500
THINGS = 3  # of each picture, and as many absent ones


def presence_probe(examples: Sequence[Example], *, seed: int = 0) -> list[Example]:
    """Questions with the answers yes and no, equally many for every picture and setting.

    Args:
        examples: captioning examples, one per picture; `answers` holds its captions.
        seed: chooses among pictures, and among the things that are asked after.

    Returns:
        For up to 500 pictures, those with most things first (at least two), and for each setting in turn up
        to three present and as many absent things; `meta["setting"]` names the setting, `meta["thing"]` the
        thing. Present things are the same in all settings.
    """
    lexicon = load()
    pictures = sorted((PictureText.read(e, lexicon) for e in examples), key=lambda p: p.example.id)
    asked = [name for name, thing in lexicon.things.items() if thing.ask]
    present = [_present(picture, asked, lexicon) for picture in pictures]
    absent = _absent(pictures, asked, lexicon)
    popular = Counter(name for names in present for name in names)
    together = Counter((a, b) for names in present for a in names for b in names)
    ids = [picture.example.id for picture in pictures]
    order = [n for n, names in enumerate(present) if len(names) > 1 and len(absent[n]) >= THINGS]
    order.sort(key=lambda n: (-min(len(present[n]), THINGS), unit(seed, "probe", ids[n])))
    found = []
    for n in sorted(order[:PICTURES]):
        there = sorted(present[n], key=lambda name: unit(seed, "present", ids[n], name))[:THINGS]
        ranked = {
            "random": sorted(absent[n], key=lambda name: unit(seed, "absent", ids[n], name)),
            "popular": sorted(absent[n], key=lambda name: (-popular[name], name)),
            "adversarial": sorted(
                absent[n],
                key=lambda name: (-sum(together[name, other] for other in present[n]), -popular[name], name),
            ),
        }
        for setting in SETTINGS:
            told = [(name, "yes") for name in there]
            told += [(name, "no") for name in ranked[setting][: len(there)]]
            found += [_question(pictures[n].example, setting, *pair, lexicon) for pair in told]
    return found


def _present(picture: PictureText, asked: Sequence[str], lexicon: Lexicon) -> list[str]:
    """What is surely there, by its narrowest name: a man is not asked after as a person too."""
    sure = [name for name in asked if picture.surely_has(name)]
    return [name for name in sure if not lexicon.descendants[name] & set(sure)]


def _absent(pictures: Sequence[PictureText], asked: Sequence[str], lexicon: Lexicon) -> list[list[str]]:
    lacking = absence_index(pictures, lexicon)
    found: list[list[str]] = [[] for _ in pictures]
    for name in asked:
        for number in lacking(name):
            found[number].append(name)
    return found


def _question(source: Example, setting: str, thing: str, answer: str, lexicon: Lexicon) -> Example:
    id = f"{source.id}#{setting}/{thing}"
    meta = {"task": "vqa", "question_type": "presence", "setting": setting, "thing": thing, "key": id}
    slots = tuple(ImageSlot(number) for number in range(len(source.images)))
    asked = TEMPLATES[0].format(with_article(thing, lexicon))
    turns = (Turn("user", (*slots, asked)),)
    return replace(source, turns=turns, answers=(answer,), id=id, meta=MappingProxyType(meta))
