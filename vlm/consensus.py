"""What captions of a picture will say, guessed from what is seen in it: it guides the beams of captions.

CIDEr (Vedantam et al. 2015) measures by how much a caption agrees with what people say of a picture, as a
cosine of tf-idf vectors of word groups. Which vector people will write can be expected from the features and
from what the encoder's classifier calls a picture: kernel ridge regression does so in seconds, and
generalises where an adapter of many millions of weights has learnt its pictures by heart. Beams then look for
words that are both likely and expected, as Devlin et al. (2015) choose among captions by those of the nearest
pictures; no caption of another picture is kept.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.features import Seen
from vlm.grams import ORDER, Gram, grams
from vlm.guide import (
    SMALLEST,
    PictureGuide,
    require,
    require_finite,
    require_positive,
    squeezed,
    unsqueezed,
)
from vlm.kinds import naming
from vlm.quantised import dequantise, quantise, require_quantised

SURE, NAMED = 0.7, 0.25
"""Where the encoder's classifier gives a label this probability, a caption that names it is worth so much
more CIDEr: what people usually say would make a cat a dog, where cats were hardly ever captioned."""
MATRICES = {"turn": 4, "seen": 8, "seen.rest": 4, "weigh": 8, "say": 8, "say.rest": 4}
"""Bits of a number on disk: directions that matter most, and sums over many pictures, would not bear 4."""
FIRST = 64
"""Directions of `seen` and of `say` that matter most."""
SHARPNESS = 4.0
"""Pictures are alike by exp(SHARPNESS * cosine of their portraits) - 1, as a share of the largest."""
SPREAD = 6.0
"""Words by which CIDEr-D lets a caption be longer or shorter than another, as a standard deviation."""
LONGEST = 64
"""Words of a caption that are told apart: no more than so many."""
CALLED = 0.5
"""What the classifier's probabilities count in a portrait, beside the features."""
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def word_groups(text: str) -> Counter[Gram]:
    """How often every group of one to four adjacent words stands in a text, case and marks aside."""
    return grams(_WORD.findall(text.lower()))


def word_count(text: str) -> int:
    """Words of a text, as `word_groups` takes them."""
    return len(_WORD.findall(text.lower()))


class Consensus(PictureGuide):
    """What I pictures show -> (I, G) how much each word group is expected in their captions.

    Kernel ridge regression: a picture's captions are expected to say what was said of those that it is like,
    and more of the liker ones.

    Attributes:
        groups: the G word groups that are told apart, with their places.
        rarity: of each, ln(pictures / pictures whose captions hold it).
        labels: C, of the encoder's classifier; 0 where it has none.
    """

    PREFIX = "consensus."
    COMMAND = "vlm train consensus"

    def __init__(self, held: Mapping[str, Tensor], width: int) -> None:
        super().__init__(held, width)
        require(held, "groups", torch.uint8, (-1,))
        require(held, "sizes", torch.int64, (3,))
        require_positive("sizes", held["sizes"])
        lines = unsqueezed(held["groups"])
        self.groups = {tuple(line.split()): i for i, line in enumerate(lines)}
        if len(self.groups) < len(lines):
            raise ValueError("a word group stands twice")
        count, (directions, pictures, rank) = len(self.groups), held["sizes"].tolist()
        wide, high = min(FIRST, directions), min(FIRST, rank)
        require(held, "named", None, (-1,))
        self.labels = len(held["named"])
        self._shapes = {
            "turn": (width + self.labels, directions),
            "seen": (pictures, wide),
            "seen.rest": (pictures, directions - wide),
            "weigh": (pictures, rank),
            "say": (high, count),
            "say.rest": (rank - high, count),
        }
        require(held, "scale", None, ())
        vectors = {"mean": width, "spread": width, "usual": count, "rarity": count, "lengths": LONGEST + 1}
        for name, size in vectors.items():
            require(held, name, None, (size,))
        for name, shape in self._shapes.items():
            require_quantised(held, name, MATRICES[name], shape)
        require_finite(held)
        require_positive("spread", held["spread"], SMALLEST)
        require_positive("lengths", held["lengths"], 0.0)
        require_positive("lengths", held["lengths"].sum(), 0.5)
        self.rarity: list[float] = held["rarity"].float().tolist()
        self._fits = fitting(held["lengths"].float()).tolist()

    @classmethod
    def of(cls, groups: Sequence[Gram], numbers: Mapping[str, Tensor]) -> Consensus:
        """One with these numbers, rounded to what a file holds.

        Args:
            numbers: `rarity` and `usual`, the vectors' mean (G,); `lengths` (LONGEST + 1,), the shares of
                captions of so many words; `mean` and `spread` of the features (D_v,)
                and `named` (C,) as `portrait` takes them; `turn` (D_v + C, Q), the directions in which
                portraits are compared; `seen` (M, Q), the pictures that are known; `weigh` (M, R) and `say`
                (R, G), what is said of pictures like each beyond what is usual; `scale`, the length of the
                expected vectors.
        """
        held = {name: numbers[name].float() for name in ("mean", "spread", "named")}
        held |= {name: numbers[name].half() for name in ("usual", "rarity", "lengths", "scale")}
        seen, say = numbers["seen"], numbers["say"]
        parts = {
            "turn": numbers["turn"],
            "weigh": numbers["weigh"],
            "seen": seen[:, :FIRST],
            "say": say[:FIRST],
        }
        parts |= {"seen.rest": seen[:, FIRST:], "say.rest": say[FIRST:]}
        for name, matrix in parts.items():
            held |= quantise(name, matrix, MATRICES[name])
        pictures, rank = numbers["weigh"].shape
        held["sizes"] = torch.tensor([numbers["turn"].shape[1], pictures, rank])
        held["groups"] = squeezed([" ".join(group) for group in groups])
        return cls(held, len(numbers["mean"]))

    @cached_property
    def _numbers(self) -> dict[str, Tensor]:
        """Unpacked when the first caption is wanted: who only asks questions spends nothing on it."""
        numbers = {name: self._held[name].float() for name in ("mean", "spread", "named", "usual", "scale")}
        for name, bits in MATRICES.items():
            numbers[name] = dequantise(self._held, name, bits, self._shapes[name][1])
        numbers["seen"] = torch.cat([numbers["seen"], numbers.pop("seen.rest")], dim=1)
        numbers["say"] = torch.cat([numbers["say"], numbers.pop("say.rest")])
        return numbers

    @torch.inference_mode()
    def __call__(self, pooled: Tensor, scores: Tensor) -> Tensor:
        """(I, D_v) mean features and (I, C) label probabilities -> (I, G)."""
        known = self._numbers
        near = likeness(portrait(pooled, scores, known) @ known["turn"], known["seen"])
        said: Tensor = near @ known["weigh"] @ known["say"] + known["usual"]
        return said

    def compared(self, seen: Seen) -> tuple[Tensor, Tensor]:
        known = self._numbers
        return portrait(*_shown(seen), known) @ known["turn"], known["seen"]

    def expect(self, seen: Seen, labels: Sequence[str] = ()) -> Expectation:
        """What captions of the one picture seen will say.

        Args:
            labels: what the encoder's classifier calls its C kinds; nothing is named without.
        """
        sure = bool(labels) and float(seen.scores.amax()) >= SURE
        name = naming(labels[int(seen.scores[0].argmax())]) if sure else None
        said = self(*_shown(seen))[0]
        weights = self.finite(F.normalize(said, dim=0) * self._numbers["scale"])
        return Expectation(self, weights.tolist(), name)

    def fits(self, words: int) -> float:
        """How well a caption of so many words fits the lengths of others, 1 at best."""
        found: float = self._fits[min(words, LONGEST)]
        return found

    def scaled(self, scale: float) -> Consensus:
        """The same, but with expected vectors of that length."""
        width = len(self._held["mean"])
        return Consensus(self._held | {"scale": torch.tensor(scale).half()}, width)


