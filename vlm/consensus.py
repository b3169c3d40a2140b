"""What captions of a picture will say, guessed from its frozen features: it guides the beams of captions.

CIDEr (Vedantam et al. 2015) measures by how much a caption agrees with what people say of a picture, as a
cosine of tf-idf vectors of word groups. Which vector people will write can be expected from the features: a
small network learns that in a minute, and generalises where an adapter of many millions of weights has
learnt its pictures by heart. Beams then look for words that are both likely and expected, as Devlin et al.
(2015) choose among captions by those of the nearest pictures; no caption of another picture is kept.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import WeightsError
from vlm.grams import ORDER, Gram, grams

PREFIX = "consensus."
"""Begins the names of its tensors in `adapter.safetensors`."""
SURE = 0.7
"""Where the encoder's classifier gives one label this probability, its word counts and no other is expected:
what people usually say would make a cat a dog, where cats were hardly ever captioned."""
HIDDEN, INNER, RANK = 256, 512, 128
BLOCK = 64
"""Numbers of a matrix that share a step on disk."""
MOST = 1 << 20
"""Bytes that the word groups may take, unpacked."""
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")


def word_groups(text: str) -> Counter[Gram]:
    """How often every group of one to four adjacent words stands in a text, case and marks aside."""
    return grams(_WORD.findall(text.lower()))


class Consensus(nn.Module):
    """(I, D_v) mean features -> (I, G) how much each word group is expected in a picture's captions.

    Args:
        groups: the G word groups that are told apart.
        rarity: (G,) of each, ln(pictures / pictures whose captions hold it).
        width: D_v of the encoder's features.

    Attributes:
        mean, spread: (D_v,) of the features that it was fitted to.
        scale: length of the expected vectors, which the groups' directions do not say.
    """

    mean: Tensor
    spread: Tensor
    scale: Tensor

    def __init__(self, groups: Sequence[Gram], rarity: Tensor, width: int) -> None:
        super().__init__()
        self.groups = {group: i for i, group in enumerate(groups)}
        self.rarity: list[float] = rarity.tolist()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.register_buffer("scale", torch.ones(()))
        self.narrow = nn.Linear(width, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.widen = nn.Linear(HIDDEN, INNER)
        self.turn = nn.Linear(INNER, RANK)
        self.say = nn.Linear(RANK, len(groups))

    def forward(self, pooled: Tensor) -> Tensor:
        seen = (pooled - self.mean) / self.spread
        said: Tensor = self.say(self.turn(F.gelu(self.widen(self.norm(self.narrow(seen))))))
        return said

    @torch.inference_mode()
    def expect(self, features: Tensor) -> Expectation:
        """What captions of the picture with these (1, N, D_v) features will say."""
        said = self(features.float().mean(dim=1).to(self.mean.device))[0]
        return Expectation(self, (F.normalize(said, dim=0) * self.scale).tolist())

    def tensors(self) -> dict[str, Tensor]:
        """Everything it is, by names that begin with `PREFIX`; matrices in 4 bits a number."""
        state = {name: tensor.detach().cpu() for name, tensor in self.state_dict().items()}
        found: dict[str, Tensor] = {}
        for name, tensor in state.items():
            if tensor.dim() == 2:
                found[name], found[f"{name}.step"] = _packed(tensor)
            else:
                found[name] = tensor.half()
        words = "\n".join(" ".join(group) for group in self.groups)
        found["groups"] = torch.frombuffer(bytearray(zlib.compress(words.encode(), 9)), dtype=torch.uint8)
        found["rarity"] = torch.tensor(self.rarity).half()
        return {f"{PREFIX}{name}": tensor.contiguous() for name, tensor in found.items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int) -> Consensus:
        """The one whose `tensors` these are; others may stand beside them.

        Raises:
            WeightsError: one is missing or of another shape.
        """
        own = {name.removeprefix(PREFIX): t for name, t in tensors.items() if name.startswith(PREFIX)}
        try:
            inflate = zlib.decompressobj()
            words = inflate.decompress(bytes(own.pop("groups").tolist()), MOST).decode()
            groups = [tuple(line.split()) for line in words.split("\n")]
            made = cls(groups, own.pop("rarity").float(), width)
            for name, tensor in made.state_dict().items():
                if tensor.dim() == 2:
                    own[name] = _unpacked(own[name], own.pop(f"{name}.step"), tensor.shape)
            made.load_state_dict(own)
            if len(made.rarity) != len(groups):
                raise ValueError(f"{len(groups)} word groups with {len(made.rarity)} rarities")
            if not all(tensor.isfinite().all() for tensor in made.state_dict().values()):
                raise ValueError("a number is not finite")
        except (KeyError, TypeError, ValueError, RuntimeError, zlib.error) as problem:
            reason = " ".join(str(problem).split())
            raise WeightsError(f"`{PREFIX}*` of adapter.safetensors is damaged: {reason}") from problem
        return made.eval().requires_grad_(False)


def _packed(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(n, BLOCK / 2) uint8 pairs of 4-bit numbers, (n, 1) float16 steps; the end is filled up with zeros."""
    blocks = F.pad(matrix.flatten(), (0, -matrix.numel() % BLOCK)).view(-1, BLOCK)
    step = (blocks.abs().amax(dim=1, keepdim=True) / 7).clamp(min=1e-7).half()
    levels = (blocks / step.float()).round().clamp(-7, 7).to(torch.int16) + 8
    return (levels[:, ::2] * 16 + levels[:, 1::2]).to(torch.uint8), step


def _unpacked(pairs: Tensor, step: Tensor, shape: torch.Size) -> Tensor:
    levels = torch.stack([pairs >> 4, pairs & 15], dim=2).flatten(1).float() - 8
    return (levels * step.float()).flatten()[: shape.numel()].view(shape)


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
