"""Shards read while a run goes on: lap after lap, each reader its own share, from any row on.

A lap is one pass over the data. The order of the files is another one in every lap, the same for all readers;
so a reader's share changes from lap to lap, and in each the shares together are everything, once.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vlm.data.readers import TARS, shards_in
from vlm.data.rows import Item
from vlm.data.shards import Part, Shard, expand, parts_of
from vlm.data.splits import canonical_split
from vlm.data.streams import file_rows, guarded, hub_name, hub_part
from vlm.data.tables import to_examples
from vlm.errors import DataError

KINDS = dict.fromkeys(TARS, "webdataset") | {".parquet": "parquet"}


def _chance(*key: object) -> random.Random:
    """A generator that is a function of the key, the same on every machine: states count on its order."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


@dataclass(frozen=True, order=True)
class Place:
    """Where a reader stands: rows of the `part`-th part of its share of the lap before `row` are read."""

    lap: int = 0
    part: int = 0
    row: int = 0


Row = tuple[Place, list[Item]]
"""The place after a row, and what the row holds."""


@dataclass(frozen=True)
class Laps:
    """One reader's share of shards.

    Attributes:
        kind: `parquet` or `webdataset`.
        files: paths or URLs, in the same order for every reader.
        shard: (rank, world) of this reader.
        seed: chooses the order of the files.
    """

    kind: str
    files: tuple[str, ...]
    shard: Shard = (0, 1)
    seed: int = 0

    def share(self, lap: int) -> list[Part]:
        """What this reader reads in a lap."""
        order = list(range(len(self.files)))
        _chance("shards", self.seed, lap).shuffle(order)
        return parts_of(order, self.shard)

    def rows(self, place: Place = Place()) -> Iterator[Row]:
        """Every row that is left of the place's lap, in order.

        Raises:
            DataError: a file is missing or damaged.
        """
        for number, part in enumerate(self.share(place.lap)):
            if number < place.part:
                continue
            start = place.row if number == place.part else 0
            yield from guarded(self._part(place.lap, number, part, start), self.files[part.file])

    def _part(self, lap: int, number: int, part: Part, start: int) -> Iterator[Row]:
        file = self.files[part.file]
        base = Path() if "://" in file else Path(file).parent
        for row, place, cells in file_rows(self.kind, file, part, start):
            yield Place(lap, number, row + 1), list(to_examples(iter([(place, cells)]), base))

    def fingerprint(self) -> str:
        """SHA-256 over what the files are called, and how large the local ones are."""
        total = hashlib.sha256()
        for file in self.files:
            size = 0 if "://" in file else Path(file).stat().st_size
            total.update(f"{PurePosixPath(file).name}\0{size}\n".encode())
        return total.hexdigest()


def find_laps(source: str, split: str = "train", shard: Shard = (0, 1), seed: int = 0) -> Laps:
    """The share of a reader of a folder of shards, a file, a hub id, or names with a range.

    Args:
        source: a folder with Parquet files or tars, one such file, `owner/name` of the hub, or paths or URLs
            written as `https://host/train-{000..127}.tar`.

    Raises:
        DataError: it has no shards, or no such part.
    """
    split = canonical_split(split)
    kind, files = _shard_files(source, split)
    if not files:
        raise DataError(f"{source} holds no shards")
    for file in files:
        if "://" not in file and not Path(file).is_file():
            raise DataError(f"{file} is missing")
    return Laps(kind, tuple(files), shard, seed)


def _shard_files(source: str, split: str) -> tuple[str, list[str]]:
    path = Path(source).expanduser()
    kind = next((kind for suffix, kind in KINDS.items() if source.lower().endswith(suffix)), "")
    if path.is_dir():
        found = shards_in(path, split)
        if found is not None:
            return found[0], [str(file) for file in found[1]]
    elif kind:
        return kind, expand(source if "://" in source else str(path))
    elif (name := hub_name(source)) is not None:
        _, kind, _, urls = hub_part(name, split)
        if kind in KINDS.values():
            return kind, urls
    raise DataError(f"{source} is not in shards (Parquet files or WebDataset tars): it cannot be streamed")
