"""What a run tells of the encoder's labels: mostly the picture's own, sometimes none, sometimes another's.

A label that is always there and always right would be repeated without a look at the picture; dropped
and swapped ones make the features decide. Naming questions teach the way back: from what the classifier
sees to its word, for kinds of things that the captions do not name. Rare labels are asked after oftener than
common ones, or every animal would be a dog.
"""

from __future__ import annotations

from collections.abc import Sequence

from vlm.conversation import Conversation
from vlm.data.collate import Group, seeded
from vlm.data.kinds import kind_questions
from vlm.hints import hint_text
from vlm.processor import Processor, Tokens
from vlm.train.config import TrainConfig
from vlm.train.prepare import FeatureStore, Labels

NAMING = (
    "What is this?",
    "What is that?",
    "What is this called?",
    "What is shown here?",
    "What is in the picture?",
)
KINDS = 0.5
"""Share of naming questions that ask after a kind ("What animal is this?"), where the label has one."""


def drawn_hints(
    group: Group, view: str, epoch: int, groups: Sequence[Group], store: FeatureStore, config: TrainConfig
) -> list[str]:
    """A hint for each picture of the group, as this epoch tells it."""
    chance = seeded(config.seed, epoch, group.key, "hints")
    draw = chance.random()
    labels = store.labels(group, view)
    if draw < config.hints.drop:
        return [""] * len(labels)
    if draw < config.hints.drop + config.hints.swap:
        other = store.labels(groups[chance.randrange(len(groups))], "whole")
        labels = [other[i % len(other)] for i in range(len(labels))]
    return hint_texts(labels)


def hint_texts(labels: Labels) -> list[str]:
    """A hint for each picture, from its labels."""
    return [hint_text([name for name, _ in told]) for told in labels]


def naming(
    group: Group,
    view: str,
    epoch: int,
    hints: Sequence[str],
    store: FeatureStore,
    processor: Processor,
    config: TrainConfig,
) -> list[tuple[Tokens, float]]:
    """A question after what a picture shows, where the classifier is sure of it; often none."""
    labels = store.labels(group, view)
    if len(labels) != 1 or not labels[0] or labels[0][0][1] < config.hints.sure:
        return []
    name = labels[0][0][0]
    chance = seeded(config.seed, epoch, group.key, "naming")
    if chance.random() >= config.hints.naming * store.rarity(name):
        return []
    kinds = kind_questions(name)
    if kinds and chance.random() < KINDS:
        question, answer = chance.choice(kinds)
    else:
        question = chance.choice(NAMING)
        answer = f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
    asked = Conversation.ask(group.images, question)
    return [(processor.tokens(asked, answer, hints), config.hints.weight)]
