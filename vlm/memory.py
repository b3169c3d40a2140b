"""Remembered pictures: the captions of those most like a picture are told to the language model.

Retrieval in place of training, after SmallCap (Ramos et al. 2023): a memory is made in minutes, without
a gradient, and taken away again by leaving it out. A picture is known by the mean of its frozen features,
normalised to length 1; likeness is the cosine of two such vectors.

MEMORY/memory.json               settings, the encoder that saw the pictures, their hashes and captions
MEMORY/vectors-HASH.safetensors  their vectors, float16, in the same order
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlm.config import MemoryConfig, from_dict
from vlm.errors import ConfigError, DataError
from vlm.features import Features

FORMAT = 1
SETTINGS = "memory.json"
WORDS = 40
"""Words of a caption that are kept: what is told must leave room for the question."""


class Memory:
    """Captions of pictures by likeness.

    Shapes: M remembered pictures, I pictures asked about, N encoder tokens, D_v encoder width.

    Args:
        features: the encoder that sees the pictures; a memory of another one is refused.
        itself: whether a picture may be told its own captions. Evaluation says no.

    Attributes:
        config: how many captions are told, and of how like a picture.
        captions: of each remembered picture, by the SHA-256 of the picture, in the vectors' order.
    """

    def __init__(
        self, features: Features, config: MemoryConfig | None = None, *, itself: bool = True
    ) -> None:
        self.config = config or MemoryConfig()
        self.itself = itself
        self.captions: dict[str, list[str]] = {}
        vision = features.encoder.config
        self._encoder = {
            "id": vision.encoder,
            "sha256": features.encoder_hash,
            "size": vision.size,
            "stages": list(vision.stages),
        }
        self._vectors = torch.zeros(0, features.encoder.width)
        self._fresh: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.captions)

    @classmethod
    def load(cls, folder: Path, features: Features, *, itself: bool = True) -> Memory:
        """The memory in a folder.

        Raises:
            DataError: there is none, it is damaged, or another encoder saw its pictures.
        """
        document = _read(folder)
        try:
            settings = {name: document[name] for name in ("count", "least")}
            memory = cls(features, from_dict(MemoryConfig, settings), itself=itself)
            memory._same_encoder(document["encoder"], folder)
            memory.captions = {one["sha256"]: list(map(str, one["captions"])) for one in document["pictures"]}
            memory._vectors = _vectors(folder / str(document["vectors"]), document["sha256"])
        except (KeyError, TypeError, AttributeError, ConfigError) as problem:
            raise DataError(f"{folder / SETTINGS} is damaged: {problem}") from problem
        if memory._vectors.shape != (len(memory.captions), features.encoder.width):
            raise DataError(f"{folder} is damaged: its vectors are not those of its pictures")
        return memory

    def _same_encoder(self, there: dict[str, Any], folder: Path) -> None:
        """Ids may differ (a folder, a hub's name): weights and preprocessing may not."""
        if any(there[key] != self._encoder[key] for key in ("sha256", "size", "stages")):
            raise DataError(
                f"the pictures of {folder} were seen by another encoder ({_named(there)}) than this "
                f"adapter's ({_named(self._encoder)}): remember them again with `vlm data remember`"
            )

    @property
    def digest(self) -> str:
        """SHA-256 of everything that may change an answer."""
        vectors = self.vectors().half().numpy().tobytes()
        known = json.dumps([asdict(self.config), self.itself, self._encoder["sha256"], self.captions])
        return hashlib.sha256(known.encode() + hashlib.sha256(vectors).digest()).hexdigest()

    def vectors(self) -> Tensor:
        """(M, D_v) float32, of length 1."""
        if self._fresh:
            self._vectors = torch.cat([self._vectors, *self._fresh])
            self._fresh = []
        return self._vectors

    def add(self, sha256: str, captions: Sequence[str], vector: Tensor | None = None) -> bool:
        """Remembers a picture; of one that is known already, only captions that are new.

        Args:
            vector: (D_v,) as `pooled` gives it; may be left out where the picture is known.

        Returns:
            Whether the picture was new.
        """
        shortened = list(dict.fromkeys(" ".join(text.split()[:WORDS]) for text in captions))
        known = self.captions.get(sha256)
        if known is not None:
            known += [text for text in shortened if text not in known]
            return False
        assert vector is not None
        self.captions[sha256] = shortened
        self._fresh.append(vector.half().float()[None])  # as it will be read back
        return True

    def recall(self, features: Tensor, hashes: Sequence[str]) -> list[list[tuple[str, float]]]:
        """Captions of the pictures most like each of I pictures, with their cosines, the nearest first.

        The first caption of each remembered picture that has not been told of a nearer one.

        Args:
            features: (I, N, D_v).
            hashes: SHA-256 of each of the I pictures.
        """
        if not len(self) or not len(hashes):
            return [[] for _ in hashes]
        cosines = pooled(features) @ self.vectors().T
        if not self.itself:
            places = {sha256: place for place, sha256 in enumerate(self.captions)}
            for row, sha256 in enumerate(hashes):
                if sha256 in places:
                    cosines[row, places[sha256]] = float("-inf")
        best, places_of = cosines.topk(min(self.config.count, len(self)), dim=1)
        told = list(self.captions.values())
        found = []
        for row, near in zip(best.tolist(), places_of.tolist(), strict=True):
            recalled: dict[str, float] = {}
            for cosine, place in zip(row, near, strict=True):
                text = next((text for text in told[place] if text not in recalled), None)
                if cosine >= self.config.least and text is not None:
                    recalled[text] = cosine
            found.append(list(recalled.items()))
        return found

    def save(self, folder: Path) -> None:
        """Writes the memory; a reader finds the old one or the new one, whole.

        Raises:
            WeightsError: the disk is full or the folder cannot be written; what was there stays.
        """
        from safetensors.torch import save

        from vlm.adapter_file import replace_files

        content = save({"vectors": self.vectors().half()}, metadata={"format": "pt"})
        digest = hashlib.sha256(content).hexdigest()
        name = f"vectors-{digest[:16]}.safetensors"
        document = {
            "format": FORMAT,
            "encoder": self._encoder,
            **asdict(self.config),
            "vectors": name,
            "sha256": digest,
            "pictures": [{"sha256": key, "captions": texts} for key, texts in self.captions.items()],
        }
        text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
        # The vectors come first, under a name of their own: until the settings name them, the old ones count.
        replace_files(folder, {name: content, SETTINGS: text.encode("utf-8", "backslashreplace")})
        for old in folder.glob("vectors-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)


def pooled(features: Tensor) -> Tensor:
    """(I, N, D_v) -> (I, D_v) float32: the mean over tokens, of length 1, on the CPU."""
    return F.normalize(features.float().mean(dim=1), dim=-1).cpu()


def _named(encoder: dict[str, Any]) -> str:
    return f"{encoder['id']}, {encoder['size']} px, weights {str(encoder['sha256'])[:8]}"


def _read(folder: Path) -> dict[str, Any]:
    path = folder / SETTINGS
    if not path.is_file():
        raise DataError(f"{folder} holds no memory: make one with `vlm data remember PICTURES {folder}`")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise DataError(f"{path} cannot be read: {problem}") from problem
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise DataError(f"{path} is not of format {FORMAT}: make the memory again with `vlm data remember`")
    return document


def _vectors(path: Path, digest: str) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != digest:
            raise DataError(f"{path} is damaged: make the memory again with `vlm data remember`")
        return load(content)["vectors"].float()
    except (OSError, SafetensorError) as problem:
        raise DataError(f"{path} cannot be read: {problem}") from problem
