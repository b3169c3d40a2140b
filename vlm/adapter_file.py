"""`adapter.safetensors`: an adapter's own tensors, whole or halved, and what guides its captions."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vlm.consensus import PREFIX, Consensus
from vlm.errors import WeightsError
from vlm.planes import joined, split

HALF = torch.finfo(torch.float16).max


def load_tensors(folder: Path) -> tuple[dict[str, Tensor], str]:
    """The adapter's own tensors and the SHA-256 of their file.

    Raises:
        WeightsError: missing or damaged, or a number is none; a pickle is never read.
    """
    path = folder / "adapter.safetensors"
    tensors, digest = _read(path)
    try:
        tensors = joined({name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)})
    except ValueError as problem:
        raise WeightsError(f"{path} is damaged: {problem}") from problem
    broken = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if broken:
        raise WeightsError(f"{path} is spoilt: {broken[0]} is not finite")
    return tensors, digest


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    """Everything in a file as it stands there, and the file's SHA-256."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
        return load(content), hashlib.sha256(content).hexdigest()
    except (OSError, SafetensorError) as problem:
        raise WeightsError(f"{path} cannot be read: {problem}") from problem


def load_consensus(folder: Path, width: int) -> Consensus | None:
    """What an adapter's captions are guided by, or None where nobody has fitted it.

    Args:
        width: D_v of its encoder's features.

    Raises:
        WeightsError: missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    path = folder / "adapter.safetensors"
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(PREFIX)}  # noqa: SIM118
    except (OSError, SafetensorError) as problem:
        raise WeightsError(f"{path} cannot be read: {problem}") from problem
    return Consensus.from_tensors(tensors, width) if tensors else None


def save_consensus(folder: Path, consensus: Consensus) -> None:
    """Writes into an adapter's file what its captions are guided by; the rest stays as it is.

    Raises:
        WeightsError: the file cannot be read or written.
    """
    tensors, digest = _read(folder / "adapter.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
    _rewrite(folder, own | consensus.tensors(), digest)


def shrink(folder: Path) -> tuple[int, int]:
    """Rewrites an adapter's numbers in half precision, their bytes so that they take least (`vlm.planes`).

    Returns:
        Bytes of its file before and after.

    Raises:
        WeightsError: the file cannot be read or written, or a number is too large for half precision.
    """
    path = folder / "adapter.safetensors"
    own, digest = load_tensors(folder)
    halves = {name: tensor.half() for name, tensor in own.items()}
    if broken := sorted(name for name, tensor in halves.items() if not tensor.isfinite().all()):
        raise WeightsError(f"{path} cannot be halved: {broken[0]} has numbers beyond {HALF:.0f}")
    guide = {name: tensor for name, tensor in _read(path)[0].items() if name.startswith(PREFIX)}
    before = path.stat().st_size
    _rewrite(folder, split(halves) | guide, digest)
    return before, path.stat().st_size


def _rewrite(folder: Path, tensors: Mapping[str, Tensor], digest: str) -> None:
    """Another content for an adapter's file; its card tells the new SHA-256 where it told the old."""
    from safetensors.torch import save

    content = save(dict(tensors), metadata={"format": "pt"})
    files = {"adapter.safetensors": content}
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
        files["README.md"] = card.replace(digest, hashlib.sha256(content).hexdigest()).encode()
    except FileNotFoundError:
        pass
    except (OSError, UnicodeError) as problem:
        raise WeightsError(f"{folder / 'README.md'} cannot be read: {problem}") from problem
    replace_files(folder, files)


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
