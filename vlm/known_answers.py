"""Answers that were right for like questions about like pictures: they guide what is said to a question.

Of the answers of a data set, which is right? Kernel ridge regression says so in seconds, from a question's
words and a picture's frozen features, small networks beside it in minutes (`vlm.answer_net`), or one alone
where questions are too many to keep what each counts; the language model knows how answers are worded, and
what its adapter has learnt. All together (a product of experts, Hinton 2002) are right more often than
each: each step's log-probabilities rise for tokens that lead to an expected answer, and for no other. Who
asks something unlike all that is known is answered as without.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.answer_net import AnswerNets
from vlm.features import Seen
from vlm.grams import Gram, grams
from vlm.guide import (
    SMALLEST,
    PictureGuide,
    require,
    require_finite,
    require_positive,
    squeezed,
    unsqueezed,
    usable,
)
from vlm.quantised import dequantise, quantise, require_quantised

MATRICES = {"turn": 4, "seen": 8, "weigh": 8}
"""Bits of a number on disk."""
GROUP = 3
"""Adjacent words that count as one, at most."""
SHARPNESS = 2.0
"""Questions are alike by exp(SHARPNESS * cosine of their word groups) - 1, as a share of the largest."""
SEEING = 3.0
"""What a like picture counts beside a like question alone."""
STRANGE, FAMILIAR = 0.3, 0.5
"""A question whose nearest known one is less alike than the first is not guided, from the second on wholly: a
little of very many that merely begin alike would otherwise add up to much."""
NOTHING = 0.03
"""Share of a right answer that counts as nothing: below it an expectation is mostly noise."""
MOST = 48
"""Answers that guide, those that are expected most."""
LONGEST = 300
"""Letters of a known question at most."""
_WORD = re.compile(r"\w+")


def plain(question: str) -> str:
    """A question's words in small letters, without marks."""
    return " ".join(_WORD.findall(question.lower()))


def question_groups(question: str) -> set[Gram]:
    """Words, pairs and threes of words of a plain question; its beginning and end are words of groups."""
    return grams(["<", *question.split(), ">"], GROUP).keys() - {("<",), (">",)}


def summary(features: Tensor) -> Tensor:
    """(I, N, D_v) features -> (I, 2 * D_v): their mean over the picture, and how much they vary in it."""
    features = features.float()
    return torch.cat([features.mean(dim=1), features.std(dim=1, correction=0)], dim=1)