def _shown(seen: Seen) -> tuple[Tensor, Tensor]:
    """(I, D_v) mean features and (I, C) label probabilities."""
    return seen.features.float().mean(dim=1).cpu(), seen.scores.float().cpu()


def portrait(pooled: Tensor, scores: Tensor, usual: Mapping[str, Tensor]) -> Tensor:
    """What pictures are compared by: what is seen, and what the classifier calls it, against the usual.

    Roots of probabilities tell what a label is taken for beside the likeliest (Hellinger's distance).

    Args:
        pooled: (I, D_v) mean features.
        scores: (I, C) probabilities of the encoder's labels; C is 0 where it has none.
        usual: `mean` and `spread` of features (D_v,), `named` (C,) mean roots of probabilities.

    Returns:
        (I, D_v + C) vectors of length one.
    """
    seen = F.normalize((pooled - usual["mean"]) / usual["spread"], dim=1)
    if not scores.shape[1]:
        return seen
    named = F.normalize(scores.sqrt() - usual["named"], dim=1)
    return torch.cat([seen, math.sqrt(CALLED) * named], dim=1) / math.sqrt(1 + CALLED)


def fitting(lengths: Tensor) -> Tensor:
    """How well captions fit others by their length alone: CIDEr-D's penalty, expected and against the least.

    Args:
        lengths: (L,) shares of captions of 0 to L - 1 words.

    Returns:
        (L,) of captions of so many words; 1 is the length that fits best.
    """
    words = torch.arange(len(lengths))
    alike = torch.exp(-((words[:, None] - words) ** 2) / (2 * SPREAD**2)) @ lengths
    return alike / alike.max()


def likeness(some: Tensor, others: Tensor) -> Tensor:
    """(I, Q) and (M, Q) of unit vectors -> (I, M) how alike pictures are: the same 1, nothing in common 0."""
    return (SHARPNESS * (some @ others.T)).expm1() / math.expm1(SHARPNESS)


class Expectation:
    """What captions of one picture will say.

    Args:
        weights: of the consensus' word groups.
        name: finds what shall be named.
    """

    def __init__(
        self, consensus: Consensus, weights: Sequence[float], name: re.Pattern[str] | None = None
    ) -> None:
        self.consensus, self.weights, self.name = consensus, weights, name
        self._known: dict[str, tuple[float, float]] = {}

    def __call__(self, text: str, whole: bool = False) -> float:
        """The CIDEr that a whole caption, or its beginning, is expected to reach; 1 is 100 %.

        What names what shall be named is worth `NAMED` more. Word groups that the consensus does not tell
        apart count neither for nor against a caption: to hold them against it would make it short and plain.
        Of a beginning nobody knows the length.
        """
        if text not in self._known:
            named = self.name is not None and bool(self.name.search(text.lower()))
            self._known[text] = self._agreement(text), NAMED * named
        agreement, more = self._known[text]
        return agreement * (self.consensus.fits(word_count(text)) if whole else 1.0) + more

    def _agreement(self, text: str) -> float:
        groups, rarity = self.consensus.groups, self.consensus.rarity
        dots, squares = [0.0] * ORDER, [0.0] * ORDER
        for group, count in word_groups(text).items():
            if (place := groups.get(group)) is not None:
                weight = count * rarity[place]
                squares[len(group) - 1] += weight * weight
                dots[len(group) - 1] += weight * self.weights[place]
        cosines = [dot / math.sqrt(square) for dot, square in zip(dots, squares, strict=True) if square]
        return 10 * sum(cosines) / ORDER
