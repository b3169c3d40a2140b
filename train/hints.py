"""What a run tells of the encoder's labels: mostly the picture's own, sometimes none, sometimes others.

A label that is always there and always right would be repeated without a look at the picture; dropped
and swapped ones make the features decide. Naming questions teach the way back: from what the classifier
sees to its word, for kinds of things that the captions do not name. Rare labels are asked after oftener than
common ones, or every animal would be a dog. Foreign labels go further: one label alone, as of a classifier
that is sure, drawn from all that it knows, and one question after its name; nothing else is learnt of that
picture then. So lions have a name, though the captions hold none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlm.conversation import Conversation
from vlm.data.collate import Group, seeded
from vlm.data.kinds import NAMING, kind_questions
from vlm.hints import hint_text
from vlm.processor import Processor, Tokens
from vlm.train.config import TrainConfig
from vlm.train.prepare import FeatureStore, Labels

KINDS = 0.5
"""Share of naming questions that ask after a kind ("What animal is this?"), where the label has one."""


@dataclass(frozen=True)
class Told:
    """The labels that one epoch tells of a group's pictures.

    Attributes:
        name: what a naming question is answered by; "" where none may be asked.
        foreign: whether `name` is of another kind of thing than what the picture shows.
    """

    labels: Labels
    name: str = ""
    foreign: bool = False

    @property
    def texts(self) -> list[str]:
        """A hint for each picture."""
        return hint_texts(self.labels)


def drawn_labels(
    group: Group, view: str, epoch: int, groups: Sequence[Group], store: FeatureStore, config: TrainConfig
) -> Told:
    """What this epoch tells of the group's pictures."""
    hints = config.hints
    chance = seeded(config.seed, epoch, group.key, "hints")
    draw = chance.random()
    labels = store.labels(group, view)
    single = len(labels) == 1
    sure = single and labels[0] and labels[0][0][1] >= hints.sure
    name = labels[0][0][0] if sure else ""
    if draw < hints.drop:
        return Told([[] for _ in labels], name)
    if draw < hints.drop + hints.swap:
        other = store.labels(groups[chance.randrange(len(groups))], "whole")
        return Told([other[i % len(other)] for i in range(len(labels))])
    known = store.features.encoder.labels
    if draw < hints.drop + hints.swap + hints.foreign and single and known:
        name = chance.choice(known)
        return Told([[(name, 1.0)]], name, foreign=True)
    return Told(labels, name)


def hint_texts(labels: Labels) -> list[str]:
    """A hint for each picture, from its labels."""
    return [hint_text([name for name, _ in told]) for told in labels]


def naming(
    group: Group, told: Told, epoch: int, store: FeatureStore, processor: Processor, config: TrainConfig
) -> list[tuple[Tokens, float]]:
    """A question after what a picture shows, where the classifier is sure of it; often none."""
    name = told.name
    if not name:
        return []
    chance = seeded(config.seed, epoch, group.key, "naming")
    if chance.random() >= config.hints.naming * store.rarity(name) and not told.foreign:
        return []
    kinds = kind_questions(name)
    if kinds and chance.random() < KINDS:
        question, answer = chance.choice(kinds)
    else:
        question = chance.choice(NAMING)
        answer = f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
    asked = Conversation.ask(group.images, question)
    return [(processor.tokens(asked, answer, told.texts), config.hints.weight)]
