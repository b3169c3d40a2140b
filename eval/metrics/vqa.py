"""VQA accuracy as the benchmarks' own code computes it, quirk by quirk: three rules, one for each lineage.

`vqa_accuracy` is `vqaEval.py` of the VQA challenge (VQA v2, OK-VQA): where all references are the same string
nothing is normalised, the full stop's pattern is `(?!<=\\d)(\\.)(?!\\d)` (a lookahead where a lookbehind was
meant, so it always holds), and at most 32 full stops go (a flag is passed as the count). With `strict=False`
it differs in one point: references and answer are always normalised.

`vizwiz_accuracy` is VizWiz's `vqaEval.py`: the answer is always normalised, references never, and they are
compared as they stand. `evalai_accuracy` is that of TextVQA's papers since M4C: EvalAI's answer processor,
which takes out commas, question marks and 's before the same normalisation, on both sides.

All of them count other references by position, and share `agreement`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

ENOUGH = 4  # references from which leave-one-out agreement means something
_PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")
_COMMA = re.compile(r"(\d)(,)(\d)")
_MARKS = (*';/[]"{}()=+\\_-><@`,?!',)
_PERIODS_REMOVED = 32
_DIGITS = "zero one two three four five six seven eight nine ten"
_NUMBERS = {name: str(number) for number, name in enumerate(_DIGITS.split())} | {"none": "0"}
_ARTICLES = frozenset(("a", "an", "the"))
# What becomes of words without their apostrophe. Words that lost only that are listed as they should be.
_APOSTROPHES = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd
there're there's they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've
when's where'd where's where've who'd who'll who's who've why'll why're why's won't would've wouldn't
you'd you'll you're you've
"""
_DOUBLE = """
couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've you'd've
"""


def _contractions() -> dict[str, str]:
    table = {word.replace("'", ""): word for word in _APOSTROPHES.split()}
    for word in _DOUBLE.split():
        stem, middle, _ = word.rsplit("'", 2)
        table[f"{stem}{middle}'ve"] = table[f"{stem}'{middle}ve"] = word
    table |= {"let's": "let's", "she's": "she's", "somebody'd": "somebodyd", "y'all'dve": "y'all'd've"}
    table |= {"yall": "y'all", "yall'll": "y'all'll", "y'allll": "y'all'll", "yall'd've": "y'all'd've"}
    table |= {"y'alld've": "y'all'd've"}
    return table | dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")


CONTRACTIONS = _contractions()
_STRAIGHT = ("aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove")


def _curly(table: Mapping[str, str]) -> dict[str, str]:
    """The table as VizWiz's file has it: with typographic apostrophes almost everywhere."""
    kept = ("couldn'tve", "hadn'tve")
    return {
        word if word in kept else word.replace("'", "\u2019"): (
            right if word in _STRAIGHT else right.replace("'", "\u2019")
        )
        for word, right in table.items()
    }


_VIZWIZ = _curly(CONTRACTIONS)


def normalise(answer: str) -> str:
    """The answer without punctuation, articles and case, numbers as digits, contractions with apostrophes."""
    return _words(punctuation(_one_line(answer)))


def evalai(answer: str) -> str:
    """EvalAI's answer processor: commas and question marks go and 's stands apart, then `normalise`."""
    return normalise(answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip())


def _one_line(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def punctuation(answer: str) -> str:
    """The first half of `normalise`: marks go or become spaces, full stops go."""
    number = _COMMA.search(answer) is not None
    text = answer
    for mark in _MARKS:
        beside_space = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if beside_space or number else " ")
    return _PERIOD.sub("", text, count=_PERIODS_REMOVED)


def _words(answer: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    words = (_NUMBERS.get(word, word) for word in answer.lower().split())
    return " ".join(contractions.get(word, word) for word in words if word not in _ARTICLES)


def agreement(same: Sequence[bool]) -> float:
    """Agreement with the annotators: the mean, over leaving one out, of min(1, matches among the rest / 3).

    With fewer than four references it is 1 where the answer equals any of them, else 0.

    Args:
        same: of each reference, whether the answer equals it.

    Returns:
        0 to 1.
    """
    if len(same) < ENOUGH:
        return float(any(same))
    total = sum(same)
    return sum(min(1.0, (total - hit) / 3) for hit in same) / len(same)


def vqa_accuracy(answer: str, references: Sequence[str], *, strict: bool = True) -> float:
    """The VQA challenge's rule, 0 to 1; `strict=False`: normalised where all references agree, too."""
    answer, given = _one_line(answer), [_one_line(reference) for reference in references]
    if not strict or len(set(given)) > 1:
        answer, given = _words(punctuation(answer)), [_words(punctuation(text)) for text in given]
    return agreement([reference.lower() == answer.lower() for reference in given])


def vizwiz_accuracy(answer: str, references: Sequence[str]) -> float:
    """VizWiz's rule, 0 to 1."""
    said = _words(punctuation(_one_line(answer)), _VIZWIZ)
    return agreement([reference == said for reference in references])


def evalai_accuracy(answer: str, references: Sequence[str]) -> float:
    """TextVQA's rule, 0 to 1."""
    said = evalai(answer)
    return agreement([evalai(reference) == said for reference in references])


_RULES = {"vizwiz": vizwiz_accuracy, "textvqa": evalai_accuracy}


def official(task: str) -> Callable[[str, Sequence[str]], float]:
    """The rule of a benchmark's own code: of those that have none here, the VQA challenge's."""
    return _RULES.get(task, vqa_accuracy)
