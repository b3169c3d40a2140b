"""`vlm train answers`: an adapter learns which of a data set's answers are right; it guides its own.

    vlm train answers ADAPTER SRC [--out DIR]      SRC is anything that holds questions about pictures

Which answer was right is regressed on the questions' words and the pictures' frozen features (kernel ridge
regression; `vlm.known_answers`), and small networks learn it beside that (`vlm.answer_net`). First without
the pictures of `dev`: if the adapter answers their questions right no more often with what was learnt than
without, nothing is written.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlm.checkpoint import save_guide
from vlm.data.collate import image_name
from vlm.data.example import Example
from vlm.data.readers import read_source
from vlm.data.remember import TOGETHER
from vlm.errors import DataError
from vlm.eval.metrics.answers import exact_match
from vlm.guide import usable
from vlm.known_answers import LONGEST, KnownAnswers, QuestionKernel, joint, plain, standardised, summary
from vlm.model import VLM
from vlm.options import add_common, apply_common, keep_memory, make_parser
from vlm.train.answer_net import COUNT, Shown, learn_nets
from vlm.train.holdout import EXACT, Held, is_caption
from vlm.train.opened import opened
from vlm.train.place import add_place, place, without_guides
from vlm.train.screen import Screen
from vlm.vision import VIEWS

RIDGE, DIRECTIONS = 0.5, 384
"""Of the regression; directions in which pictures are compared."""
REGRESSED, FEWER = 8000, 192
"""Questions of a regression at most: of more one network alone learns, and knows its pictures again by fewer
directions (those that it did not learn are then alike by 0.946 at most, of 1,000 of Flickr8k)."""
MOST, ANSWERS = 40_000, 1000
"""Questions that are kept, a random part where there are more; answers, those given most."""
TWICE, WIDEST = 2, 100
"""Times that an answer must be given to be known, and its letters at most."""
LEAST, ASKED = 100, 300
"""Of fewer questions nothing is learnt; asked are at most so many to see whether it helps."""

Looks = dict[str, tuple[Tensor, list[str]]]
"""By names of pictures: their (1, 2 * D_v) summaries, and what the feature cache knows them and their mirror
images by."""


@dataclass
class Answered:
    """What is learnt from: questions about one picture each.

    Attributes:
        questions: plain.
        answers: to each, one or those of several people.
        pictures: (M,) int64, which picture each is about.
        summaries: (P, 2 * D_v) of the pictures.
        cells: (view, (B,) pictures) -> their (B, N, D_v) features, the second view being mirrored; all at
            once would not fit into memory.
    """

    questions: list[str]
    answers: list[tuple[str, ...]]
    pictures: Tensor
    summaries: Tensor
    cells: Callable[[int, Tensor], Tensor]


def answered_examples(source: str | Path, split: str) -> list[Example]:
    """The examples of a part that ask one question about one picture.

    Raises:
        DataError: the part cannot be read or holds no such question.
    """
    found = list(filter(_asks, read_source(source, split).checked()))
    if not found:
        raise DataError(f"the {split} part of {source} holds no questions about one picture")
    return found


def _asks(example: Example) -> bool:
    return len(example.images) == len(example.turns) == 1 and not is_caption(example)


def readable(model: VLM, examples: Sequence[Example], seen: Looks, screen: Screen) -> list[Example]:
    """The examples whose picture can be read; `seen` tells what each shows. Others are counted and named."""
    images = {image_name(example.images[0]): example.images[0] for example in examples}
    for found in opened({name: image for name, image in images.items() if name not in seen}, screen):
        pictures = list(found.values())
        shown = summary(model.look(pictures).features)
        model.encode(pictures, VIEWS[1])
        keys = [[model.features.key(picture, view) for view in VIEWS] for picture in pictures]
        seen.update(zip(found, zip(shown.split(1), keys, strict=True), strict=True))
    return [example for example in examples if image_name(example.images[0]) in seen]


def look(model: VLM, examples: Sequence[Example], seen: Looks, screen: Screen) -> Answered:
    """What is asked and shown; questions that are too long are left out and counted.

    Args:
        seen: pictures that need not be looked at again; the others come to it.

    Raises:
        DataError: nothing is left.
    """
    short = [example for example in examples if len(plain(example.turns[0].text)) <= LONGEST]
    if long := len(examples) - len(short):
        screen.say(f"{long} questions of more than {LONGEST} letters are left out")
    some = short if len(short) <= MOST else random.Random(0).sample(short, MOST)
    kept = readable(model, some, seen, screen)
    if not kept:
        raise DataError("no question is left to learn from")
    names = [image_name(example.images[0]) for example in kept]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    keys = [seen[name][1] for name in places]
    screen.say(f"{len(kept)} questions about {len(places)} pictures are learnt")
    return Answered(
        [plain(example.turns[0].text) for example in kept],
        [example.answers for example in kept],
        torch.tensor([places[name] for name in names]),
        torch.cat([seen[name][0] for name in places]),
        lambda view, some: model.features.stored([keys[place][view] for place in some.tolist()]),
    )


def fit(data: Answered) -> KnownAnswers:
    """Kernel ridge regression of the answers, and networks beside it; of many questions one network alone.

    Of an answer that lists several things ("chair, table") each is right too, if it is an answer elsewhere.

    Raises:
        DataError: too few questions have an answer that was given twice, or no words stand in several.
    """
    lines = [[" ".join(answer.split()) for answer in answers] for answers in data.answers]
    given = Counter(answer for answers in lines for answer in answers if 0 < len(answer) <= WIDEST)
    known = [answer for answer, count in given.most_common(ANSWERS) if count >= TWICE]
    places = {answer: place for place, answer in enumerate(known)}
    said = [[[one for one in _listed(answer) if one in places] for answer in row] for row in lines]
    kept = [row for row, answers in enumerate(said) if any(answers)]
    if len(kept) < LEAST:
        raise DataError(
            f"{len(kept)} questions whose answer was given {TWICE} times are too few to learn from: "
            f"{LEAST} are needed"
        )
    right = torch.zeros(len(kept), len(known))
    for number, row in enumerate(kept):
        for listed in said[row]:
            for answer in listed:
                right[number, places[answer]] += 1 / len(said[row]) / len(listed)
    questions, pictures = [data.questions[row] for row in kept], data.pictures[kept]
    numbers, many = _compared(data.summaries), len(kept) > REGRESSED
    whole = standardised(data.summaries, numbers["mean"], numbers["spread"])
    shown = Shown(data.cells, whole, numbers["mean"])
    nets = learn_nets(questions, right, pictures, shown, 1 if many else COUNT)
    if many:
        if nets is None:
            raise DataError(f"no words stand in several of {len(kept)} questions: there is nothing to learn")
        numbers |= {name: numbers[name][:, :FEWER] for name in ("turn", "seen")}
        questions = [question for question, _ in Counter(questions).most_common(REGRESSED)]
    else:
        numbers |= _regressed(questions, pictures, numbers["seen"], right)
    return KnownAnswers.of(questions, known, numbers, nets)


def _listed(answer: str) -> list[str]:
    """An answer, and what it lists; "1,000" is no list."""
    parts = [part.strip() for part in re.split(r",(?!\d)", answer)]
    return list(dict.fromkeys([answer, *filter(None, parts)]))


def _compared(summaries: Tensor) -> dict[str, Tensor]:
    """What `KnownAnswers` compares pictures by, from their (P, 2 * D_v) summaries."""
    mean, spread = summaries.mean(dim=0), usable(summaries.std(dim=0, correction=0))
    unit = standardised(summaries, mean, spread)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        turn = torch.svd_lowrank(unit, min(DIRECTIONS, *unit.shape))[2]
    return {"mean": mean, "spread": spread, "turn": turn, "seen": unit @ turn}


def _regressed(questions: Sequence[str], pictures: Tensor, seen: Tensor, right: Tensor) -> dict[str, Tensor]:
    """The regression's numbers of `KnownAnswers`, from (P, Q) pictures and (M, A) shares of right answers."""
    kernel = QuestionKernel(questions)
    alike = torch.cat([kernel(questions[at : at + TOGETHER]) for at in range(0, len(questions), TOGETHER)])
    both = joint(alike, (seen @ seen.T)[pictures][:, pictures])
    both.diagonal().add_(RIDGE)
    weigh = torch.cholesky_solve(right, torch.linalg.cholesky(both))
    return {"pictures": pictures, "weigh": weigh}


