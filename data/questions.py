"""Captions -> questions with short answers, in the spirit of COCO-QA (Ren et al. 2015) and VQ2A (Changpinyo
et al. 2022).

What it promises, and tests hold it to: yes and no are equally many for every question string; the object of
a presence question that is answered "no", its synonyms, hypernyms and hyponyms stand in none of the picture's
captions; the same captions and seed give the same questions, on any machine and in any order of the pictures.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from types import MappingProxyType

from vlm.conversation import ImageSlot, Turn
from vlm.data.example import Example
from vlm.data.lexicon import load
from vlm.data.openq import open_questions
from vlm.data.picture import PictureText
from vlm.data.yesno import Pair, unit, yes_no

QUESTION_TYPES = ("yes/no", "object", "count", "colour", "place", "action", "who")
LIMITS = {"object": 2, "count": 2, "colour": 2, "place": 1, "action": 1, "who": 1}
TOP_SHARE = 0.5


def _thin(pairs: list[Pair], ids: Sequence[str], seed: int) -> list[Pair]:
    """Without the surplus of a question's commonest answer: at most half of the answers stay, or three.

    Otherwise "What animal is in the picture?" is answered by "dog" without looking. `_limit`, which comes
    after this, may leave the commonest answer with more than half again.
    """
    by_question: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_question[pair.question.replace("colour", "color").replace(" in the picture", "")].append(pair)
    dropped: set[Pair] = set()
    for question, group in by_question.items():
        answer, top = Counter(pair.answer for pair in group).most_common(1)[0]
        allowed = max(int((len(group) - top) * TOP_SHARE / (1 - TOP_SHARE)), 3)
        commonest = [pair for pair in group if pair.answer == answer]
        commonest.sort(key=lambda pair: unit(seed, "thin", question, ids[pair.picture]))
        dropped.update(commonest[allowed:])
    return [pair for pair in pairs if pair not in dropped]


def _limit(pairs: list[Pair], ids: Sequence[str], seed: int) -> list[Pair]:
    """At most `LIMITS` questions of a type a picture, chosen by hash."""
    taken: Counter[tuple[int, str]] = Counter()
    kept = set()
    for pair in sorted(pairs, key=lambda pair: unit(seed, "limit", ids[pair.picture], pair.question)):
        if taken[pair.picture, pair.question_type] < LIMITS[pair.question_type]:
            taken[pair.picture, pair.question_type] += 1
            kept.add(pair)
    return [pair for pair in pairs if pair in kept]


def _example(pair: Pair, source: Example) -> Example:
    meta: dict[str, str | int] = {"task": "vqa", "question_type": pair.question_type, "source": source.id}
    if pair.probe:
        meta["probe"] = pair.probe
    if pair.thing:
        meta["thing"] = pair.thing
    if pair.hard:
        meta["hard"] = 1
    return Example(
        images=source.images,
        turns=(Turn("user", (*(ImageSlot(i) for i in range(len(source.images))), pair.question)),),
        answers=(pair.answer,),
        id=f"{source.id}#{pair.question}",
        meta=MappingProxyType(meta),
    )


def questions_from_captions(examples: Sequence[Example], *, seed: int = 0) -> list[Example]:
    """Questions and answers about pictures with captions.

    Args:
        examples: captioning examples, one per picture; `answers` holds its captions (five work best: a
            question needs two that agree).
        seed: chooses among the possible questions.

    Returns:
        One example per question, grouped by picture in the order given; `answers` holds one lower-case
        answer; `meta["question_type"]` is one of `QUESTION_TYPES`; yes/no ones carry `meta["probe"]`
        (presence, colour, count, action, scene), presence ones `meta["thing"]`.
    """
    lexicon = load()
    order = sorted(range(len(examples)), key=lambda index: examples[index].id)
    pictures = [PictureText.read(examples[index], lexicon) for index in order]
    ids = [picture.example.id for picture in pictures]
    pairs = _limit(_thin(open_questions(pictures), ids, seed), ids, seed)
    pairs += yes_no(pictures, lexicon, seed)
    by_picture: dict[int, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_picture[order[pair.picture]].append(pair)
    return [
        _example(pair, examples[index])
        for index in range(len(examples))
        for pair in sorted(by_picture[index], key=lambda pair: (pair.question_type, pair.question))
    ]


def digest(examples: Iterable[Example]) -> str:
    """SHA-256 over the ids, questions and answers, in order: two equal ones are the same questions."""
    total = hashlib.sha256()
    for example in examples:
        total.update("\0".join((example.id, example.turns[0].text, *example.answers)).encode() + b"\n")
    return total.hexdigest()
