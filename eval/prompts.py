"""Prompts beyond the plain question: choices written out, and solved examples before the question."""

from __future__ import annotations

import random
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlm.conversation import Conversation
from vlm.data.example import Example
from vlm.errors import ConfigError
from vlm.eval.scorers import options
from vlm.eval.task import question

if TYPE_CHECKING:
    from vlm.eval.session import Session

SEED = 13
LETTER_LINE = "Answer with the letter of the right choice."


def with_options(example: Example) -> Conversation:
    """The question with its choices below it, lettered, to be answered by a letter."""
    rows = [
        f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, options(example), strict=False)
    ]
    return Conversation.ask(example.images, "\n".join([question(example), *rows, LETTER_LINE]))


def with_shots(
    session: Session,
    conversations: Sequence[Conversation],
    train: Sequence[Example],
    lettered: bool = False,
) -> list[Conversation]:
    """Every conversation after K solved training examples, pictures between the words.

    The choice is a function of the example's id, so limits, batches and processes do not change it. With
    random labels the answers come from other training examples: what is left is the form, not the task.

    Args:
        lettered: the questions are those of `with_options`: the shots show their choices and are answered by
            a letter too, with random labels that of any of their choices.

    Raises:
        ConfigError: fewer training examples than shots, or several turns to be asked.
    """
    k = session.args.shots
    if len(train) < k:
        raise ConfigError(f"--shots {k} wants {k} training examples, there are {len(train)}")
    picks = _nearest(session, train, k) if session.args.shot_choice == "nearest" else None
    built = []
    for number, (example, last) in enumerate(zip(session.examples, conversations, strict=True)):
        chance = random.Random(f"{SEED} {example.id}")
        shots = [train[n] for n in picks[number]] if picks else chance.sample(list(train), k)
        mixed = session.args.shot_labels == "random"
        if lettered:
            asked = [with_options(shot).turns[-1].text for shot in shots]
            answers = [_letter(shot, chance if mixed else None) for shot in shots]
        else:
            asked = [question(shot) for shot in shots]
            answers = [label.answers[0] for label in (chance.sample(list(train), k) if mixed else shots)]
        built.append(_interleaved(shots, asked, answers, last))
    return built


def _letter(shot: Example, chance: random.Random | None) -> str:
    """The letter of the right choice, or of any where chance decides."""
    listed = options(shot)
    return string.ascii_uppercase[chance.randrange(len(listed)) if chance else listed.index(shot.answers[0])]


def _interleaved(
    shots: Sequence[Example], questions: Sequence[str], answers: Sequence[str], last: Conversation
) -> Conversation:
    whole: Conversation | None = None
    for shot, asked, answer in zip(shots, questions, answers, strict=True):
        whole = whole.then(asked, shot.images) if whole else Conversation.ask(shot.images, asked)
        whole = whole.answered(answer)
    assert whole is not None
    return whole.then(last.turns[-1].text, last.images)


def _nearest(session: Session, train: Sequence[Example], k: int) -> list[list[int]]:
    """For every example the places of the K training examples whose pictures' mean features are nearest.

    The nearest stands last, right before the question. An example's own picture is never its shot.
    """
    import torch

    def means(examples: Sequence[Example]) -> tuple[torch.Tensor, list[str]]:
        from vlm.images import open_picture

        rows: dict[str, torch.Tensor] = {}
        names = []
        for example in examples:
            picture = open_picture(example.images[0])
            if picture.sha256 not in rows:
                rows[picture.sha256] = session.model.encode([picture])[0].mean(dim=0)
            names.append(picture.sha256)
        return torch.nn.functional.normalize(torch.stack([rows[name] for name in names]), dim=1), names

    (theirs, their_names), (ours, our_names) = means(train), means(session.examples)
    found = []
    for row, name in zip(ours, our_names, strict=True):
        order = torch.argsort(theirs @ row, descending=True, stable=True).tolist()
        found.append([n for n in order if their_names[n] != name][:k][::-1])
    return found
