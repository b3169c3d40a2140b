"""What the server remembers of pictures between requests, by content: features, scores, latents.

All of it is numbers from which no picture can be shown again, kept in memory for one model, the least
recently used out first.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from vlm.features import SCORES
from vlm.images import Picture
from vlm.serve.metrics import Metrics

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from vlm.features import FeatureCache
    from vlm.model import VLM


class _Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


A = TypeVar("A", bound=_Sized)


class Recent(Generic[A]):
    """At most `most` bytes of arrays by key, the least recently used out first; safe to call from threads."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: OrderedDict[Hashable, A] = OrderedDict()
        self._lock = threading.Lock()
        self.nbytes = 0

    def get(self, key: Hashable) -> A | None:
        """The array under a key, or None."""
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
        return found

    def put(self, key: Hashable, array: A) -> None:
        """Keep an array; one that is larger than the bound is not kept."""
        with self._lock:
            self._drop(self._kept.pop(key, None))
            if array.nbytes > self._most:
                return
            self._kept[key] = array
            self.nbytes += array.nbytes
            while self.nbytes > self._most:
                self._drop(self._kept.popitem(last=False)[1])

    def _drop(self, array: A | None) -> None:
        if array is not None:
            self.nbytes -= array.nbytes


class MemoryCache:
    """Features and label scores by key, over a cache on disk if there is any.

    Args:
        most: bytes that are kept in memory.
    """

    def __init__(self, most: int, metrics: Metrics, below: FeatureCache | None = None) -> None:
        self._kept: Recent[np.ndarray] = Recent(most)
        self._below = below
        self._metrics = metrics
        metrics.watch("vlm_features_bytes", "Features of pictures in memory", lambda: self._kept.nbytes)

    def get(self, key: str) -> np.ndarray | None:
        """The array under a key, or None."""
        if (found := self._kept.get(key)) is not None:
            self._count("memory", [key])
            return found
        if self._below is not None and (found := self._below.get(key)) is not None:
            self._count("disk", [key])
            self._kept.put(key, found)
        return found

    def put(self, arrays: dict[str, np.ndarray]) -> None:
        """Keep what was freshly computed."""
        self._count("encoder", arrays)
        for key, array in arrays.items():
            self._kept.put(key, array)
        if self._below is not None:
            self._below.put(arrays)

    def _count(self, source: str, keys: Iterable[str]) -> None:
        self._metrics.pictures.labels(source).inc(sum(not key.endswith(SCORES) for key in keys))


class Latents:
    """What one model's adapter makes of pictures, each computed alone, so that a kept one is bit for bit a
    fresh one.

    A picture is known by its content and the encoder; where the adapter reads the question with it, by
    the question's words as well.

    Args:
        most: bytes that are kept in memory.
    """

    def __init__(self, model: VLM, most: int, metrics: Metrics) -> None:
        self._model = model
        self._kept: Recent[Tensor] = Recent(most)
        self._metrics = metrics
        metrics.watch("vlm_latents_bytes", "Latents of pictures in memory", lambda: self._kept.nbytes)

    def __call__(self, picture: Picture, features: Tensor, words: Sequence[int]) -> Tensor:
        """(1, L, W) latents of a picture.

        Args:
            features: (1, N, D_v) of the picture.
            words: ids of the user's words in the turn that shows it.
        """
        asked = tuple(words) if self._model.adapter.question_aware else None
        key = (self._model.features.key(picture), asked)
        found = self._kept.get(key)
        self._metrics.latents.labels("adapter" if found is None else "memory").inc()
        if found is None:
            found = self._fresh(features, asked)
            self._kept.put(key, found)
        return found

    def _fresh(self, features: Tensor, asked: Sequence[int] | None) -> Tensor:
        import torch

        with torch.inference_mode():
            if asked is None:
                return self._model.latents(features)
            ids = torch.tensor([asked], dtype=torch.long, device=features.device)
            return self._model.latents(features, ids, torch.ones_like(ids, dtype=torch.bool))
