"""Solved examples before the question."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vlm.conversation import Conversation
from vlm.data.convert.common import make_example
from vlm.errors import ConfigError
from vlm.eval import prompts
from vlm.eval.main import main


def shot_session(**changes: Any) -> Any:
    args = SimpleNamespace(shots=2, shot_labels="true", shot_choice="random", **changes)
    return SimpleNamespace(args=args, examples=[make_example("q.jpg", "What?", ["x"], "id1")])


def test_shots_stand_before_the_question_and_depend_on_the_id_alone() -> None:
    train = [make_example(f"{n}.jpg", f"t{n}?", [f"a{n}"], str(n)) for n in range(9)]
    last = [Conversation.ask([Path("q.jpg")], "What?")]
    found = prompts.with_shots(shot_session(), last, train)[0]
    assert [turn.role for turn in found.turns] == ["user", "assistant"] * 2 + ["user"]
    assert len(found.images) == 3
    assert found.turns[-1].text == "What?"
    assert found.turns[0].text.strip("t?") == found.turns[1].text.strip("a")
    assert prompts.with_shots(shot_session(), last, train)[0] == found
    with pytest.raises(ConfigError, match="wants 2 training examples, there are 1"):
        prompts.with_shots(shot_session(), last, train[:1])


@pytest.mark.parametrize("labels", ["true", "random"])
def test_lettered_shots_look_like_the_question(labels: str) -> None:
    def example(number: int) -> Any:
        listed = [f"{word}{number}" for word in ("red", "blue", "green")]
        return make_example(
            f"{number}.jpg", f"t{number}?", [listed[number % 3]], str(number), {"options": json.dumps(listed)}
        )

    session_, train = shot_session(), [example(number) for number in range(9)]
    session_.args.shot_labels = labels
    asked = example(10)
    session_.examples = [asked]
    found = prompts.with_shots(session_, [prompts.with_options(asked)], train, lettered=True)[0]
    assert found.turns[-1].text == prompts.with_options(asked).turns[-1].text
    for shown, said in zip(found.turns[:4:2], found.turns[1:4:2], strict=True):
        number = int(shown.text[1])
        assert shown.text == prompts.with_options(train[number]).turns[-1].text
        assert said.text == "ABC"[number % 3] if labels == "true" else said.text in "ABC"


def test_random_labels_come_from_other_examples() -> None:
    train = [make_example(f"{n}.jpg", f"t{n}?", [f"a{n}"], str(n)) for n in range(50)]
    session_ = shot_session()
    session_.args.shot_labels = "random"
    found = prompts.with_shots(session_, [Conversation.ask([Path("q.jpg")], "What?")], train)[0]
    assert [turn.text.strip("t?") for turn in found.turns[:4:2]] != [
        turn.text.strip("a") for turn in found.turns[1:4:2]
    ]


@pytest.mark.parametrize("option", [["--shot-labels", "random"], ["--shot-choice", "nearest"]])
def test_how_shots_are_drawn_is_not_said_without_shots(
    option: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["folder-vqa", "--data", "nowhere", "--out", "report.json", *option])
    assert ended.value.code == 2
    assert "say --shots K" in capsys.readouterr().err
