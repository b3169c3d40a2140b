"""BLEU, ROUGE-L, CIDEr (and METEOR, SPICE where Java is) by pycocoevalcap's own scorers over our tokens.

Scores are percentages; CIDEr is multiplied by 100 as papers do. Besides the corpus scores, what a bootstrap
needs is kept for every picture: CIDEr and ROUGE-L are means over pictures, BLEU is a function of summed
counts. Document frequencies of CIDEr are those of the whole set: a resample keeps them.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import DataError
from vlm.eval.metrics.ptb import tokenize

ORDER = 4


@dataclass(frozen=True)
class CaptionScores:
    """Corpus scores, and what every picture adds to them.

    Attributes:
        metrics: `cider`, `bleu_1` to `bleu_4`, `rouge_l`, and `meteor`, `spice` where they were computed.
        per_item: `cider` and `rouge_l` of every picture, (n,) float64, percentages.
        bleu_counts: (n, 10) float64: tokens of the candidate, of its closest reference, then n-grams matched
            (1 to 4), then n-grams offered (1 to 4).
        skipped: metric -> why it was not computed.
    """

    metrics: dict[str, float]
    per_item: dict[str, np.ndarray]
    bleu_counts: np.ndarray
    skipped: dict[str, str] = field(default_factory=dict)


def score_captions(
    candidates: Sequence[str], references: Sequence[Sequence[str]], *, java: bool = True
) -> CaptionScores:
    """Scores raw captions against raw references, one candidate per picture.

    Args:
        java: compute METEOR (and SPICE) where a Java runtime and their files are there.

    Raises:
        DataError: no pictures, unequal numbers, or a picture without references.
    """
    if not candidates or len(candidates) != len(references):
        raise DataError(f"{len(candidates)} captions for {len(references)} pictures cannot be scored")
    if bare := [number for number, texts in enumerate(references) if not texts]:
        raise DataError(f"picture {bare[0]} has no reference caption")
    tokens = [tokenize(candidate) for candidate in candidates]
    targets = [[tokenize(text) for text in texts] for texts in references]
    counts = bleu_counts(tokens, targets)
    cider, rouge = _cider(tokens, targets), _rouge(tokens, targets)
    metrics = {"cider": float(cider.mean())}
    metrics |= {f"bleu_{n + 1}": float(score) for n, score in enumerate(bleu(counts.sum(axis=0)))}
    metrics["rouge_l"] = float(rouge.mean())
    skipped = {}
    for name, scorer in (("meteor", _meteor), ("spice", _spice)):
        value = scorer(tokens, targets) if java else "not asked for"
        if isinstance(value, str):
            skipped[name] = value
        else:
            metrics[name] = value
    return CaptionScores(metrics, {"cider": cider, "rouge_l": rouge}, counts, skipped)


def bleu_counts(tokens: Sequence[str], targets: Sequence[Sequence[str]]) -> np.ndarray:
    """(n, 10) counts of every picture, in the order that `CaptionScores` names."""
    from pycocoevalcap.bleu.bleu_scorer import BleuScorer

    scorer = BleuScorer(n=ORDER)
    for candidate, texts in zip(tokens, targets, strict=True):
        scorer += (candidate, list(texts))
    rows = [
        [
            cooked["testlen"],
            scorer._single_reflen(cooked["reflen"], "closest", cooked["testlen"]),
            *cooked["correct"],
            *cooked["guess"],
        ]
        for cooked in scorer.ctest
    ]
    return np.asarray(rows, dtype=np.float64)


def bleu(counts: np.ndarray) -> np.ndarray:
    """(..., 10) summed counts -> (..., 4) BLEU-1 to BLEU-4 in percent, pycocoevalcap's small constants in."""
    length, reference = counts[..., 0], counts[..., 1]
    precision = (counts[..., 2:6] + 1e-15) / (counts[..., 6:10] + 1e-9)
    scores = np.cumprod(precision, axis=-1) ** (1 / np.arange(1, ORDER + 1))
    ratio = (length + 1e-15) / (reference + 1e-9)
    penalty = np.exp(np.minimum(0.0, 1 - 1 / ratio))
    return np.asarray(100 * scores * penalty[..., None])


def _cider(tokens: Sequence[str], targets: Sequence[Sequence[str]]) -> np.ndarray:
    from pycocoevalcap.cider.cider_scorer import CiderScorer

    scorer = CiderScorer(n=ORDER, sigma=6.0)
    for candidate, texts in zip(tokens, targets, strict=True):
        scorer += (candidate, list(texts))
    return 100 * np.asarray(scorer.compute_score()[1], dtype=np.float64)


def _rouge(tokens: Sequence[str], targets: Sequence[Sequence[str]]) -> np.ndarray:
    from pycocoevalcap.rouge.rouge import Rouge

    scorer = Rouge()
    scores = [
        scorer.calc_score([candidate], list(texts)) for candidate, texts in zip(tokens, targets, strict=True)
    ]
    return 100 * np.asarray(scores, dtype=np.float64)


def _meteor(tokens: Sequence[str], targets: Sequence[Sequence[str]]) -> float | str:
    if shutil.which("java") is None:
        return "no Java here"
    from pycocoevalcap.meteor.meteor import Meteor

    return _by_java(Meteor, tokens, targets)


def _spice(tokens: Sequence[str], targets: Sequence[Sequence[str]]) -> float | str:
    if shutil.which("java") is None:
        return "no Java here"
    from pycocoevalcap.spice import spice

    if not list((Path(spice.__file__).parent / "lib").glob("stanford-corenlp-*-models.jar")):
        return "the Stanford models that SPICE wants are not in pycocoevalcap/spice/lib"
    return _by_java(spice.Spice, tokens, targets)


def _by_java(scorer: Any, tokens: Sequence[str], targets: Sequence[Sequence[str]]) -> float:
    """The corpus score of one of pycocoevalcap's Java scorers, in percent; what it prints is dropped."""
    # An empty candidate would shift the lines that METEOR's process answers with; a lone stop scores 0 too.
    found = {number: [candidate or "."] for number, candidate in enumerate(tokens)}
    wanted = {number: list(texts) for number, texts in enumerate(targets)}
    with contextlib.redirect_stdout(io.StringIO()):
        return 100 * float(scorer().compute_score(wanted, found)[0])
