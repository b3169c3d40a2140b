"""Scores of short answers: golden cases, the official VQA rules restated, properties."""

from __future__ import annotations

import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.convert.common import make_example
from vlm.eval import tasks
from vlm.eval.metrics.answers import (
    anls,
    direct_answer,
    edit_distance,
    exact_match,
    pope_answer,
    pope_metrics,
    read_choice,
    says_yes_or_no,
)
from vlm.eval.metrics.vqa import (
    CONTRACTIONS,
    evalai_accuracy,
    normalise,
    vizwiz_accuracy,
    vqa_accuracy,
)

TEN_BLUE = ["blue"] * 10


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        ("The Dog.", "dog"),
        ("a red, and an orange", "red and orange"),
        ("two", "2"),
        ("none", "0"),
        ("1,000", "1000"),  # a comma between digits drops every mark
        ("1,000-2", "10002"),
        ("red/white", "red white"),  # a mark between letters becomes a space
        ("red / white", "red white"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldnt've", "couldn't've"),
        ("3.5", "3.5"),  # a full stop before a digit stays
        ("5.", "5"),  # the lookbehind that was meant would have kept this one
        ("1.a", "1a"),
        ("what\ntime\tis it", "what time is it"),
        ("." * 40, "." * 8),  # the flag passed as a count: 32 full stops go, the others stay
        ("somebody'd", "somebodyd"),
    ],
)
def test_normalise(raw: str, plain: str) -> None:
    assert normalise(raw) == plain


@pytest.mark.parametrize(
    ("answer", "references", "strict", "normalised"),
    [
        ("blue", TEN_BLUE, 1.0, 1.0),
        ("Blue", TEN_BLUE, 1.0, 1.0),
        ("the blue", TEN_BLUE, 0.0, 1.0),  # unanimous: nothing is normalised
        ("two", ["two"] * 10, 1.0, 1.0),
        ("2", ["two"] * 10, 0.0, 1.0),
        ("2", ["two"] * 9 + ["three"], 1.0, 1.0),
        ("red", ["red"] * 3 + ["blue"] * 7, 0.9, 0.9),
        ("red", ["red"] * 2 + ["blue"] * 8, 0.6, 0.6),
        ("red", ["red"] + ["blue"] * 9, 0.3, 0.3),
        ("", TEN_BLUE, 0.0, 0.0),
        ("green", ["green", "blue"], 1.0, 1.0),  # fewer than four: exact match
        ("green", ["blue"], 0.0, 0.0),
    ],
)
def test_vqa_accuracy(answer: str, references: list[str], strict: float, normalised: float) -> None:
    assert vqa_accuracy(answer, references) == pytest.approx(strict, abs=1e-9)
    assert vqa_accuracy(answer, references, strict=False) == pytest.approx(normalised, abs=1e-9)


def official_accuracy(answer: str, references: list[str]) -> float:
    """The official evaluation's steps, one by one, over annotations that carry their ids."""
    marks = [
        ";",
        "/",
        "[",
        "]",
        '"',
        "{",
        "}",
        "(",
        ")",
        "=",
        "+",
        "\\",
        "_",
        "-",
        ">",
        "<",
        "@",
        "`",
        ",",
        "?",
        "!",
    ]
    digits = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
    digits |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}

    def process(text: str) -> str:
        out = text
        for mark in marks:
            if mark + " " in text or " " + mark in text or re.search(r"(\d)(\,)(\d)", text) is not None:
                out = out.replace(mark, "")
            else:
                out = out.replace(mark, " ")
        out = re.compile(r"(?!<=\d)(\.)(?!\d)").sub("", out, count=int(re.UNICODE))
        kept = []
        for word in out.lower().split():
            word = digits.get(word, word)
            if word not in ["a", "an", "the"]:
                kept.append(word)
        return " ".join(CONTRACTIONS.get(word, word) for word in kept)

    annotations = [
        {"answer": text.replace("\n", " ").replace("\t", " ").strip(), "answer_id": number}
        for number, text in enumerate(references)
    ]
    said = answer.replace("\n", " ").replace("\t", " ").strip()
    if len({row["answer"] for row in annotations}) > 1:
        for row in annotations:
            row["answer"] = process(str(row["answer"]))
        said = process(said)
    scores = []
    for row in annotations:
        others = [item for item in annotations if item != row]
        hits = [item for item in others if str(item["answer"]).lower() == said.lower()]
        scores.append(min(1.0, len(hits) / 3))
    return sum(scores) / len(scores)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("Unanswerable.", ["unanswerable"] * 10, 1.0),  # the answer is always normalised ...
        ("the can", ["can"] * 10, 1.0),
        ("two", ["two"] * 10, 0.0),  # ... the references never
        ("2", ["two"] * 6 + ["2"] * 4, 1.0),
        ("t-shirt", ["t-shirt"] * 7 + ["shirt"] * 3, 0.0),
        ("7:00 pm", ["7:00 pm"] * 2 + ["7 pm"] * 8, 0.6),
        ("Dell", ["Dell"] * 10, 0.0),  # compared as they stand, case and all
        ("dont know", ["dont know"] * 10, 0.0),  # becomes don\u2019t, with a typographic apostrophe
        ("dont know", ["don't know"] * 10, 0.0),
        ("cant tell", ["can't tell"] * 10, 1.0),  # but for eight words
        ("a\tred\ncar", ["red car"] * 10, 1.0),
    ],
)
def test_vizwiz_accuracy(answer: str, references: list[str], score: float) -> None:
    assert vizwiz_accuracy(answer, references) == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("two", ["2"] * 10, 1.0),  # both sides are processed, whether the references agree or not
        ("coca-cola", ["coca cola"] * 10, 1.0),
        ("10,000", ["10000"] * 6 + ["ten"] * 4, 1.0),
        ("joe 's", ["joe's"] * 10, 1.0),
        ("1,000-2", ["1000 2"] * 10, 1.0),  # the comma is gone before it can drop the other marks
        ("Yes?", ["yes"] * 3 + ["no"] * 7, 0.9),
        ("bowmore", ["Bowmore "] * 10, 1.0),
    ],
)
def test_evalai_accuracy(answer: str, references: list[str], score: float) -> None:
    assert evalai_accuracy(answer, references) == pytest.approx(score, abs=1e-9)


