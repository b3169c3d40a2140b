"""Frozen features of pictures: computed once, kept on disk, shared by train, eval, ask and serve.

A key covers everything that the features depend on: the picture's bytes, the encoder's weights and the
whole preprocessing. Values are float16. Several processes may read and write at once (LMDB).
"""

from __future__ import annotations

import hashlib
import json
import struct
import time
from collections.abc import Sequence
from pathlib import Path

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
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The map is a promise of address space, not of disk; a quarter more holds LMDB's own pages.
            self._lmdb = lmdb.open(
                str(folder), map_size=max_bytes + max_bytes // 4 + (64 << 20), max_dbs=2, sync=False
            )
        except (OSError, lmdb.Error) as problem:
            raise DataError(f"the feature cache {folder} cannot be opened: {problem}") from problem
        self._full = lmdb.MapFullError
        self._error = lmdb.Error
        self._values = self._lmdb.open_db(b"values")
        self._used = self._lmdb.open_db(b"used")

    def get(self, key: str) -> np.ndarray | None:
        """The array under `key`, or None. A read writes only the first time in a day."""
        name = key.encode()
        with self._lmdb.begin(buffers=True) as read:
            raw = read.get(name, db=self._values)
            if raw is None:
                return None
            used = read.get(name, db=self._used)
            array = _unpack(raw)
            stale = used is None or struct.unpack("<q", used)[0] + DAY < time.time()
        if stale:
            self._write({name: None})
        return array

    def put(self, arrays: dict[str, np.ndarray]) -> None:
        """Stores float16 arrays, making room first where the bound would be passed."""
        packed = {key.encode(): _pack(array) for key, array in arrays.items()}
        need = sum(map(len, packed.values()))
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
        self._lmdb.sync(True)
        self._lmdb.close()

    def _write(self, values: dict[bytes, bytes | None]) -> None:
        now = struct.pack("<q", int(time.time()))
        try:
            with self._lmdb.begin(write=True) as write:
                for name, value in values.items():
                    if value is not None:
                        write.put(name, value, db=self._values)
                    write.put(name, now, db=self._used)
        except self._full:
            self._make_room(self.max_bytes // 4)
        except self._error as problem:
            raise DataError(f"the feature cache {self.folder} cannot be written: {problem}") from problem

    def _make_room(self, need: int) -> None:
        """Drops the longest unused values until a tenth of the bound and `need` are free."""
        goal = self.size() + need - self.max_bytes + self.max_bytes // 10
        with self._lmdb.begin(write=True) as write:
            ages = sorted((struct.unpack("<q", at)[0], name) for name, at in write.cursor(self._used))
            for _, name in ages:
                if goal <= 0:
                    break
                value = write.pop(name, db=self._values)
                write.delete(name, db=self._used)
                goal -= len(value or b"")


def _pack(array: np.ndarray) -> bytes:
    rows, width = array.shape
    return struct.pack("<ii", rows, width) + array.astype(np.float16).tobytes()


def _unpack(raw: bytes | memoryview) -> np.ndarray:
    rows, width = struct.unpack("<ii", raw[:8])
    return np.frombuffer(raw, dtype=np.float16, offset=8).reshape(rows, width).copy()


class Features:
    """Pictures -> features, through a cache where there is one."""

    def __init__(self, encoder: Encoder, encoder_hash: str, cache: FeatureCache | None = None) -> None:
        self.encoder, self.cache = encoder, cache
        self._prefix = json.dumps([FORMAT, encoder_hash, to_dict(encoder.config)], sort_keys=True)

    def key(self, picture: Picture, view: str = "whole") -> str:
        """What the cache knows this picture's features by."""
        return hashlib.sha256(f"{picture.sha256} {view} {self._prefix}".encode()).hexdigest()

    def stored(self, keys: Sequence[str]) -> Tensor:
        """(I, N, D_v) float32 features that are known to be in the cache.

        Raises:
            DataError: one of them is not (the cache was emptied, or is too small for the data).
        """
        arrays = [None if self.cache is None else self.cache.get(key) for key in keys]
        held = [array for array in arrays if array is not None]
        if len(held) < len(arrays):
            raise DataError("the feature cache has lost pictures of this run: start the run again")
        return torch.from_numpy(np.stack(held)).float()

    def __call__(self, pictures: Sequence[Picture], view: str = "whole") -> Tensor:
        """(I, N, D_v) float32; each distinct picture is encoded once.

        Values pass through float16 whether or not there is a cache, so that both give the same answers.
        """
        keys = [self.key(picture, view) for picture in pictures]
        found: dict[str, np.ndarray] = {}
        missing: dict[str, Picture] = {}
        for key, picture in zip(keys, pictures, strict=True):
            if key in found or key in missing:
                continue
            array = None if self.cache is None else self.cache.get(key)
            if array is None:
                missing[key] = picture
            else:
                found[key] = array
        found.update(self._encode(missing, view))
        if not keys:
            return torch.zeros(0, self.encoder.tokens, self.encoder.width)
        return torch.from_numpy(np.stack([found[key] for key in keys])).float()

    def _encode(self, missing: dict[str, Picture], view: str) -> dict[str, np.ndarray]:
        encoded: dict[str, np.ndarray] = {}
        names = list(missing)
        for begin in range(0, len(names), BATCH):
            part = names[begin : begin + BATCH]
            pixels = torch.stack([self.encoder.preprocess(missing[name], view) for name in part])
            with torch.no_grad():
                features = self.encoder(pixels.to(next(self.encoder.parameters())))
            arrays = dict(zip(part, features.float().cpu().numpy().astype(np.float16), strict=True))
            if self.cache is not None:
                self.cache.put(arrays)
            encoded.update(arrays)
        return encoded
