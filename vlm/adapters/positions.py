"""Positions of an adapter on another grid, for pictures of another size.

All that an adapter knows of the encoder's grid is a learned position for each cell; those of a finer grid lie
between (as Dosovitskiy et al. 2021 carry vision transformers over to larger pictures).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.errors import WeightsError


def regrid(tensors: Mapping[str, Tensor], before: int, tokens: int) -> dict[str, Tensor]:
    """An adapter's tensors, its positions brought from `before` image tokens to `tokens`.

    Raises:
        WeightsError: the two are no square grids.
    """
    return {
        name: at_grid(tensor, tokens)
        if name.split(".")[-1] == "position" and len(tensor) == before
        else tensor
        for name, tensor in tensors.items()
    }


def at_grid(positions: Tensor, tokens: int) -> Tensor:
    """(N, W) positions of one grid -> (`tokens`, W) of another; those of class tokens, first, stay.

    Raises:
        WeightsError: one of the two is no square grid with as many class tokens before it.
    """
    old, new = math.isqrt(len(positions)), math.isqrt(tokens)
    first = len(positions) - old * old
    if tokens - new * new != first:
        raise WeightsError(f"{len(positions)} tokens cannot be brought to {tokens}: they are no square grids")
    grid = positions[first:].float().T.reshape(1, -1, old, old)
    resized = F.interpolate(grid, size=(new, new), mode="bilinear", antialias=new < old)
    cells = resized.flatten(2)[0].T.to(positions.dtype)
    return torch.cat([positions[:first], cells]).contiguous()