@dataclass(frozen=True)
class Learnt:
    """Known answers, and how many of the questions asked were right before and with them."""

    known: KnownAnswers
    asked: int
    before: int
    after: int


def learn(model: VLM, source: str | Path, split: str, screen: Screen, untold: Collection[str] = ()) -> Learnt:
    """Fits, after the questions about `dev`'s pictures have shown that it is worth it.

    Args:
        untold: questions that are not learnt, in any spelling that is the same when `plain`.

    Raises:
        DataError: too few questions, or no more are answered right.
    """
    taught, held = (answered_examples(source, part) for part in ("train-rest", "dev"))
    taught = _without(taught, untold, screen)
    seen: Looks = {}
    held = readable(model, random.Random(0).sample(held, min(ASKED, len(held))), seen, screen)
    known = fit(look(model, taught, seen, screen))
    screen.say(f"{len(known.answers)} answers are known; {len(held)} questions of dev are asked twice")
    before = _count_right(model, held)
    model.known_answers = known
    after = _count_right(model, held)
    if after <= before:
        raise DataError(
            f"of {len(held)} questions about pictures set aside {after} are answered right with what was "
            f"learnt, {before} before: nothing is written"
        )
    if split != "train-rest":
        whole = _without(answered_examples(source, split), untold, screen)
        known = fit(look(model, whole, seen, screen))
    return Learnt(known, len(held), before, after)


