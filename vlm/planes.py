"""Matrices of half-precision numbers, a sixth smaller on disk and the same to the last bit.

The upper byte of a float16 holds its sign, its exponent and two bits more. Weights of one matrix are of like
size, so these bytes repeat and compress by a third; the lower bytes are noise and stay as they are.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from torch import Tensor

UPPER, LOWER = ".upper", ".lower"
"""End the names of a matrix's two parts: compressed bytes, and (rows, columns) of bytes."""
LEAST = 4096
"""Numbers of the smallest matrix that is worth it."""


def split(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with every large float16 matrix in two parts."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float16 and tensor.dim() == 2 and tensor.numel() >= LEAST:
            lower, upper = tensor.contiguous().view(torch.uint8).view(*tensor.shape, 2).unbind(dim=2)
            # Huffman codes alone: no longer runs repeat, and to look for some takes ten times as long.
            squeeze = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
            squeezed = squeeze.compress(upper.contiguous().numpy().tobytes()) + squeeze.flush()
            found[name + UPPER] = torch.frombuffer(bytearray(squeezed), dtype=torch.uint8)
            found[name + LOWER] = lower.contiguous()
        else:
            found[name] = tensor
    return found


def joined(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose matrices are whole again; the dictionary is emptied, so that both are never held at once.

    Raises:
        ValueError: the parts of one do not fit together.
    """
    found: dict[str, Tensor] = {}
    for name in [name for name in tensors if not name.endswith(UPPER)]:
        tensor = tensors.pop(name)
        if name.endswith(LOWER):
            whole = name.removesuffix(LOWER)
            found[whole] = _joined(whole, tensors.pop(whole + UPPER, None), tensor)
        else:
            found[name] = tensor
    if tensors:
        raise ValueError(f"{min(tensors)} has no other half")
    return found


def _joined(name: str, upper: Tensor | None, lower: Tensor) -> Tensor:
    if upper is None or upper.dtype != torch.uint8 or lower.dtype != torch.uint8 or lower.dim() != 2:
        raise ValueError(f"{name}{LOWER} has no other half")
    inflate = zlib.decompressobj()
    try:
        # No more than is wanted: what a file claims to hold may be a thousand times its size.
        content = inflate.decompress(upper.numpy().tobytes(), lower.numel() + 1)
    except zlib.error as problem:
        raise ValueError(f"{name}{UPPER} is damaged: {problem}") from problem
    if len(content) != lower.numel():
        raise ValueError(f"{name}{UPPER} holds {len(content)} bytes, {name}{LOWER} {lower.numel()}")
    high = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(lower.shape)
    return torch.stack([lower, high], dim=2).view(torch.float16)[:, :, 0]
