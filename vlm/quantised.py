"""Matrices in 4 or 8 bits a number, every 64 numbers of a row with a step (Dettmers et al. 2022).

A matrix NAME of (R, C) numbers is kept as NAME, (R, C) uint8 levels (of 4 bits two in a byte, the first in
its upper half), and NAME.step, (R, ceil(C / 64)) float16. A number is (level - 2 ** (bits - 1)) * step.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64
STEP = ".step"
FRACTIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LEAST = 4096
"""Numbers of the smallest matrix of an adapter that is worth it."""


def quantise(name: str, matrix: Tensor, bits: int) -> dict[str, Tensor]:
    """A (R, C) matrix of fractions in 4 or 8 bits a number, to within half a step.

    Where all of a block is below 1e-4 the step's own rounding to float16 comes to that.
    """
    top, (rows, columns) = 2 ** (bits - 1) - 1, matrix.shape
    blocks = F.pad(matrix.float(), (0, -columns % BLOCK)).view(rows, -(-columns // BLOCK), BLOCK)
    step = (blocks.abs().amax(dim=2) / top).clamp(min=1e-7).half()
    levels = (blocks / step.float()[:, :, None]).round().clamp(-top, top).to(torch.int16) + top + 1
    levels = levels.flatten(1)
    if bits == 4:
        levels, columns = levels[:, ::2] * 16 + levels[:, 1::2], -(-columns // 2)
    return {name: levels[:, :columns].to(torch.uint8).contiguous(), name + STEP: step}


def dequantise(held: Mapping[str, Tensor], name: str, bits: int, columns: int) -> Tensor:
    """The (R, C) float32 matrix that `quantise` was given."""
    levels = held[name]
    if bits == 4:
        levels = torch.stack([levels >> 4, levels & 15], dim=2).flatten(1)[:, :columns]
    # No row is filled up here: a file of narrow matrices would take a hundred times its size.
    steps = held[name + STEP].float()[:, torch.arange(columns) // BLOCK]
    return steps.mul_(levels.float().sub_(2 ** (bits - 1)))


def require_quantised(held: Mapping[str, Tensor], name: str, bits: int, shape: tuple[int, int]) -> None:
    """Raises:
    KeyError, ValueError: there is no such matrix of this shape and number of bits.
    """
    rows, columns = shape
    levels, step = held[name], held[name + STEP]
    if levels.shape != (rows, -(-columns * bits // 8)) or levels.dtype != torch.uint8:
        raise ValueError(f"{name} is no {shape} of {bits} bits")
    if step.shape != (rows, -(-columns // BLOCK)) or step.dtype != torch.float16:
        raise ValueError(f"{name}{STEP} is no steps of {shape}")


def quantise_large(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with every large matrix of fractions in 8 bits; those that are so already stay."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        fractions = tensor.is_floating_point() and not name.endswith(STEP)
        if fractions and tensor.dim() == 2 and tensor.numel() >= LEAST:
            found |= quantise(name, tensor, bits=8)
        else:
            found[name] = tensor
    return found


def dequantise_all(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose matrices in 8 bits are float32 again.

    Raises:
        ValueError: levels and steps of one do not fit together.
    """
    steps = {name for name in stored if name.endswith(STEP)}
    found = {name: tensor for name, tensor in stored.items() if name not in steps}
    for name in (name.removesuffix(STEP) for name in sorted(steps)):
        levels = found.get(name)
        if levels is None or levels.dim() != 2:
            raise ValueError(f"{name}{STEP} has no levels")
        columns = levels.shape[1]
        require_quantised(stored, name, 8, (len(levels), columns))
        found[name] = dequantise(stored, name, 8, columns)
    if bare := sorted(name for name, tensor in found.items() if tensor.dtype not in FRACTIONS):
        raise ValueError(f"{bare[0]} is of type {found[bare[0]].dtype} and has no steps")
    return found
