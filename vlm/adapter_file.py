"""`adapter.safetensors`: an adapter's own tensors, whole or rounded, and what guides it."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from vlm.captioner import Captioner
from vlm.consensus import Consensus
from vlm.errors import WeightsError
from vlm.known_answers import KnownAnswers
from vlm.language import LanguageModel
from vlm.quantised import STEP, dequantise_all, quantise_large

GUIDES = (Consensus.PREFIX, Captioner.PREFIX, KnownAnswers.PREFIX)


@dataclass(frozen=True)
class AdapterFile:
    """What an adapter's file holds.

    Attributes:
        tensors: the adapter's own by name, in whatever precision but 8 bits.
        stored: the same as they stand in the file.
        guides: those of what guides its captions and answers, by names that begin with one of `GUIDES`.
        sha256: of the file.
        size: of the file, in bytes.
    """

    tensors: dict[str, Tensor]
    stored: dict[str, Tensor]
    guides: dict[str, Tensor]
    sha256: str
    size: int

    def consensus(self, width: int, labels: int | None = None) -> Consensus | None:
        """What guides its captions, or None where nobody has fitted it.

        Args:
            width: D_v of the encoder's features.
            labels: C of its classifier; None where the encoder is not at hand.

        Raises:
            WeightsError: damaged, or of another encoder.
        """
        found = Consensus.from_tensors(self.guides, width)
        if found is not None and labels is not None and found.labels != labels:
            raise WeightsError(
                f"captions are guided by {found.labels} labels of an encoder, this one has {labels}: "
                f"`{found.COMMAND}` fits the guide anew"
            )
        return found

    def captioner(
        self, width: int, cells: int, labels: int | None = None, language: LanguageModel | None = None
    ) -> Captioner | None:
        """Who says its captions with the language model, or None where nobody was taught to.

        Args:
            width: D_v of the encoder's features.
            cells: N of them.
            labels: C of its classifier; None where the encoder is not at hand.
            language: who it is to speak with; None likewise.

        Raises:
            WeightsError: damaged, or of other frozen parts.
        """
        found = Captioner.from_tensors(self.guides, width)
        if found is None:
            return None
        fits = found.cells == cells and labels in (None, found.labels)
        if language is not None:
            ends, inside = int(found.tokens[0]) == language.frame.end, int(found.tokens.max())
            fits = fits and ends and found.wide == language.width and inside < language.vocabulary
        if not fits:
            raise WeightsError(
                f"captions are said by a captioner of other frozen parts: `{found.COMMAND}` teaches one anew"
            )
        return found

    def known_answers(self, width: int, cells: int) -> KnownAnswers | None:
        """What guides its answers, or None where nobody has fitted it.

        Args:
            width: D_v of the encoder's features.
            cells: N of them.

        Raises:
            WeightsError: damaged, or of another encoder.
        """
        found = KnownAnswers.from_tensors(self.guides, width)
        if found is not None and found.cells not in (0, cells):
            raise WeightsError(
                f"answers are guided by {found.cells} cells of a picture, this encoder sees {cells}: "
                f"`{found.COMMAND}` fits the guide anew"
            )
        return found


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
    except OSError as problem:
        raise WeightsError(f"{path} cannot be read: {problem.strerror}") from problem
    except SafetensorError as problem:
        raise WeightsError(f"{path} cannot be read: {problem}") from problem
    except KeyError as problem:  # a type of numbers that this library does not know
        raise WeightsError(f"{path} holds numbers of an unknown type: {problem}") from problem
    del content  # what stands in memory at once decides which machine is large enough
    guides = {name: stored.pop(name) for name in list(stored) if name.startswith(GUIDES)}
    try:
        tensors = dequantise_all(stored)
    except ValueError as problem:
        raise WeightsError(
            f"{path} is damaged, or was shrunk by another version of vlm-adapters: {problem}"
        ) from problem
    broken = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if broken:
        raise WeightsError(f"{path} is spoilt: {broken[0]} is not finite")
    return AdapterFile(tensors, stored, guides, digest, size)


def shrink(folder: Path) -> tuple[int, int]:
    """Rewrites an adapter's matrices in 8 bits a number (`vlm.quantised`).

    Returns:
        Bytes of its file before and after.

    Raises:
        WeightsError: the file cannot be read or written, or a number is too large.
    """
    old = read_adapter(folder)
    small = quantise_large(old.stored)
    if broken := sorted(name for name, tensor in small.items() if not tensor.isfinite().all()):
        raise WeightsError(
            f"{folder} cannot be shrunk: {broken[0].removesuffix(STEP)} holds numbers beyond 8e6"
        )
    content = file_content(small, old.guides)
    replace_files(folder, {"adapter.safetensors": content, **renewed_card(folder, old.sha256, content)})
    return old.size, len(content)


def file_content(stored: Mapping[str, Tensor], guides: Mapping[str, Tensor]) -> bytes:
    """The bytes of an adapter's file that holds these tensors."""
    from safetensors.torch import save

    return save({**stored, **guides}, metadata={"format": "pt"})


def renewed_card(folder: Path, digest: str, content: bytes) -> dict[str, bytes]:
    """The adapter's card by its name, with the SHA-256 of its new file for the old; {} where there is none.

    Raises:
        WeightsError: the card cannot be read.
    """
    try:
        card = (folder / "README.md").read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeError) as problem:
        raise WeightsError(f"{folder / 'README.md'} cannot be read: {problem}") from problem
    return {"README.md": card.replace(digest, hashlib.sha256(content).hexdigest()).encode()}


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
