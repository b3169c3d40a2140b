"""Frozen features of pictures: computed once, kept on disk, shared by train, eval, ask and serve.

A key covers everything that the features depend on: the picture's bytes, the encoder's weights and the
whole preprocessing. Values are float16. Several processes may read and write at once (LMDB).
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlm.config import to_dict
from vlm.errors import DataError
from vlm.images import Picture
from vlm.vision import Encoder

BATCH = 8
"""Pictures encoded together; larger ones are no faster on a CPU."""
DAY = 86_400
PAGE = 4096
LARGEST = 65_504.0
"""The largest float16; a feature beyond it would become infinite."""
SCORES = "/scores"
"""Ends the key of a picture's label probabilities; what comes before is the key of features of that size."""
FORMAT = 2
"""Raised when an encoder of the same configuration gives other features."""


class FeatureCache:
    """A bounded store of arrays under text keys; what was not used longest goes first.

    Args:
        folder: where the store lies; made if missing.
        max_bytes: bound on the values kept.

    Raises:
        DataError: the folder cannot be written, or the disk is full.
    """

    def __init__(self, folder: Path, max_bytes: int = 16 << 30) -> None:
        import lmdb

        self.folder, self.max_bytes = folder, max_bytes
        self._full = lmdb.MapFullError
        self._error = lmdb.Error
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The map is a promise of address space, not of disk; a quarter more holds LMDB's own pages.
            self._lmdb = _opened(folder.resolve(), max_bytes + max_bytes // 4 + (64 << 20))
            self._release = weakref.finalize(self, _released, folder.resolve())
            self._values = self._lmdb.open_db(b"values")
            self._used = self._lmdb.open_db(b"used")
        except (OSError, lmdb.Error) as problem:
            raise DataError(
                f"the feature cache {folder} cannot be opened: {problem}; a damaged one may be deleted, "
                "another place chosen (--feature-cache DIR, feature_cache=DIR in a recipe, or VLM_CACHE=DIR)"
            ) from problem

    def get(self, key: str) -> np.ndarray | None:
        """The array under `key`, or None. A read writes only the first time in a day."""
        name = key.encode()
        try:
            with self._lmdb.begin(buffers=True) as read:
                raw = read.get(name, db=self._values)
                array = None if raw is None else _unpack(raw)
                if array is None:
                    return None
                used = read.get(name, db=self._used)
                stale = used is None or struct.unpack("<q", used)[0] + DAY < time.time()
        except self._error as problem:
            raise self._unusable("read", problem) from problem
        if stale:
            self._write({name: None})
        return array

    def _unusable(self, how: str, problem: Exception) -> DataError:
        return DataError(
            f"the feature cache {self.folder} cannot be {how}: {problem}; a damaged one may be deleted"
        )

    def put(self, arrays: dict[str, np.ndarray]) -> None:
        """Stores float16 arrays, making room first where the bound would be passed."""
        packed = {key.encode(): _pack(array) for key, array in arrays.items()}
        # Values lie on pages of their own; one more may be needed to point at them.
        need = PAGE + sum(-(-(len(value) + 16) // PAGE) * PAGE for value in packed.values())
        if need > self.max_bytes:
            return  # more at once than the store may ever hold
        if self.size() + need > self.max_bytes:
            self._make_room(need)
        self._write(dict(packed))

    def size(self) -> int:
        """Bytes of values kept (whole pages)."""
        with self._lmdb.begin() as read:
            stat = read.stat(self._values)
        pages = stat["leaf_pages"] + stat["overflow_pages"] + stat["branch_pages"]
        return int(pages * stat["psize"])

    def __len__(self) -> int:
        with self._lmdb.begin() as read:
            return int(read.stat(self._values)["entries"])

    def close(self) -> None:
        """Writes everything to disk and, where this is the folder's last user in the process, closes it."""
        self._lmdb.sync(True)
        self._release()

    def _write(self, values: dict[bytes, bytes | None], again: bool = True) -> None:
        now = struct.pack("<q", int(time.time()))
        try:
            with self._lmdb.begin(write=True) as write:
                for name, value in values.items():
                    if value is not None:
                        write.put(name, value, db=self._values)
                    write.put(name, now, db=self._used)
        except self._full:
            if again:
                self._make_room(self.max_bytes // 4)
                self._write(values, again=False)
        except self._error as problem:
            raise self._unusable("written", problem) from problem

    def _make_room(self, need: int) -> None:
        """Drops the longest unused values until a tenth of the bound and `need` are free."""
        goal = self.size() + need - self.max_bytes + self.max_bytes // 10
        try:
            with self._lmdb.begin(write=True) as write:
                ages = sorted((struct.unpack("<q", at)[0], name) for name, at in write.cursor(self._used))
                for _, name in ages:
                    if goal <= 0:
                        break
                    value = write.pop(name, db=self._values)
                    write.delete(name, db=self._used)
                    goal -= len(value or b"")
        except self._error as problem:
            raise self._unusable("emptied", problem) from problem


_OPEN: dict[tuple[int, Path], tuple[Any, int]] = {}
_OPENING = threading.Lock()
SPARE_PAGES = 1024
"""LMDB may count pages at the end of its file that it has not needed to write."""


def _opened(folder: Path, map_size: int) -> Any:
    """The folder's environment: LMDB allows one a process, however many models use it."""
    import lmdb

    place = os.getpid(), folder
    with _OPENING:
        environment, users = _OPEN.get(place, (None, 0))
        if environment is None:
            environment = lmdb.open(str(folder), map_size=map_size, max_dbs=2, sync=False)
            pages = environment.info()["last_pgno"] + 1 - SPARE_PAGES
            if (folder / "data.mdb").stat().st_size < pages * environment.stat()["psize"]:
                environment.close()  # reading what is cut off would end the process, not raise
                raise lmdb.CorruptedError("data.mdb is cut off")
        elif map_size > environment.info()["map_size"]:
            environment.set_mapsize(map_size)
        _OPEN[place] = environment, users + 1
    return environment


def _released(folder: Path) -> None:
    place = os.getpid(), folder
    with _OPENING:
        environment, users = _OPEN.pop(place, (None, 0))
        if users > 1:
            _OPEN[place] = environment, users - 1
        elif environment is not None:
            environment.close()


def _pack(array: np.ndarray) -> bytes:
    rows, width = array.shape
    return struct.pack("<ii", rows, width) + array.astype(np.float16).tobytes()


def _unpack(raw: bytes | memoryview) -> np.ndarray | None:
    """The array, or None where the bytes are not one."""
    if len(raw) < 8:
        return None
    rows, width = struct.unpack("<ii", raw[:8])
    if rows < 0 or width < 0 or len(raw) != 8 + 2 * rows * width:
        return None
    return np.frombuffer(raw, dtype=np.float16, offset=8).reshape(rows, width).copy()


@dataclass(frozen=True)
class Seen:
    """What the encoder makes of I pictures.

    Attributes:
        features: (I, N, D_v) float32.
        scores: (I, C) float32 probabilities of the encoder's labels; C is 0 where it has none.
    """

    features: Tensor
    scores: Tensor


class Features:
    """Pictures -> features, through a cache where there is one."""

    def __init__(self, encoder: Encoder, encoder_hash: str, cache: FeatureCache | None = None) -> None:
        self.encoder, self.encoder_hash, self.cache = encoder, encoder_hash, cache
        self._about = self._described(encoder.config.size)
        self._about_labels = self._described(encoder.label_size)

    def _described(self, size: int) -> str:
        """Everything that features of pictures of a size depend on, but the picture."""
        config = replace(self.encoder.config, size=size)
        return json.dumps([FORMAT, self.encoder_hash, to_dict(config)], sort_keys=True)

    def key(self, picture: Picture, view: str = "whole") -> str:
        """What the cache knows this picture's features by."""
        return hashlib.sha256(f"{picture.sha256} {view} {self._about}".encode()).hexdigest()

    def label_key(self, picture: Picture, view: str = "whole") -> str:
        """What the cache knows this picture's label probabilities by."""
        return hashlib.sha256(f"{picture.sha256} {view} {self._about_labels}".encode()).hexdigest() + SCORES

    def stored(self, keys: Sequence[str]) -> Tensor:
        """(I, N, D_v) float32 features that are known to be in the cache.

        Raises:
            DataError: one of them is not (the cache was emptied, or is too small for the data).
        """
        arrays = [self._kept(key) for key in keys]
        held = [array for array in arrays if array is not None]
        if len(held) < len(arrays):
            raise DataError("the feature cache has lost pictures of this run: start the run again")
        return torch.from_numpy(np.stack(held)).float()

    def __call__(self, pictures: Sequence[Picture], view: str = "whole") -> Tensor:
        """(I, N, D_v) float32 features; each distinct picture is encoded once."""
        return self.see(pictures, view, scored=False).features

    def see(self, pictures: Sequence[Picture], view: str = "whole", scored: bool = True) -> Seen:
        """Features, and what the encoder's classifier says unless not `scored`.

        The classifier is asked at the size that it was trained with. Values pass through float16 whether or
        not there is a cache, so that both give the same answers.
        """
        if not pictures:
            return Seen(torch.zeros(0, self.encoder.tokens, self.encoder.width), torch.zeros(0, 0))
        keys = [self.key(picture, view) for picture in pictures]
        asked = [self.label_key(picture, view) for picture in pictures]
        scored = scored and bool(self.encoder.labels)
        wanted = dict(zip(keys + asked if scored else keys, [*pictures, *pictures], strict=False))
        found = {name: array for name in wanted if (array := self._kept(name)) is not None}
        found |= self._encode({name: wanted[name] for name in wanted if name not in found}, view)
        features = torch.from_numpy(np.stack([found[key] for key in keys])).float()
        if not scored:
            return Seen(features, features.new_zeros(len(keys), 0))
        scores = np.concatenate([found[key] for key in asked])
        return Seen(features, torch.from_numpy(scores).float())

    def _kept(self, name: str) -> np.ndarray | None:
        return None if self.cache is None else self.cache.get(name)

    def _encode(self, missing: dict[str, Picture], view: str) -> dict[str, np.ndarray]:
        """Arrays by key, of pictures by the keys that the cache does not have.

        Where the classifier is asked at the features' size, one pass gives both.
        """
        encoded: dict[str, np.ndarray] = {}
        for side in dict.fromkeys((self.encoder.config.size, self.encoder.label_size)):
            due = {
                name.removesuffix(SCORES): picture
                for name, picture in missing.items()
                if side == (self.encoder.label_size if name.endswith(SCORES) else self.encoder.config.size)
            }
            names = list(due)
            for begin in range(0, len(names), BATCH):
                arrays = self._look({name: due[name] for name in names[begin : begin + BATCH]}, view, side)
                if self.cache is not None:
                    self.cache.put(arrays)
                encoded.update(arrays)
        return encoded

    def _look(self, pictures: dict[str, Picture], view: str, side: int) -> dict[str, np.ndarray]:
        """What pictures of a side show: (N, D_v) features by key, (1, C) scores by key + `SCORES`."""
        pixels = torch.stack([self.encoder.preprocess(picture, view, side) for picture in pictures.values()])
        with torch.no_grad():
            features, scores = self.encoder.look(pixels.to(next(self.encoder.parameters())))
        arrays: dict[str, np.ndarray] = {}
        if side == self.encoder.config.size:
            values = features.float().clamp(-LARGEST, LARGEST).cpu().numpy().astype(np.float16)
            arrays |= dict(zip(pictures, values, strict=True))
        if side == self.encoder.label_size and self.encoder.labels:
            said = scores.float().cpu().numpy().astype(np.float16)
            arrays |= {name + SCORES: row[None] for name, row in zip(pictures, said, strict=True)}
        return arrays