class KnownAnswers(PictureGuide):
    """A question and (I, N, D_v) features of pictures -> (I, A) how much each answer is expected.

    Kernel ridge regression on the product of two kernels, of questions and of pictures, or networks; where a
    file holds both, their mean.

    Attributes:
        answers: the A answers that are known.
        cells: N, if networks look at a picture's cells; else 0, and N is free.
    """

    PREFIX = "answers."
    COMMAND = "vlm train answers"

    def __init__(self, held: Mapping[str, Tensor], width: int) -> None:
        super().__init__(held, width)
        for name in ("answers", "questions"):
            require(held, name, torch.uint8, (-1,))
        require(held, "sizes", torch.int64, (2,))
        require_positive("sizes", held["sizes"])
        self.answers = unsqueezed(held["answers"])
        self._questions = unsqueezed(held["questions"])
        if max(map(len, self._questions)) > LONGEST:
            raise ValueError(f"a question is longer than {LONGEST} letters")
        pictures, directions = held["sizes"].tolist()
        for name in ("mean", "spread"):
            require(held, name, None, (2 * width,))
        self._shapes = {"turn": (2 * width, directions), "seen": (pictures, directions)}
        self._nets = AnswerNets.of(held, width, len(self.answers))
        self.cells = 0 if self._nets is None else len(self._nets.nets[0].position)
        if self._nets is None or not held.keys().isdisjoint(("pictures", "weigh")):
            require(held, "pictures", torch.int32, (len(self._questions),))
            if not bool(((held["pictures"] >= 0) & (held["pictures"] < pictures)).all()):
                raise ValueError("pictures names one that is not there")
            self._shapes["weigh"] = len(self._questions), len(self.answers)
        for name, shape in self._shapes.items():
            require_quantised(held, name, MATRICES[name], shape)
        require_finite(held)
        require_positive("spread", held["spread"], SMALLEST)

    @classmethod
    def of(
        cls,
        questions: Sequence[str],
        answers: Sequence[str],
        numbers: Mapping[str, Tensor],
        nets: AnswerNets | None = None,
    ) -> KnownAnswers:
        """One with these numbers, rounded to what a file holds.

        Args:
            questions: the M that are known, `plain`.
            answers: the A answers, a line each.
            numbers: `mean` and `spread` of `summary` (2 * D_v,); `turn` (2 * D_v, Q), the directions in which
                pictures are compared; `seen` (P, Q), the pictures. Of the regression, if there is one:
                `pictures` (M,), which picture each question is about, and `weigh` (M, A), what each question
                counts for each answer.
            nets: networks that know the same answers.
        """
        held = {name: numbers[name].float() for name in ("mean", "spread")}
        held |= {"sizes": torch.tensor(numbers["seen"].shape)}
        held |= {"questions": squeezed(list(questions)), "answers": squeezed(list(answers))}
        if "pictures" in numbers:
            held["pictures"] = numbers["pictures"].int()
        for name, bits in MATRICES.items():
            if name in numbers:
                held |= quantise(name, numbers[name], bits)
        if nets is not None:
            held |= nets.tensors()
        return cls(held, numbers["turn"].shape[0] // 2)

    @cached_property
    def _numbers(self) -> dict[str, Tensor]:
        """Unpacked when the first question is asked: who only captions spends nothing on it."""
        numbers = {name: self._held[name].float() for name in ("mean", "spread")}
        for name, (_, columns) in self._shapes.items():
            numbers[name] = dequantise(self._held, name, MATRICES[name], columns)
        if "weigh" in numbers:
            numbers["pictures"] = self._held["pictures"].long()
        return numbers

    @cached_property
    def _words(self) -> QuestionKernel:
        return QuestionKernel(self._questions)

    @torch.inference_mode()
    def __call__(self, question: str, features: Tensor) -> Tensor:
        """(I, N, D_v) features -> (I, A)."""
        known, unit = self._numbers, self._unit(features)
        alike = self._words([plain(question)])
        trust = ((alike.amax() - STRANGE) / (FAMILIAR - STRANGE)).clamp(0, 1)
        expected = []
        if "weigh" in known:
            near = (unit @ known["turn"]) @ known["seen"].T
            expected.append(joint(alike, near[:, known["pictures"]]) @ known["weigh"])
        if self._nets is not None:
            asked, cells = question_groups(plain(question)), standard_cells(features.cpu(), known["mean"])
            expected.append(self._nets(asked, cells, unit))
        return trust * torch.stack(expected).mean(dim=0)

    def compared(self, seen: Seen) -> tuple[Tensor, Tensor]:
        return self._unit(seen.features) @ self._numbers["turn"], self._numbers["seen"]

    def _unit(self, features: Tensor) -> Tensor:
        """(I, N, D_v) -> (I, 2 * D_v) `standardised`."""
        return standardised(summary(features).cpu(), self._numbers["mean"], self._numbers["spread"])

    def expect(self, question: str, features: Tensor) -> list[tuple[str, float]]:
        """The answers expected most of a picture with these (1, N, D_v) features, and how much each is."""
        shares, places = self.finite(self(question, features)[0]).topk(min(MOST, len(self.answers)))
        found = zip(places.tolist(), shares.tolist(), strict=True)
        return [(self.answers[place], share) for place, share in found if share > 0]


def standard_cells(features: Tensor, mean: Tensor) -> Tensor:
    """(I, N, D_v) features -> the same in units of how much they vary in a picture, about what is usual.

    Args:
        mean: (2 * D_v,) of `summary`.
    """
    usual, spread = mean.chunk(2)
    return (features.float() - usual) / usable(spread)


class QuestionKernel:
    """How alike questions are to M known ones, by their word groups: the same 1, nothing in common 0.

    Args:
        known: the M questions, `plain`.
    """

    def __init__(self, known: Sequence[str]) -> None:
        held = [question_groups(question) for question in known]
        self._places: dict[Gram, int] = {}
        columns = [self._places.setdefault(g, len(self._places)) for groups in held for g in groups]
        sizes = torch.tensor([len(groups) for groups in held])
        self._rows = torch.arange(len(held)).repeat_interleave(sizes)
        self._columns = torch.tensor(columns)
        self._lengths = sizes.sqrt()

    def __call__(self, questions: Sequence[str]) -> Tensor:
        """Q plain questions -> (Q, M)."""
        asked = torch.zeros(len(self._places), len(questions))
        lengths = torch.ones(len(questions))
        for place, question in enumerate(questions):
            groups = question_groups(question)
            asked[[self._places[group] for group in groups if group in self._places], place] = 1
            lengths[place] = math.sqrt(len(groups))
        shared = torch.zeros(len(self._lengths), len(questions))
        shared.index_add_(0, self._rows, asked[self._columns])
        cosines = shared.T / lengths[:, None] / self._lengths
        return (SHARPNESS * cosines).expm1() / math.expm1(SHARPNESS)


def standardised(summaries: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """(I, 2 * D_v) -> the same, means and spreads each of one length; a dot product of two is a cosine."""
    halves = ((summaries - mean) / spread).chunk(2, dim=1)
    return torch.cat([F.normalize(half, dim=1) for half in halves], dim=1) / math.sqrt(2)


def joint(questions: Tensor, pictures: Tensor) -> Tensor:
    """The kernel of questions about pictures, from how alike questions are and how alike their pictures."""
    return pictures.mul(SEEING).add_(1).mul_(questions).div_(1 + SEEING)


class AnswerGuide:
    """What comes to the log-probabilities of an answer's next tokens.

    Args:
        expected: token ids of answers with their end, and how much each is expected.
    """

    def __init__(self, expected: Sequence[tuple[Sequence[int], float]]) -> None:
        self._paths = [(list(ids), math.log1p(share / NOTHING)) for ids, share in expected]

    def __call__(self, said: Sequence[int]) -> dict[int, float]:
        """After these tokens: by how much which next ones rise, each by the best answer that it leads to."""
        rises: dict[int, float] = {}
        for path, rise in self._paths:
            if len(path) > len(said) and path[: len(said)] == list(said):
                rises[path[len(said)]] = max(rise, rises.get(path[len(said)], 0.0))
        return rises