@pytest.mark.parametrize(
    ("task", "official"), [("vqav2", 100.0), ("okvqa", 100.0), ("vizwiz", 0.0), ("textvqa", 100.0)]
)
def test_the_main_score_of_a_task_is_by_its_own_rule(task: str, official: float) -> None:
    example = make_example("x.jpg", "q?", ["coca-cola"] * 10, "1")
    said = tasks.get(task).score([example], ["coca-cola"]).metrics
    assert (said["accuracy_strict"], said["accuracy_normalised"]) == (official, 100.0)
    said = tasks.get(task).score([example], ["Coca-Cola."]).metrics
    assert said["accuracy_strict"] == (100.0 if task == "textvqa" else 0.0)


def test_official_rules_on_generated_answers() -> None:
    chance = random.Random(11)
    words = [
        "red",
        "the red",
        "Red",
        "two",
        "2",
        "1,000",
        "1000",
        "red-ish",
        "red ish",
        "dont",
        "don't",
        "3.5",
        "5.",
    ]
    words += [
        "a cup",
        "cup",
        "cup/mug",
        "cup / mug",
        "none",
        "0",
        "...",
        "what?",
        "x_y",
        "U.S.",
        "us",
        "ten 10",
    ]
    for _ in range(5000):
        pool = chance.sample(words, chance.randint(1, 5))
        references = [chance.choice(pool) for _ in range(10)]
        answer = chance.choice([*words, "".join(chance.choice("ab.,-/ 1'2\t") for _ in range(6))])
        assert vqa_accuracy(answer, references) == pytest.approx(
            official_accuracy(answer, references), abs=1e-9
        )


@given(st.text(max_size=30), st.lists(st.text(max_size=12), min_size=1, max_size=12))
def test_vqa_accuracy_is_a_share(answer: str, references: list[str]) -> None:
    for strict in (True, False):
        assert 0.0 <= vqa_accuracy(answer, references, strict=strict) <= 1.0


def test_exact_match() -> None:
    assert exact_match(" A  Dog. ", ["a dog"]) == 1.0
    assert exact_match("dog", ["a dog", "cat"]) == 0.0


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        ("hello", ["hello"], 1.0),
        ("helo", ["hello"], 0.8),
        ("xxlo", ["hello"], 0.0),
        ("Hello ", ["x", "hello"], 1.0),
        ("", [""], 1.0),
        ("", ["x"], 0.0),
    ],
)
def test_anls(answer: str, references: list[str], score: float) -> None:
    assert anls(answer, references) == pytest.approx(score)


@given(st.text(max_size=12), st.text(max_size=12))
def test_edit_distance(first: str, second: str) -> None:
    distance = edit_distance(first, second)
    assert distance == edit_distance(second, first)
    assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))
    assert (distance == 0) == (first == second)


def test_direct_answer_takes_strings_as_they_are() -> None:
    assert direct_answer("car", ["car"] * 2 + ["Car"] * 8) == pytest.approx(2 / 3)
    assert direct_answer("car", ["car"] * 10) == 1.0


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Yes, there is.", "yes"),
        ("No.", "no"),
        ("There is not a dog", "no"),
        ("NO", "yes"),  # the official reading knows No and no only
        ("yes. no", "yes"),  # only the first sentence counts
        ("", "yes"),
    ],
)
def test_pope_answer(text: str, label: str) -> None:
    assert pope_answer(text) == label


def test_pope_metrics() -> None:
    scores = pope_metrics(["yes", "no", "yes", "maybe"], ["yes", "no", "no", "no"])
    assert scores["accuracy"] == 50.0
    assert scores["precision"] == pytest.approx(100 / 3)
    assert scores["recall"] == 100.0
    assert scores["f1"] == 50.0
    assert scores["yes_rate"] == 75.0
    assert scores["unparsed"] == 25.0
    assert says_yes_or_no("NO!")


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("B", 1),
        ("(b)", 1),
        ("Answer: B.", 1),
        ("The answer is B.", 1),
        ("The answer is B", 1),
        ("the correct answer is (B)", 1),
        ("The correct answer is B: the blue bus", 1),
        ("The right option is B. It is blue.", 1),
        ("**The answer is option B**", 1),
        ("The answer is a dog", None),
        ("The answer is the blue bus.", 1),
        ("a red car", 0),
        ("I think it is the blue bus", 1),
        ("a red car or the blue bus", None),
        ("", None),
        ("z", None),
        ("A", 0),
    ],
)
def test_read_choice(text: str, choice: int | None) -> None:
    assert read_choice(text, ["red car", "the blue bus", "c"]) == choice
