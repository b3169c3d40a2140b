"""What guides an adapter, kept beside its own tensors: quantised numbers, compressed texts."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import ClassVar, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.errors import WeightsError
from vlm.features import Seen
from vlm.quantised import dequantise, quantise, require_quantised

BITS = 8
"""Of a number of a network's matrices on disk."""
Net = TypeVar("Net", bound=nn.Module)

MOST = 4 << 20
"""Bytes that a text may take, unpacked."""
SMALLEST = 1e-9
"""The least spread of a feature: what is divided by less would no longer be a number."""
SAME = 0.95
"""Cosine from which a picture is one that a guide was fitted to: rounding leaves those 0.97, and others
(`dev` of Flickr8k and DAQUAR) have 0.91 at most."""


class Guide:
    """What was fitted once and is kept in a file; a subclass checks all that it is given.

    Args:
        held: its numbers, as `tensors` gives them without `PREFIX`.
        width: D_v of the encoder's features.

    Attributes:
        PREFIX: begins the names of its tensors in `adapter.safetensors`.
        COMMAND: fits one.

    Raises:
        ValueError, KeyError, RuntimeError: numbers are missing or of other shapes.
    """

    PREFIX: ClassVar[str]
    COMMAND: ClassVar[str]

    def __init__(self, held: Mapping[str, Tensor], width: int) -> None:
        self._held = dict(held)

    def tensors(self) -> dict[str, Tensor]:
        """Everything it is, by names that begin with `PREFIX`."""
        return {f"{self.PREFIX}{name}": tensor.contiguous() for name, tensor in self._held.items()}

    def finite(self, expected: Tensor) -> Tensor:
        """What it expects, if that is numbers: a file's may be finite and their products not.

        Raises:
            WeightsError: one of them is none.
        """
        if not expected.isfinite().all():
            raise WeightsError(
                f"`{self.PREFIX}*` of adapter.safetensors is damaged: what it expects is no number; "
                f"`{self.COMMAND}` fits it anew"
            )
        return expected

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int) -> Self | None:
        """The one among these tensors, or None where there is none.

        Raises:
            WeightsError: a number is missing or of another shape.
        """
        begin = cls.PREFIX
        held = {name.removeprefix(begin): t for name, t in tensors.items() if name.startswith(begin)}
        try:
            return cls(held, width) if held else None
        except (KeyError, ValueError, RuntimeError) as problem:
            reason = " ".join(str(problem).split())
            raise WeightsError(
                f"`{cls.PREFIX}*` of adapter.safetensors is damaged, of another encoder or of an earlier "
                f"version: {reason}; `{cls.COMMAND}` fits it anew"
            ) from problem


class PictureGuide(Guide):
    """A guide that keeps what it compares pictures with, and so knows which it was fitted to."""

    def compared(self, seen: Seen) -> tuple[Tensor, Tensor]:
        """(I, Q) what the pictures seen are compared by, (M, Q) the same of those that it was fitted to."""
        raise NotImplementedError

    @torch.inference_mode()
    def fitted_to(self, seen: Seen) -> Tensor:
        """(I,) whether each picture seen is one of those that it was fitted to: what it expects of these is
        no more than what it was told."""
        some, known = self.compared(seen)
        return (F.normalize(some, dim=1) @ F.normalize(known, dim=1).T).amax(dim=1) >= SAME


def require(held: Mapping[str, Tensor], name: str, kind: torch.dtype | None, shape: tuple[int, ...]) -> None:
    """A tensor of this type (None: fractions of half or single precision) and shape (-1: any length).

    Raises:
        KeyError, ValueError: there is none.
    """
    tensor = held[name]
    fits = tensor.dtype in ((torch.float16, torch.float32) if kind is None else (kind,))
    sizes = tensor.dim() == len(shape) and all(a in (-1, b) for a, b in zip(shape, tensor.shape, strict=True))
    if not (fits and sizes):
        raise ValueError(f"{name} is no {shape} of {kind or 'fractions'}")


def require_finite(held: Mapping[str, Tensor]) -> None:
    """Raises:
    ValueError: a fraction is infinite or none.
    """
    if not all(tensor.isfinite().all() for tensor in held.values() if tensor.is_floating_point()):
        raise ValueError("a number is not finite")


def require_positive(name: str, numbers: Tensor, least: float = 1.0) -> None:
    """Raises:
    ValueError: one of the numbers is less.
    """
    if not bool((numbers >= least).all()):
        raise ValueError(f"{name} holds a number below {least}")


def usable(spread: Tensor) -> Tensor:
    """Spreads of features to divide by; what never changes tells nothing, and must not become loud."""
    return spread.clamp(min=1e-3 * float(spread.mean()) + SMALLEST)


def module_tensors(begin: str, module: nn.Module) -> dict[str, Tensor]:
    """Everything that a network is, matrices in 8 bits, by names that begin so."""
    held: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        small = {begin + name: tensor.float().clone()}
        held |= quantise(begin + name, tensor, BITS) if tensor.dim() == 2 else small
    return held


def require_module(held: Mapping[str, Tensor], begin: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises:
    KeyError, ValueError: a number of a network of these shapes is missing or of another shape.
    """
    for name, shape in shapes.items():
        if len(shape) == 2:
            require_quantised(held, begin + name, BITS, (shape[0], shape[1]))
        else:
            require(held, begin + name, torch.float32, shape)


def load_module(held: Mapping[str, Tensor], begin: str, module: Net) -> Net:
    """What `module_tensors` gave, in a network made for it; frozen.

    Raises:
        KeyError, ValueError: a number is missing or of another shape.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    require_module(held, begin, shapes)
    own = {
        name: dequantise(held, begin + name, BITS, shape[1]) if len(shape) == 2 else held[begin + name]
        for name, shape in shapes.items()
    }
    module.load_state_dict(own)
    return module.eval().requires_grad_(False)


def squeezed(lines: list[str]) -> Tensor:
    """(n,) uint8: lines of text, compressed."""
    content = "\n".join(lines).encode("utf-8", "replace")
    return torch.frombuffer(bytearray(zlib.compress(content, 9)), dtype=torch.uint8)


def unsqueezed(content: Tensor) -> list[str]:
    """The lines that `squeezed` was given, `MOST` bytes at most.

    Raises:
        ValueError: they are damaged.
    """
    try:
        inflate = zlib.decompressobj()
        text = inflate.decompress(content.numpy().tobytes(), MOST).decode()
    except zlib.error as problem:
        raise ValueError(f"a text is damaged: {problem}") from problem
    if not inflate.eof:
        raise ValueError(f"a text is cut off, or longer than {MOST} bytes")
    return text.split("\n")
