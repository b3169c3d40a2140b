"""From examples and answers to `Scores`: captions, and means of item scores with a breakdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import compress

import numpy as np

from vlm.data.example import Example
from vlm.errors import DataError
from vlm.eval import stats
from vlm.eval.metrics import answers as short
from vlm.eval.metrics.captions import bleu, score_captions
from vlm.eval.metrics.chair import chair, chair_counts
from vlm.eval.metrics.vqa import official, vqa_accuracy
from vlm.eval.metrics.wordnet import find_wordnet
from vlm.eval.metrics.wups import wups
from vlm.eval.task import Scorer, Scores

ItemScore = Callable[[str, Example], float]
BREAKDOWN_LIMIT = 40  # a subset for every one of a thousand question types would hide the few that matter


def caption_scores(
    examples: Sequence[Example], answers: Sequence[str], *, java: bool = True, by: Sequence[str] = ()
) -> Scores:
    """CIDEr first, then BLEU-1 to BLEU-4, ROUGE-L, and METEOR and SPICE where they can be had.

    Args:
        by: keys of an example's `meta` by whose values CIDEr (with the whole set's document frequencies),
            ROUGE-L and BLEU-4 (of the subset's own counts) are broken down.
    """
    found = score_captions(answers, [example.answers for example in examples], java=java)
    intervals = {name: stats.interval(values) for name, values in found.per_item.items()}
    tails = stats.corpus_interval(found.bleu_counts, bleu)
    intervals |= {f"bleu_{n + 1}": (float(low), float(high)) for n, (low, high) in enumerate(tails)}
    table = breakdown(examples, found.per_item, by)
    for name, chosen in _subsets(examples, by):
        table[name]["bleu_4"] = float(bleu(found.bleu_counts[chosen].sum(axis=0))[3])
    per_item = found.per_item | {"bleu_4": bleu(found.bleu_counts)[:, 3]}
    return Scores(found.metrics, intervals, per_item, table, found.skipped)


def object_caption_scores(
    examples: Sequence[Example], answers: Sequence[str], *, java: bool = True
) -> Scores:
    """`caption_scores`, and CHAIR_s and CHAIR_i: the shares of captions and of named objects that are about
    something which the references do not have; lower is better. Objects and synonyms are
    `vlm.data.lexicon`'s."""
    found = caption_scores(examples, answers, java=java)
    counts = chair_counts(answers, [example.answers for example in examples])
    wrong = 100.0 * (counts[:, 1] > 0)
    metrics, skipped = {"chair_s": float(wrong.mean())}, dict(found.skipped)
    intervals = {"chair_s": stats.interval(wrong)}
    if counts[:, 0].any():
        metrics["chair_i"] = float(chair(counts.sum(axis=0))[0])
        ((low, high),) = stats.corpus_interval(counts, chair)
        intervals["chair_i"] = (float(low), float(high))
    else:
        skipped["chair_i"] = "no caption names an object"
    return replace(
        found,
        metrics=found.metrics | metrics,
        intervals=found.intervals | intervals,
        per_item=found.per_item | {"chair_s": wrong},
        skipped=skipped,
    )


def item_scores(
    metrics: dict[str, ItemScore], by: Sequence[str] = ("question_type",), group: str | None = None
) -> Scorer:
    """A scorer of means over items.

    Args:
        metrics: name -> score of one answer, 0 to 1; NaN leaves the item out. The first is the main metric.
        by: keys of an example's `meta` by whose values the main metric is broken down.
        group: the key of `meta` that items which are no independent draws have in common.
    """

    def score(examples: Sequence[Example], answers: Sequence[str]) -> Scores:
        per_item = {
            name: np.array(
                [100 * of(answer, example) for answer, example in zip(answers, examples, strict=True)]
            )
            for name, of in metrics.items()
        }
        groups = tuple(str(example.meta[group]) for example in examples) if group else ()
        means, intervals = {}, {}
        for name, values in per_item.items():
            kept = ~np.isnan(values)
            counted = values[kept]
            if len(counted):
                means[name] = float(counted.mean())
                intervals[name] = stats.interval(counted, groups=list(compress(groups, kept)))
        return Scores(means, intervals, per_item, breakdown(examples, per_item, by), groups=groups)

    return score


def breakdown(
    examples: Sequence[Example], per_item: dict[str, np.ndarray], by: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Means by the values of `meta` keys: "question_type=count" -> {"n": 12, metric: mean}."""
    table: dict[str, dict[str, float]] = {}
    for subset, chosen in _subsets(examples, by):
        row: dict[str, float] = {"n": int(chosen.sum())}
        for name, values in per_item.items():
            counted = values[chosen & ~np.isnan(values)]
            if len(counted):
                row[name] = float(counted.mean())
        table[subset] = row
    return table


def _subsets(examples: Sequence[Example], by: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """("question_type=count", which examples these are) of every value of `meta` keys, large ones first."""
    for key in by:
        kinds = [str(example.meta[key]) if key in example.meta else "" for example in examples]
        for kind, _ in Counter(kind for kind in kinds if kind).most_common(BREAKDOWN_LIMIT):
            yield f"{key}={kind}", np.array([each == kind for each in kinds])


def exact(answer: str, example: Example) -> float:
    """1 for a reference's own words."""
    return short.exact_match(answer, example.answers)


def vqa_metrics(task: str) -> dict[str, ItemScore]:
    """Both VQA accuracies of a task.

    `accuracy_strict` is by the benchmark's own code, as published figures are; `accuracy_normalised` has one
    rule for all tasks: the VQA challenge's normalisation, always, of references and answer.
    """
    rule = official(task)
    return {
        "accuracy_strict": lambda answer, example: rule(answer, example.answers),
        "accuracy_normalised": lambda answer, example: vqa_accuracy(answer, example.answers, strict=False),
    }


def vqa_scores(task: str) -> Scorer:
    """The scorer of a task's `vqa_metrics`, by types of answers and questions."""
    return item_scores(vqa_metrics(task), by=("answer_type", "question_type"))


def soft(threshold: float) -> ItemScore:
    """WUPS of comma-separated answers; -1 compares sets of words for equality."""
    return lambda answer, example: wups(_words(answer), _words(example.answers[0]), threshold)


def _words(answer: str) -> str:
    """DAQUAR's answers but for what tells none apart: case, underscores for spaces, a final full stop."""
    return " ".join(answer.lower().replace("_", " ").split()).rstrip(".").rstrip()


def single(answer: str, example: Example) -> float:
    """`soft(-1)` on questions with one reference answer; others are left out (NaN)."""
    return soft(-1)(answer, example) if int(example.meta["answer_count"]) == 1 else float("nan")


def options(example: Example) -> list[str]:
    """The choices of a multiple-choice example.

    Raises:
        DataError: it has none.
    """
    try:
        found = json.loads(example.meta["options"])
    except (KeyError, TypeError, json.JSONDecodeError):
        raise DataError(f"{example.id} has no choices") from None
    return [str(option) for option in found]


def choice(answer: str, example: Example) -> float:
    """1 where the answer is read as the right choice."""
    read = chosen(answer, options(example))
    return float(read is not None and options(example)[read] in example.answers)


def chosen(answer: str, listed: Sequence[str]) -> int | None:
    """The place of the choice that an answer names, by its very words or as `read_choice` reads it."""
    if answer in listed:
        return list(listed).index(answer)
    return short.read_choice(answer, listed)


def no_choice(answer: str, example: Example) -> bool:
    """Whether an answer names none of the choices, or several."""
    return chosen(answer, options(example)) is None


def neither(answer: str, example: Example) -> bool:
    """Whether an answer says neither yes nor no."""
    return not short.says_yes_or_no(answer)


exact_scores = item_scores({"exact_match": exact})
choice_scores = item_scores({"accuracy": choice})


def daquar_scores(examples: Sequence[Example], answers: Sequence[str]) -> Scores:
    """Accuracy on single-answer questions first, then of all, then WUPS where WordNet is installed."""
    metrics: dict[str, ItemScore] = {"accuracy_single": single, "accuracy_all": soft(-1)}
    skipped = {}
    try:
        find_wordnet()
        metrics |= {"wups_0.9": soft(0.9), "wups_0.0": soft(0.0)}
    except DataError as error:
        skipped = dict.fromkeys(("wups_0.9", "wups_0.0"), str(error))
    found = item_scores(metrics, by=("answer_count", "question_type"))(examples, answers)
    return replace(found, skipped=skipped)


def uniform_chance(examples: Sequence[Example]) -> float:
    """Percent of guessing uniformly among all answers that are right anywhere in the split."""
    return 100 / len({answer for example in examples for answer in example.answers})


def choice_chance(examples: Sequence[Example]) -> float:
    """Percent of guessing uniformly among each example's own choices."""
    return 100 * float(np.mean([1 / len(options(example)) for example in examples]))


def half(examples: Sequence[Example]) -> float:
    """Percent of guessing yes or no."""
    return 50.0