def _without(examples: Sequence[Example], untold: Collection[str], screen: Screen) -> list[Example]:
    """The examples but for those that ask one of these questions, which are counted."""
    left_out = Counter({plain(question): 0 for question in untold})
    kept = []
    for example in examples:
        if (asked := plain(example.turns[0].text)) in left_out:
            left_out[asked] += 1
        else:
            kept.append(example)
    for question, count in left_out.items():
        screen.say(f"{question!r} is not learnt, which is asked {count} times")
    return kept


def _count_right(model: VLM, examples: Sequence[Example]) -> int:
    """How many questions are answered with one of the answers given."""
    asked = model.ask_batch(examples, max_new_tokens=16)
    return int(sum(exact_match(a.text, e.answers) for a, e in zip(asked, examples, strict=True)))


def add_answers(
    model: VLM,
    folder: Path,
    examples: Sequence[Example],
    judge: Held,
    without: dict[str, Any],
    screen: Screen,
) -> dict[str, Any]:
    """Learns the answers of a run's examples for its adapter, and writes them if that helps.

    Args:
        model: the adapter in `folder`.
        judge: asks about pictures that were set aside; `without` is what it found.

    Returns:
        What the judge finds of the adapter in the end.
    """
    asked = list(filter(_asks, examples))
    if not asked:
        return without
    try:
        model.known_answers = fit(look(model, asked, {}, screen))
    except DataError as problem:
        screen.say(f"known answers are not learnt: {problem}")
        return without
    found = judge.ask(model)
    before, after = without["scores"].get(EXACT, 0.0), found["scores"].get(EXACT, 0.0)
    screen.say(
        f"{len(model.known_answers.answers)} known answers: of the questions set aside {after:.1f} % are "
        f"right with them, {before:.1f} % without; they are {'kept' if after > before else 'left out'}"
    )
    if after <= before:
        return without
    save_guide(folder, model.known_answers)
    return found


def main(argv: list[str]) -> int:
    """Entry of `vlm train answers`."""
    parser = make_parser("vlm train answers", "Learn which answers are right; it guides an adapter's.")
    add_place(parser)
    parser.add_argument("source", metavar="SRC", help="questions about pictures: a folder, table, public set")
    parser.add_argument(
        "--split",
        default="train",
        choices=("train", "train-rest"),
        help="what is learnt in the end: all of train (default), or what dev leaves of it, so that dev still "
        "tells how good the adapter is",
    )
    parser.add_argument(
        "--except",
        dest="untold",
        action="append",
        default=[],
        metavar="QUESTION",
        help="a question that is not learnt, any number of times: one that the encoder's own labels answer "
        "of pictures unlike these, such as: what is this",
    )
    add_common(parser)
    args = parser.parse_args(argv)
    apply_common(args)
    keep_memory()
    folder, out = place(args)
    model = without_guides(folder, args)
    with Screen() as screen:
        learnt = learn(model, args.source, args.split, screen, args.untold)
    save_guide(folder, learnt.known, out)
    print(
        f"of {learnt.asked} questions about pictures set aside {learnt.after} are answered right, "
        f"{learnt.before} before; {out or folder} knows {len(learnt.known.answers)} answers now"
    )
    if model.abstain is not None:
        print("its threshold for --abstain is gone, being of other answers: `vlm eval calibrate` fits one")
    return 0
