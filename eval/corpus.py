"""Scores of a whole set that are no means over its items: functions of sums to which every item adds counts.

The items of a report hold answers and references, from which the counts are made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from vlm.eval.metrics.answers import POPE, pope_counts, pope_scores
from vlm.eval.metrics.captions import ORDER, bleu, bleu_counts
from vlm.eval.metrics.chair import chair, chair_counts
from vlm.eval.metrics.ptb import tokenize
from vlm.eval.stats import Statistic


@dataclass(frozen=True)
class CorpusScore:
    """Metrics that share their counts.

    Attributes:
        names: of the metrics, in the order of `score`'s columns.
        counts: answers and every item's references -> (n, c) what each item adds.
        score: (..., c) sums -> (..., k) scores in percent.
    """

    names: tuple[str, ...]
    counts: Callable[[Sequence[str], Sequence[Sequence[str]]], np.ndarray]
    score: Statistic


def _bleu_counts(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    return bleu_counts(list(map(tokenize, answers)), [list(map(tokenize, texts)) for texts in references])


def _pope_counts(answers: Sequence[str], references: Sequence[Sequence[str]]) -> np.ndarray:
    return pope_counts(answers, [texts[0] for texts in references])


CORPUS_SCORES = (
    CorpusScore(tuple(f"bleu_{n + 1}" for n in range(ORDER)), _bleu_counts, bleu),
    CorpusScore(("chair_i",), chair_counts, chair),
    # POPE's accuracy is a mean of items as other tasks' is.
    CorpusScore(POPE[1:], _pope_counts, lambda counts: pope_scores(counts)[..., 1:]),
)
