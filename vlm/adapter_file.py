"""`adapter.safetensors`: an adapter's own tensors, whole or halved, and what guides its captions."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vlm.consensus import PREFIX, Consensus
from vlm.errors import WeightsError
from vlm.planes import joined, split

HALF = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter's file holds.

    Attributes:
        tensors: the adapter's own, by name.
        guide: those of what guides its captions, by names that begin with `PREFIX`; {} where nothing does.
        sha256: of the file.
        size: of the file, in bytes.
    """

    tensors: dict[str, Tensor]
    guide: dict[str, Tensor]
    sha256: str
    size: int

    def consensus(self, width: int) -> Consensus | None:
        """What guides its captions, or None where nobody has fitted it.

        Args:
            width: D_v of the encoder's features.

        Raises:
            WeightsError: damaged, or of other features.
        """
        return Consensus.from_tensors(self.guide, width) if self.guide else None


def read_adapter(folder: Path) -> AdapterFile:
    """Reads an adapter's file.

    Raises:
        WeightsError: missing or damaged, or a number of its own is none; a pickle is never read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = folder / "adapter.safetensors"
    try:
        content = path.read_bytes()
        stored, digest, size = load(content), hashlib.sha256(content).hexdigest(), len(content)
    except (OSError, SafetensorError) as problem:
        raise WeightsError(f"{path} cannot be read: {problem}") from problem
    del content  # what stands in memory at once decides which machine is large enough
    guide = {name: stored.pop(name) for name in list(stored) if name.startswith(PREFIX)}
    try:
        tensors = joined(stored)
    except ValueError as problem:
        raise WeightsError(f"{path} is damaged: {problem}") from problem
    broken = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if broken:
        raise WeightsError(f"{path} is spoilt: {broken[0]} is not finite")
    return AdapterFile(tensors, guide, digest, size)


def save_consensus(folder: Path, consensus: Consensus) -> None:
    """Writes into an adapter's file what its captions are guided by; its own numbers stay as they are.

    Raises:
        WeightsError: the file cannot be read or written.
    """
    old = read_adapter(folder)
    _rewrite(folder, old.tensors, consensus.tensors(), old.sha256)


def shrink(folder: Path) -> tuple[int, int]:
    """Rewrites an adapter's numbers in half precision, their bytes so that they take least (`vlm.planes`).

    Returns:
        Bytes of its file before and after.

    Raises:
        WeightsError: the file cannot be read or written, or a number is too large for half precision.
    """
    old = read_adapter(folder)
    halves = {name: tensor.half() for name, tensor in old.tensors.items()}
    if broken := sorted(name for name, tensor in halves.items() if not tensor.isfinite().all()):
        raise WeightsError(f"{folder} cannot be halved: {broken[0]} has numbers beyond {HALF:.0f}")
    return old.size, _rewrite(folder, halves, old.guide, old.sha256)


def _rewrite(folder: Path, own: Mapping[str, Tensor], guide: Mapping[str, Tensor], digest: str) -> int:
    """Gives an adapter's file other tensors, and its card the new SHA-256 for the old; returns its size."""
    from safetensors.torch import save

    content = save(split(own) | dict(guide), metadata={"format": "pt"})
    files = {"adapter.safetensors": content}
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
        files["README.md"] = card.replace(digest, hashlib.sha256(content).hexdigest()).encode()
    except FileNotFoundError:
        pass
    except (OSError, UnicodeError) as problem:
        raise WeightsError(f"{folder / 'README.md'} cannot be read: {problem}") from problem
    replace_files(folder, files)
    return len(content)


def replace_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files beside their targets, flushes them to disk, then moves them into place.

    Raises:
        WeightsError: the disk is full or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            for name, content in files.items():
                with open(staging / name, "wb") as file:
                    file.write(content)
                    file.flush()
                    os.fsync(file.fileno())
            for name in files:
                os.replace(staging / name, folder / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    except OSError as problem:
        raise WeightsError(f"{folder} cannot be written: {problem.strerror or problem}") from problem
