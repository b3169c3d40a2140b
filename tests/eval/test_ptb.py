"""The caption tokens: golden cases, and the Java tokenizer itself where there is a Java."""

from __future__ import annotations

import csv
import random
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.eval.metrics.ptb import PUNCTUATION, tokenize, tokenize_all

# Each line as Stanford's PTBTokenizer 3.4.1 (-preserveLines -lowerCase) has it, punctuation dropped.
GOLDEN = [
    ("A man's dog can't bark .", "a man 's dog ca n't bark"),
    ("Two dogs (brown & white) run.", "two dogs -lrb- brown & white -rrb- run"),
    ('"Hello," he said... it\'s 5:30 p.m.', "hello he said it 's 5:30 p.m."),
    ("the U.S. Army cannot fly; gonna wanna", "the u.s. army can not fly gon na wan na"),
    ("5 7/8 inches -- well-known T-shirt", "5\u00a07/8 inches well-known t-shirt"),
    ("'tis the '90s rock 'n' roll y'all", "'t is the '90s rock 'n' roll y' all"),
    (
        "caf\u00e9 na\u00efve \u201cquoted\u201d don\u2019t \u2014 \u00bd",
        "caf\u00e9 na\u00efve quoted do n't 1/2",
    ),
    ("mail a@b.com or http://x.org/a_b, #tag @user", "mail a@b.com or http://x.org/a_b #tag @user"),
    ("Mr. Smith of Inc. in St. John's", "mr. smith of inc. in st. john 's"),
    ("emoji \U0001f600 and [x] {y} <b>z</b>", "emoji and -lsb- x -rsb- -lcb- y -rcb- <b> z </b>"),
    (
        "\u20ac5 \u00a35 US$5 AT&T c++ C# (555) 123-4567",
        "$ 5 # 5 us$ 5 at&t c++ c# -lrb-555-rrb-\u00a0123-4567",
    ),
    ("", ""),
    (" . ", ""),
]

CHARACTERS = (
    "abcdeNTSI0123456789.,;:!?'\"`-_/\\()[]{}<>&@#$%^*+=~| \u00a0\u2019\u201c\u201d\u2014\u2026\u00e9\u00ad"
    "\u20ac\u6f22\u017f\U0001f600"
)
FRAGMENTS = """
n't 's 'll ... -- U.S. Mr. Inc. &amp; &quot; http:// www. .com it's don't cannot gonna 'tis 1/2 12:30 e.g.
Ph.D. :-) (^_^) O'o y'all c++ <br> </p> Co. ol' AT&T 01/02/2003 1,000.50 -5 man dog The running red-haired
co-op file.txt (555) 123-4567 '90s d'accord rock'n'roll No. 7 A.&nbsp;
"""
PIECES = [*CHARACTERS, *FRAGMENTS.split(), " The ", " A "]


@pytest.mark.parametrize(("caption", "tokens"), GOLDEN)
def test_golden(caption: str, tokens: str) -> None:
    assert tokenize(caption) == tokens


@given(st.text(max_size=60))
def test_any_text_gives_single_spaced_lower_case_tokens(text: str) -> None:
    tokens = tokenize(text)
    assert tokens == tokens.lower()
    assert "\n" not in tokens
    assert not PUNCTUATION & set(tokens.split(" "))


def generated(count: int) -> list[str]:
    """Captions no person would write, from pieces that the rules treat each in their own way."""
    chance = random.Random(3)
    joins = ("", "", " ")
    return [
        "".join(chance.choice(PIECES) + chance.choice(joins) for _ in range(chance.randint(1, 12))) + " end"
        for _ in range(count)
    ]


def java_tokens(captions: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    if shutil.which("java") is None:
        pytest.skip("no Java: the Python tokenizer cannot be compared with Stanford's here")
    ptbtokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8 -XX:+UseSerialGC")
    found = ptbtokenizer.PTBTokenizer().tokenize(
        {number: [{"caption": caption}] for number, caption in enumerate(captions)}
    )
    return [found[number][0] for number in range(len(captions))]


def test_equals_java_on_generated_text(monkeypatch: pytest.MonkeyPatch) -> None:
    captions = generated(5000)
    assert tokenize_all(captions) == java_tokens(captions, monkeypatch)


def test_equals_java_on_flickr8k(datasets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (datasets_dir / "flickr8k" / "captions.txt").open(newline="", encoding="utf-8") as lines:
        captions = [row["caption"] for row in csv.DictReader(lines)]
    assert len(captions) == 35_000
    assert tokenize_all(captions) == java_tokens(captions, monkeypatch)
