"""What captions of a picture will say, guessed from its frozen features: it guides the beams of captions.

CIDEr (Vedantam et al. 2015) measures by how much a caption agrees with what people say of a picture, as a
cosine of tf-idf vectors of word groups. Which vector people will write can be expected from the features:
kernel ridge regression does so in seconds, and generalises where an adapter of many millions of weights has
learnt its pictures by heart. Beams then look for words that are both likely and expected, as Devlin et al.
(2015) choose among captions by those of the nearest pictures; no caption of another picture is kept.
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

from vlm.grams import ORDER, Gram, grams
from vlm.guide import (
    SMALLEST,
    Guide,
    packed,
    require,
    require_finite,
    require_packed,
    require_positive,
    squeezed,
    unpacked,
    unsqueezed,
)

SURE = 0.7
"""Where the encoder's classifier gives one label this probability, its word counts and no other is expected:
what people usually say would make a cat a dog, where cats were hardly ever captioned."""
MATRICES = {"turn": 4, "seen": 8, "seen.rest": 4, "weigh": 8, "say": 8, "say.rest": 4}
"""Bits of a number on disk: directions that matter most, and sums over many pictures, would not bear 4."""
FIRST = 64
"""Directions of `seen` and of `say` that matter most."""
SHARPNESS = 4.0
"""Pictures are alike by exp(SHARPNESS * cosine of their mean features) - 1, as a share of the largest."""
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def word_groups(text: str) -> Counter[Gram]:
    """How often every group of one to four adjacent words stands in a text, case and marks aside."""
    return grams(_WORD.findall(text.lower()))


class Consensus(Guide):
    """(I, D_v) mean features -> (I, G) how much each word group is expected in a picture's captions.

    Kernel ridge regression: a picture's captions are expected to say what was said of those that it is like,
    and more of the liker ones.

    Attributes:
        groups: the G word groups that are told apart, with their places.
        rarity: of each, ln(pictures / pictures whose captions hold it).
    """

    PREFIX = "consensus."
    COMMAND = "vlm train consensus"

    def __init__(self, held: Mapping[str, Tensor], width: int) -> None:
        super().__init__(held, width)
        require(held, "groups", torch.uint8, (-1,))
        require(held, "sizes", torch.int64, (3,))
        require_positive("sizes", held["sizes"])
        self.groups = {tuple(line.split()): i for i, line in enumerate(unsqueezed(held["groups"]))}
        count, (directions, pictures, rank) = len(self.groups), held["sizes"].tolist()
        wide, high = min(FIRST, directions), min(FIRST, rank)
        self._shapes = {
            "turn": (width, directions),
            "seen": (pictures, wide),
            "seen.rest": (pictures, directions - wide),
            "weigh": (pictures, rank),
            "say": (high, count),
            "say.rest": (rank - high, count),
        }
        vectors = {"mean": (width,), "spread": (width,), "usual": (count,), "rarity": (count,)}
        for name, size in {**vectors, "scale": ()}.items():
            require(held, name, None, size)
        for name, shape in self._shapes.items():
            require_packed(held, name, MATRICES[name], shape)
        require_finite(held)
        require_positive("spread", held["spread"], SMALLEST)
        self.rarity: list[float] = held["rarity"].float().tolist()

    @classmethod
    def of(cls, groups: Sequence[Gram], numbers: Mapping[str, Tensor]) -> Consensus:
        """One with these numbers, rounded to what a file holds.

        Args:
            numbers: `rarity` and `usual`, the vectors' mean (G,); `mean` and `spread` of the features (D_v,);
                `turn` (D_v, Q), the directions in which pictures are compared; `seen` (M, Q), the pictures
                that are known; `weigh` (M, R) and `say` (R, G), what is said of pictures like each beyond
                what is usual; `scale`, the length of the expected vectors.
        """
        held = {name: numbers[name].float() for name in ("mean", "spread")}
        held |= {name: numbers[name].half() for name in ("usual", "rarity", "scale")}
        seen, say = numbers["seen"], numbers["say"]
        parts = {
            "turn": numbers["turn"],
            "weigh": numbers["weigh"],
            "seen": seen[:, :FIRST],
            "say": say[:FIRST],
        }
        parts |= {"seen.rest": seen[:, FIRST:], "say.rest": say[FIRST:]}
        for name, matrix in parts.items():
            held |= packed(name, matrix, MATRICES[name])
        pictures, rank = numbers["weigh"].shape
        held["sizes"] = torch.tensor([numbers["turn"].shape[1], pictures, rank])
        held["groups"] = squeezed([" ".join(group) for group in groups])
        return cls(held, numbers["turn"].shape[0])

    @cached_property
    def _numbers(self) -> dict[str, Tensor]:
        """Unpacked when the first caption is wanted: who only asks questions spends nothing on it."""
        numbers = {name: self._held[name].float() for name in ("mean", "spread", "usual", "scale")}
        for name, bits in MATRICES.items():
            numbers[name] = unpacked(self._held, name, bits, self._shapes[name])
        numbers["seen"] = torch.cat([numbers["seen"], numbers.pop("seen.rest")], dim=1)
        numbers["say"] = torch.cat([numbers["say"], numbers.pop("say.rest")])
        return numbers

    @torch.inference_mode()
    def __call__(self, pooled: Tensor) -> Tensor:
        """(I, D_v) mean features -> (I, G)."""
        known = self._numbers
        unit = F.normalize((pooled - known["mean"]) / known["spread"], dim=1)
        near = likeness(unit @ known["turn"], known["seen"])
        said: Tensor = near @ known["weigh"] @ known["say"] + known["usual"]
        return said

    def expect(self, features: Tensor) -> Expectation:
        """What captions of the picture with these (1, N, D_v) features will say."""
        said = self(features.float().mean(dim=1).cpu())[0]
        return Expectation(self, (F.normalize(said, dim=0) * self._numbers["scale"]).tolist())

    def scaled(self, scale: float) -> Consensus:
        """The same, but with expected vectors of that length."""
        width = len(self._held["mean"])
        return Consensus(self._held | {"scale": torch.tensor(scale).half()}, width)


def likeness(some: Tensor, others: Tensor) -> Tensor:
    """(I, Q) and (M, Q) of unit vectors -> (I, M) how alike pictures are: the same 1, nothing in common 0."""
    return (SHARPNESS * (some @ others.T)).expm1() / math.expm1(SHARPNESS)


class Expectation:
    """What captions of one picture will say.

    Args:
        weights: of the consensus' word groups.
    """

    def __init__(self, consensus: Consensus, weights: Sequence[float]) -> None:
        self.consensus, self.weights = consensus, weights
        self._known: dict[str, float] = {}

    def __call__(self, text: str) -> float:
        """The CIDEr that a caption, or its beginning, is expected to reach; 1 is 100 %.

        Word groups that the consensus does not tell apart count neither for nor against it: to hold them
        against it would make captions short and plain.
        """
        if text not in self._known:
            self._known[text] = self._agreement(text)
        return self._known[text]

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
