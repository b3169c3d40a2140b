"""Pictures that are the same or look the same, by file hash and by perceptual hash.

The perceptual hash is imagehash's 64-bit DCT hash (pHash). Two pictures are taken for one when their hashes
differ in at most 4 bits and their 16x16 grey thumbnails by less than 8 grey levels on average: scaling and
recompression stay far below both; pictures that only share a composition fail the second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_BITS = 4
MAX_GREY = 8.0
SIDE = 16
# Five pieces of a 64-bit hash: two hashes within 4 bits agree in at least one piece.
PIECES = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))


@dataclass(frozen=True, eq=False)
class Print:
    """What a picture is recognised by."""

    name: str
    sha256: str
    phash: int
    grey: np.ndarray
    """(16, 16) uint8 thumbnail."""


def print_of(name: str, sha256: str, pixels: Image.Image) -> Print:
    """The print of an upright RGB picture."""
    import imagehash

    bits = imagehash.phash(pixels).hash.flatten()
    value = int("".join("1" if bit else "0" for bit in bits), 2)
    grey = np.asarray(pixels.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.uint8)
    return Print(name, sha256, value, grey)


def look_alike(one: Print, other: Print) -> bool:
    """Whether two pictures are taken for one."""
    if one.sha256 == other.sha256:
        return True
    if (one.phash ^ other.phash).bit_count() > MAX_BITS:
        return False
    return float(np.abs(one.grey.astype(np.int16) - other.grey.astype(np.int16)).mean()) < MAX_GREY


def _pieces(value: int) -> list[tuple[int, int]]:
    return [(start, (value >> start) & ((1 << width) - 1)) for start, width in PIECES]


class Index:
    """Finds look-alikes without comparing every pair."""

    def __init__(self, prints: Iterable[Print]) -> None:
        self._by_sha: dict[str, list[Print]] = defaultdict(list)
        self._by_piece: dict[tuple[int, int], list[Print]] = defaultdict(list)
        for item in prints:
            self._by_sha[item.sha256].append(item)
            for piece in _pieces(item.phash):
                self._by_piece[piece].append(item)

    def matches(self, wanted: Print) -> list[Print]:
        """The pictures that look like `wanted`, itself left out, in the order they were given."""
        found: dict[int, Print] = {}
        candidates = list(self._by_sha.get(wanted.sha256, ()))
        for piece in _pieces(wanted.phash):
            candidates += self._by_piece.get(piece, ())
        for item in candidates:
            if item is not wanted and id(item) not in found and look_alike(wanted, item):
                found[id(item)] = item
        return list(found.values())


def duplicate_groups(prints: Sequence[Print]) -> list[list[Print]]:
    """Groups of two or more pictures that look alike (directly or through others)."""
    index = Index(prints)
    seen: set[int] = set()
    groups = []
    for item in prints:
        if id(item) in seen:
            continue
        group, queue = [], [item]
        seen.add(id(item))
        while queue:
            current = queue.pop()
            group.append(current)
            for match in index.matches(current):
                if id(match) not in seen:
                    seen.add(id(match))
                    queue.append(match)
        if len(group) > 1:
            groups.append(sorted(group, key=lambda print_: print_.name))
    return groups


def leaks(train: Sequence[Print], held: Sequence[Print]) -> list[tuple[Print, Print]]:
    """(held-out picture, training picture) pairs that look alike."""
    index = Index(train)
    return [(item, match) for item in held for match in index.matches(item)]
