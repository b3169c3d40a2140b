"""Scores of one short answer: exact match, ANLS, direct answers of A-OKVQA, POPE's yes and no, choices."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from vlm.eval.metrics.vqa import normalise

ANLS_THRESHOLD = 0.5
POPE = ("accuracy", "precision", "recall", "f1", "yes_rate", "unparsed")
_LETTER = re.compile(
    r"^\W*(?:(?:the\b\W*)?(?:(?:correct|right)\b\W*)?(?:answer|option)\b\W*(?:is\b\W*(?:option\b\W*)?)?)?"
    r"([a-z])(?:[).:]|\W*$)",
    re.IGNORECASE,
)


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 where the answer equals a reference but for case, spaces and a final full stop."""
    return float(_plain(answer) in {_plain(reference) for reference in references})


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(".").rstrip()


def anls(answer: str, references: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity (Biten et al. 2019): the best reference, 0 below a half."""
    best = max(
        (_similarity(_squeezed(answer), _squeezed(reference)) for reference in references), default=0.0
    )
    return best if best >= ANLS_THRESHOLD else 0.0


def _squeezed(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _similarity(first: str, second: str) -> float:
    longest = max(len(first), len(second))
    return 1.0 - edit_distance(first, second) / longest if longest else 1.0


def edit_distance(first: str, second: str) -> int:
    """Levenshtein's distance in characters."""
    row = list(range(len(second) + 1))
    for number, char in enumerate(first, start=1):
        above, row[0] = row[0], number
        for column, other in enumerate(second, start=1):
            above, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, above + (char != other)),
            )
    return row[-1]


def direct_answer(answer: str, references: Sequence[str]) -> float:
    """A-OKVQA's direct-answer score: min(1, equal references / 3), strings taken as they are."""
    return min(1.0, sum(answer == reference for reference in references) / 3)


def pope_answer(text: str) -> str:
    """POPE's official reading of an answer: `no` where its first sentence holds No, no or not, else `yes`."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def says_yes_or_no(text: str) -> bool:
    """Whether an answer holds a yes or a no at all; POPE's reading takes the others for a yes."""
    return bool({"yes", "no", "not"} & set(re.findall(r"[a-z]+", text.lower())))


def pope_counts(answers: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """(n, 5): true and false `yes`, false and true `no`, and whether neither was said (read as a `yes`)."""
    said = np.array([pope_answer(answer) == "yes" for answer in answers])
    true = np.array([label == "yes" for label in labels])
    neither = np.array([not says_yes_or_no(answer) for answer in answers])
    return np.stack([said & true, said & ~true, ~said & true, ~said & ~true, neither], axis=1).astype(float)


def pope_scores(counts: np.ndarray) -> np.ndarray:
    """(..., 5) summed counts -> (..., 6) the scores of `POPE`, in percent; 0 where nothing was counted."""
    hits, wrong, missed, right, neither = np.moveaxis(counts, -1, 0)
    total = hits + wrong + missed + right
    parts = (
        (hits + right, total),
        (hits, hits + wrong),
        (hits, hits + missed),
        (2 * hits, 2 * hits + wrong + missed),
        (hits + wrong, total),
        (neither, total),
    )
    return np.stack([100 * part / np.maximum(whole, 1) for part, whole in parts], axis=-1)


def pope_metrics(answers: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of `yes`, the rate of `yes` and of unparsed answers, in percent."""
    return dict(zip(POPE, pope_scores(pope_counts(answers, labels).sum(axis=0)).tolist(), strict=True))


def read_choice(text: str, options: Sequence[str]) -> int | None:
    """The option that an answer names: by its words, then by its letter, then as the only one it mentions."""
    plain = [normalise(option) for option in options]
    answer = normalise(text)
    if answer in plain:
        return plain.index(answer)
    if (letter := _LETTER.match(text.strip())) and ord(letter[1].lower()) - ord("a") < len(options):
        return ord(letter[1].lower()) - ord("a")
    named = [number for number, option in enumerate(plain) if option and f" {option} " in f" {answer} "]
    return named[0] if len(named) == 1 else None
