"""What every adapter offers to the model: encode once per image, prepare once per batch, condition each call.

Shapes: I images in a batch, N encoder tokens, D_v encoder width, L latents, W latent width, B rows,
M images in the longest row, T text tokens, D language width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.language import BeforeLayer


@dataclass(frozen=True)
class ImageLayout:
    """Where a batch's images stand.

    Attributes:
        image: (B, M) index into the batch's images, -1 where a row has fewer.
        group: (B, M) group of adjacent images that each belongs to.
        place: (B, M) index of the image inside its group.
    """

    image: Tensor
    group: Tensor
    place: Tensor

    def visible(self, group_of_token: Tensor) -> Tensor:
        """(B, T) group that each token sees (-1: none) -> (B, T, M) bool."""
        same = group_of_token[:, :, None] == self.group[:, None, :]
        return same & (self.image >= 0)[:, None, :] & (group_of_token >= 0)[:, :, None]

    def select(self, rows: Tensor) -> ImageLayout:
        """The layout of the chosen rows; their image indices are no longer meaningful."""
        return ImageLayout(self.image[rows], self.group[rows], self.place[rows])

    @staticmethod
    def join(parts: Sequence[ImageLayout]) -> ImageLayout:
        """The rows of several layouts under one another."""
        most = max(part.image.shape[1] for part in parts)

        def pad(x: Tensor, value: int) -> Tensor:
            return F.pad(x, (0, most - x.shape[1]), value=value)

        return ImageLayout(
            torch.cat([pad(part.image, -1) for part in parts]),
            torch.cat([pad(part.group, -1) for part in parts]),
            torch.cat([pad(part.place, 0) for part in parts]),
        )


class Conditioning:
    """What the language model may know of a batch's images, computed once and passed to every call.

    An adapter's own conditioning is a tuple of tensors, rows first, with the images' places along the
    axis `along`; what does not depend on the kind of adapter is done here.
    """

    along: int
    tensors: tuple[Tensor, ...]

    def select(self, rows: Tensor) -> Self:
        """The conditioning of the chosen rows (beams repeat a row), in that order."""
        return self.of(tuple(tensor[rows] for tensor in self.tensors))

    def join(self, others: Sequence[Self]) -> Self:
        """The rows of several conditionings under one another, padded to the one with most images."""
        parts = [self, *others]
        joined = []
        for index in range(len(self.tensors)):
            most = max(part.tensors[index].shape[self.along] for part in parts)
            padded = []
            for part in parts:
                tensor = part.tensors[index]
                room = [0, 0] * (tensor.ndim - 1 - self.along) + [0, most - tensor.shape[self.along]]
                padded.append(F.pad(tensor, room))
            joined.append(torch.cat(padded))
        return self.of(tuple(joined))

    def of(self, tensors: tuple[Tensor, ...]) -> Self:
        """The same kind of conditioning around other tensors."""
        return replace(self, tensors=tensors)  # type: ignore[type-var]


class Adapter(nn.Module):
    """The protocol; see the module's text for the shapes."""

    soft_tokens: int = 0
    """Places that an image takes in the text (0 when it is seen by cross-attention alone)."""
    question_aware: bool = False
    """Whether `encode` wants the question's words."""
    at_layers: tuple[int, ...] = ()
    """Language-model layers that `before_layer` acts in front of."""
    max_group: int = 1 << 20
    """Images that may stand side by side."""

    @abstractmethod
    def __init__(self, config: Any, *, features: int, positions: int, hidden: int, num_layers: int) -> None:
        super().__init__()

    @abstractmethod
    def encode(
        self, features: Tensor, question: Tensor | None = None, question_mask: Tensor | None = None
    ) -> Tensor:
        """(I, N, D_v) [and (I, Q, D) word embeddings with their (I, Q) mask] -> (I, L, W) latents."""

    @abstractmethod
    def prepare(self, latents: Tensor, layout: ImageLayout) -> Conditioning:
        """(I, L, W) latents laid out in B rows; done once for any number of decoding steps."""

    def embed(self, embeddings: Tensor, soft_index: Tensor, conditioning: Conditioning) -> Tensor:
        """Writes soft tokens into (B, T, D) where `soft_index` (B, T) is not -1 (it counts m * L + l)."""
        return embeddings

    def before_layer(self, visible: Tensor, conditioning: Conditioning) -> BeforeLayer | None:
        """What acts in front of the `at_layers`, given which images (B, T, M) each token sees."""
        return None

    def statistics(self) -> dict[str, float]:
        """Numbers worth logging while training."""
        return {}


def drop_tokens(features: Tensor, probability: float, training: bool) -> Tensor:
    """Zeroes whole image tokens: (I, N, W) -> (I, N, W)."""
    if not training or probability == 0:
        return features
    keep = torch.rand(features.shape[:2], device=features.device) >= probability
    return features * keep[:, :, None].to(features.dtype)


def zero_linear_init(module: nn.Module, std: float = 0.02) -> None:
    """Small normal weights and zero biases for every linear layer and embedding below `module`."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
