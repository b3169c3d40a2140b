"""Split names, and parts that are set aside by a hash of the picture's name.

A part is set aside by image, never by question: two questions about one picture always land together.
"""

from __future__ import annotations

import hashlib

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
