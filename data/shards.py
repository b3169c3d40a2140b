"""Who reads what of a data set in shards: whole files while they go round, every n-th row of those left over.

A reader is a process, without loader workers: to read a row takes a tenth of a millisecond, to encode its
picture hundreds of times as long. Whatever the number of readers, and however few the files, together they
read every row once; and a reader opens no file that holds nothing for it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vlm.errors import ConfigError

Shard = tuple[int, int]
"""(rank, world): the part of one of `world` readers."""

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")


@dataclass(frozen=True)
class Part:
    """Rows `first`, `first + every`, ... of the file with this number."""

    file: int
    first: int = 0
    every: int = 1

    def holds(self, row: int) -> bool:
        """Whether a row of the file belongs to this part."""
        return row % self.every == self.first


def parts_of(order: Sequence[int], shard: Shard) -> list[Part]:
    """A reader's parts of files.

    Args:
        order: the files' numbers, the same for every reader.
        shard: (rank, world) of this reader.

    Raises:
        ConfigError: there is no such reader.
    """
    rank, world = shard
    if not 0 <= rank < world:
        raise ConfigError(f"there is no reader {rank} of {world}")
    whole = len(order) - len(order) % world
    parts = [Part(order[i]) for i in range(rank, whole, world)]
    # The first row of each file left over is another reader's: short files do not all favour the first one.
    return parts + [Part(file, (rank - i) % world, world) for i, file in enumerate(order[whole:])]


def expand(pattern: str) -> list[str]:
    """`x-{000..012}.tar` -> `x-000.tar` to `x-012.tar`; anything else is itself."""
    match = _RANGE.search(pattern)
    if match is None:
        return [pattern]
    begin, end = match.groups()
    return [
        found
        for number in range(int(begin), int(end) + 1)
        for found in expand(f"{pattern[: match.start()]}{number:0{len(begin)}}{pattern[match.end() :]}")
    ]
