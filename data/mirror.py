"""What is said of a picture, said of its mirror image: left and right change places.

Only where they are surely sides: "right behind the dog" and "has left" are not.
"""

from __future__ import annotations

import re

_BEFORE = (
    r"(?:the|his|her|its|their|your|my|our|far|upper|lower|top|bottom|middle|back|front|extreme|"
    r"to|on|at|from|of|and|or|towards?|facing|turn(?:s|ing)?|look(?:s|ing)?|point(?:s|ing)?)"
)
_AFTER = (
    r"(?:sides?|sided|hands?|handed|most|corners?|edge|end|half|part|portion|wall|of|to|"
    r"arms?|legs?|foot|feet|knees?|elbows?|ears?|eyes?|shoulders?|paws?|wings?|fist|wrist)"
)
_JOINED = r"(?:most|hand|handed|wards?)"
_NEVER_AFTER = r"(?:answer|way|size|thing|time|kind|one|moment|over|overs|behind|of way)"
_SIDES = re.compile(rf"\b(?:left|right){_JOINED}?\b", re.IGNORECASE)
_SIDE = re.compile(
    rf"\b(?P<before>{_BEFORE}[ -]+)?(?P<side>left|right)(?P<joined>{_JOINED})?\b"
    rf"(?![ -]+{_NEVER_AFTER}\b)(?P<after>[ -]+{_AFTER}\b)?",
    re.IGNORECASE,
)


def says_sides(text: str) -> bool:
    """Whether `text` has a left or a right in it, a side or not."""
    return _SIDES.search(text) is not None


def mirrored(text: str) -> str | None:
    """`text` about the mirrored picture; None where a left or a right of it may be no side.

    "what is on the left side of the bed?" -> "what is on the right side of the bed?"
    """
    sure = 0

    def turned(found: re.Match[str]) -> str:
        nonlocal sure
        if not (found["before"] or found["joined"] or found["after"]):
            return found[0]
        sure += 1
        begin, end = (place - found.start() for place in found.span("side"))
        return found[0][:begin] + _other(found["side"]) + found[0][end:]

    told = _SIDE.sub(turned, text)
    return told if sure == len(_SIDES.findall(text)) else None


def _other(side: str) -> str:
    other = "right" if side.lower() == "left" else "left"
    if side.isupper():
        return other.upper()
    return other.capitalize() if side[0].isupper() else other
