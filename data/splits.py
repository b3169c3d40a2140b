"""Split names, and parts that are set aside by a hash of the picture's name.

A part is set aside by image, never by question: two questions about one picture always land together, and so
do files of other names with the same bytes. Names that several files share are told apart by their folders.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from vlm.conversation import ImageSource
from vlm.data.example import Example
from vlm.errors import DataError

SPLITS = ("train", "train-rest", "dev", "test")
_ALIASES = {"val": "dev", "valid": "dev", "validation": "dev", "training": "train", "testing": "test"}


def canonical_split(split: str) -> str:
    """`train`, `train-rest`, `dev` or `test` for any usual spelling ("val", "validation", ...).

    Raises:
        DataError: the name is none of these.
    """
    name = _ALIASES.get(split.lower(), split.lower())
    if name not in SPLITS:
        raise DataError(
            f"unknown split {split!r}; use one of {', '.join(SPLITS)} (val and validation mean dev)"
        )
    return name


def is_held_out(name: str, fraction: float, salt: str = "") -> bool:
    """Whether the picture called `name` belongs to the part that is set aside.

    A function of the name alone, so adding pictures never moves another one between the parts.
    `fraction` is the expected share, 0 to 1; different salts give independent parts.
    """
    digest = hashlib.sha256(f"{salt}\0{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < fraction


def image_key(image: ImageSource) -> str:
    """What names a picture when a part is set aside: its file's name, or a hash of its bytes."""
    if isinstance(image, str | Path):
        return Path(image).name
    if isinstance(image, bytes):
        return hashlib.sha256(image).hexdigest()
    sha256 = getattr(image, "sha256", None)
    return str(sha256) if sha256 else hashlib.sha256(image.tobytes()).hexdigest()  # type: ignore[union-attr]


def split_by_image(examples: Sequence[Example], fraction: float = 0.2) -> tuple[list[Example], list[Example]]:
    """(the rest, the part set aside): `fraction` of the pictures, at least one, with all said of them.

    Pictures are ranked by a hash of their names, so the order of the examples does not matter. Examples that
    have a picture in common, be it a copy under another name, stay together.

    Raises:
        DataError: there are fewer than two pictures.
    """
    ranks = rank_by_image(examples, copies=True)
    count = max(ranks, default=-1) + 1
    if count < 2:
        raise DataError(
            f"{count} picture(s) cannot be divided into two parts (those of one row stay together)"
        )
    held = min(max(1, round(count * fraction)), count - 1)
    rest = [example for example, rank in zip(examples, ranks, strict=True) if rank >= held]
    return rest, [example for example, rank in zip(examples, ranks, strict=True) if rank < held]


def rank_by_image(examples: Sequence[Example], salt: str = "", *, copies: bool = False) -> list[int]:
    """The place of each example's picture, counted from 0, in an order made by a hash of the names.

    Examples that have a picture in common have one place. With `copies`, files with the same bytes are one
    picture; without, no file is read, and adding a copy moves nothing else.
    """
    groups = _connected(examples, copies)
    ranked = sorted(set(groups), key=lambda key: hashlib.sha256(f"{salt}\0{key}".encode()).digest())
    place = {key: rank for rank, key in enumerate(ranked)}
    return [place[key] for key in groups]


def _connected(examples: Sequence[Example], copies: bool) -> list[str]:
    """Per example, a key that examples with a picture in common (directly or through others) share."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    paths = {Path(image) for e in examples for image in e.images if isinstance(image, str | Path)}
    named = _names(paths)
    keys = [
        [named[Path(i)] if isinstance(i, str | Path) else image_key(i) for i in example.images]
        or [f"text:{example.id}"]
        for example in examples
    ]
    alike = [[named[path] for path in group] for group in _copies(paths)] if copies else []
    for names in (*keys, *alike):
        for name in names[1:]:
            one, other = sorted((root(names[0]), root(name)))
            parent[other] = one
    return [root(names[0]) for names in keys]


def _names(paths: Iterable[Path]) -> dict[Path, str]:
    """What each file is called: its name; where several share that, its path below the folder of them all."""
    shared: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        shared[path.name].append(path)
    found: dict[Path, str] = {}
    for name, several in shared.items():
        if len(several) == 1:
            found[several[0]] = name
            continue
        whole = {path: os.path.abspath(path) for path in several}
        top = os.path.commonpath(whole.values())
        found |= {path: Path(os.path.relpath(place, top)).as_posix() for path, place in whole.items()}
    return found


def _copies(paths: Iterable[Path]) -> list[list[Path]]:
    """Groups of files with the same bytes; only files of equal size are read, missing ones have no copy."""
    sizes = {path: size for path in sorted(paths) if (size := _size(path))}
    often = Counter(sizes.values())
    groups: dict[tuple[int, str], list[Path]] = defaultdict(list)
    for path, size in sizes.items():
        if often[size] > 1:
            try:
                groups[size, hashlib.sha256(path.read_bytes()).hexdigest()].append(path)
            except OSError:
                continue  # whoever decodes it says so
    return [group for group in groups.values() if len(group) > 1]


def _size(path: Path) -> int:
    """Bytes of a file; 0 where it cannot be seen."""
    try:
        return path.stat().st_size
    except OSError:
        return 0
