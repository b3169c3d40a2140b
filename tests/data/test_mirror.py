"""What is said of a picture, said of its mirror image."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm.conversation import Conversation
from vlm.data.collate import Group, Pair, Source, group_by_image
from vlm.data.example import Example
from vlm.data.mirror import mirrored


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("what is on the left side of the bed?", "what is on the right side of the bed?"),
        ("Left side", "Right side"),
        ("ON THE RIGHT", "ON THE LEFT"),
        ("the leftmost chair, right-hand corner", "the rightmost chair, left-hand corner"),
        ("what is right of the computer?", "what is left of the computer?"),
        ("a man raises his left hand to the right", "a man raises his right hand to the left"),
        ("the cupboard on the top right of the oven", "the cupboard on the top left of the oven"),
        ("two dogs, one bright, one aleft", "two dogs, one bright, one aleft"),
        ("what is right next to the bed?", None),
        ("a trail that was left behind", None),
        ("a man has left the room on the right", None),
        ("the right answer", None),
        ("the food left over on the left plate", None),
    ],
)
def test_sides_change_places(text: str, told: str | None) -> None:
    assert mirrored(text) == told
    if told is not None:
        assert mirrored(told) == text


def group_of(*said: tuple[str, str], images: int = 1) -> Group:
    pictures = [f"{number}.png" for number in range(images)]
    examples = []
    for question, answer in said:
        asked = Conversation.ask(pictures, question)
        examples.append(Example(asked.images, asked.turns, answers=(answer,)))
    (group,) = group_by_image([Source(examples)])
    return group


def words(pairs: list[Pair]) -> list[tuple[str, str]]:
    return [(pair.example.turns[-1].text, pair.answer) for pair in pairs]


def test_a_group_has_a_mirror_image_if_all_that_is_said_has() -> None:
    sides = ("Where is the cat?", "on the left")
    group = group_of(("How many?", "2"), sides)
    assert group.mirrors and group.sided
    (pairs,) = group.by_source
    assert words(group.seen(pairs, "whole")) == words(pairs)
    assert words(group.seen(pairs, "flip")) == [("How many?", "2"), ("Where is the cat?", "on the right")]
    assert not group_of(sides, ("What is it?", "what is left")).mirrors


def test_the_left_one_of_two_pictures_stays_the_left_one() -> None:
    assert not group_of(("Is it brighter in the left picture?", "yes"), images=2).mirrors
    assert group_of(("Which is brighter?", "the first"), images=2).mirrors


def test_earlier_turns_change_sides_too() -> None:
    asked = Conversation.ask(["a.png"], "Who is on the left?").answered("a man on the left").then("And next?")
    (group,) = group_by_image([Source([Example(asked.images, asked.turns, answers=("a dog",))])])
    (pair,) = group.seen(group.by_source[0], "flip")
    assert [turn.text for turn in pair.example.turns] == [
        "Who is on the right?", "a man on the right", "And next?",
    ]  # fmt: skip
    unclear = Conversation.ask(["a.png"], "Who has left?").answered("a man").then("And next?")
    (group,) = group_by_image([Source([Example(unclear.images, unclear.turns, answers=("a dog",))])])
    assert not group.mirrors


def test_most_of_daquars_rooms_have_a_mirror_image(datasets_dir: Path) -> None:
    from vlm.data.sources import read_dataset

    groups = group_by_image([Source(read_dataset("daquar", datasets_dir / "daquar", "train"))])
    assert sum(group.mirrors for group in groups) > 0.97 * len(groups)
    assert sum(not group.sided for group in groups) < 0.2 * len(groups)
