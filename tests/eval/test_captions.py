"""Caption scores against pycocoevalcap's own pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from vlm.data.sources import read_dataset
from vlm.errors import DataError
from vlm.eval.metrics.captions import bleu, score_captions

CANDIDATES = ["A dog runs on the beach.", "Two men play football", "a cat", ""]
REFERENCES = [
    ["A dog is running along a beach .", "The dog runs on sand .", "A brown dog at the sea ."],
    ["Two men are playing soccer .", "Men play football on a field .", "Two players ."],
    ["A cat sits on a sofa .", "The cat is asleep ."],
    ["A red bus .", "A bus in a street ."],
]


def official(candidates: list[str], references: list[list[str]]) -> dict[str, float]:
    """pycocoevalcap as its authors run it, Java tokenizer and all."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    wanted = {n: [{"caption": text} for text in texts] for n, texts in enumerate(references)}
    wanted = PTBTokenizer().tokenize(wanted)
    found = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in enumerate(candidates)})
    scores = {
        "cider": Cider().compute_score(wanted, found)[0],
        "rouge_l": Rouge().compute_score(wanted, found)[0],
    }
    four, _ = Bleu(4).compute_score(wanted, found, verbose=0)
    return {
        name: 100 * float(score)
        for name, score in (scores | {f"bleu_{n + 1}": four[n] for n in range(4)}).items()
    }


@pytest.fixture
def java(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("java") is None:
        pytest.skip("no Java: pycocoevalcap's own tokenizer cannot run here")
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Dfile.encoding=UTF-8")


@pytest.mark.usefixtures("java")
def test_equals_pycocoevalcap_on_small_set() -> None:
    ours = score_captions(CANDIDATES, REFERENCES, java=False).metrics
    theirs = official(CANDIDATES, REFERENCES)
    assert ours == pytest.approx(theirs, abs=1e-9)
    assert ours["cider"] > 10


@pytest.mark.usefixtures("java")
def test_equals_pycocoevalcap_on_flickr8k_dev(datasets_dir: Path) -> None:
    examples = read_dataset("flickr8k", datasets_dir, "dev")
    assert len(examples) == 1000
    first, rest = [e.answers[0] for e in examples], [list(e.answers[1:]) for e in examples]
    assert score_captions(first, rest, java=False).metrics == pytest.approx(official(first, rest), abs=1e-9)


@pytest.mark.usefixtures("java")
def test_meteor_takes_an_empty_caption() -> None:
    scores = score_captions(CANDIDATES, REFERENCES)
    assert 10 < scores.metrics["meteor"] < 60
    assert "spice" in scores.metrics or "SPICE" in scores.skipped["spice"]


def test_per_picture_values_add_up() -> None:
    scores = score_captions(CANDIDATES, REFERENCES, java=False)
    assert scores.per_item["cider"].mean() == pytest.approx(scores.metrics["cider"])
    assert scores.per_item["cider"][3] == 0.0
    corpus = bleu(scores.bleu_counts.sum(axis=0))
    assert [scores.metrics[f"bleu_{n}"] for n in range(1, 5)] == pytest.approx(corpus.tolist())
    assert scores.bleu_counts.shape == (4, 10)
    assert scores.skipped == {"meteor": "not asked for", "spice": "not asked for"}


def test_bleu_of_stacked_counts() -> None:
    counts = score_captions(CANDIDATES, REFERENCES, java=False).bleu_counts
    stacked = np.stack([counts.sum(axis=0), counts[:2].sum(axis=0)])
    assert bleu(stacked)[0] == pytest.approx(bleu(stacked[0]))


@pytest.mark.parametrize(("candidates", "references"), [([], []), (["a"], []), (["a"], [[]])])
def test_nothing_to_score_is_an_error(candidates: list[str], references: list[list[str]]) -> None:
    with pytest.raises(DataError):
        score_captions(candidates, references, java=False)
