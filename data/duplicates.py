"""Pictures that are the same or look the same.

Two pictures are taken for one when their files are the same, when their 12x12 colour thumbnails correlate
above 0.995, or above 0.97 with perceptual hashes (imagehash's 64-bit pHash) at most 4 bits apart. Scaling and
recompression stay above that; two pictures that only share a composition stay below. (A hash alone is not
enough: drawings leave most of its bits to chance.)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

MAX_BITS = 4
SURE = 0.995
LIKELY = 0.97
SIDE = 12
FLAT = 1.0
BLOCK = 256


@dataclass(frozen=True, eq=False)
class Print:
    """What a picture is recognised by."""

    name: str
    sha256: str
    phash: int
    look: np.ndarray
    """(12 * 12 * 3,) float32 thumbnail of zero mean and unit length; all zero for a picture of one colour."""
    mean: np.ndarray
    """(3,) float32 mean colour, 0 to 255."""


def print_of(name: str, sha256: str, pixels: Image.Image) -> Print:
    """The print of an upright RGB picture."""
    import imagehash

    bits = imagehash.phash(pixels).hash.flatten()
    value = int("".join("1" if bit else "0" for bit in bits), 2)
    small = np.asarray(pixels.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    centred = (small - small.mean()).ravel()
    flat = float(small.std(axis=(0, 1)).max()) < FLAT
    look = np.zeros_like(centred) if flat else centred / np.linalg.norm(centred)
    return Print(name, sha256, value, look, small.mean(axis=(0, 1)))


def look_alike(one: Print, other: Print) -> bool:
    """Whether two pictures are taken for one."""
    if one.sha256 == other.sha256:
        return True
    if not one.look.any() or not other.look.any():  # pictures of one colour
        both = not one.look.any() and not other.look.any()
        return both and float(np.abs(one.mean - other.mean).max()) < 2 * FLAT
    alike = float(one.look @ other.look)
    return alike > SURE or (alike > LIKELY and (one.phash ^ other.phash).bit_count() <= MAX_BITS)


def matches(wanted: Sequence[Print], among: Sequence[Print]) -> Iterator[tuple[int, int]]:
    """(index in `wanted`, index in `among`) of pictures that look alike; a picture is no match of itself.

    Every pair's thumbnails are compared by blocks of matrix products: 10,000 pictures take about a second.
    """
    if not wanted or not among:
        return
    table = np.stack([item.look for item in among])
    files = defaultdict(list)
    flat = [j for j, item in enumerate(among) if not item.look.any()]
    for j, item in enumerate(among):
        files[item.sha256].append(j)
    for start in range(0, len(wanted), BLOCK):
        block = wanted[start : start + BLOCK]
        near = np.stack([item.look for item in block]) @ table.T > LIKELY
        for row, item in enumerate(block):
            found = {*map(int, np.flatnonzero(near[row])), *files.get(item.sha256, ())}
            if not item.look.any():
                found.update(flat)
            for j in sorted(found):
                if among[j] is not item and look_alike(item, among[j]):
                    yield start + row, j


def duplicate_groups(prints: Sequence[Print]) -> list[list[Print]]:
    """Groups of two or more pictures that look alike (directly or through others)."""
    group_of = list(range(len(prints)))

    def root(index: int) -> int:
        while group_of[index] != index:
            group_of[index] = group_of[group_of[index]]
            index = group_of[index]
        return index

    for one, other in matches(prints, prints):
        group_of[root(one)] = root(other)
    groups: dict[int, list[Print]] = defaultdict(list)
    for index, item in enumerate(prints):
        groups[root(index)].append(item)
    return [sorted(group, key=lambda item: item.name) for group in groups.values() if len(group) > 1]


def leaks(train: Sequence[Print], held: Sequence[Print]) -> list[tuple[Print, Print]]:
    """(held-out picture, training picture) pairs that look alike."""
    return [(held[one], train[other]) for one, other in matches(held, train)]
