"""Pictures to learn from, opened a few at a time; those that cannot be read are counted and named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from vlm.conversation import ImageSource
from vlm.data.remember import TOGETHER
from vlm.images import ImageError, Picture, open_picture
from vlm.train.screen import Screen


def opened(
    images: Mapping[str, ImageSource], screen: Screen, what: str = "looking at pictures"
) -> Iterator[dict[str, Picture]]:
    """Those that can be read, by their names, some at a time; the others are told of in the end."""
    names, bad = list(images), list[str]()
    for begin in range(0, len(names), TOGETHER):
        found = {}
        for name in names[begin : begin + TOGETHER]:
            try:
                found[name] = open_picture(images[name])
            except ImageError as problem:
                bad.append(str(problem))
        if found:
            yield found
        screen.progress(what, min(begin + TOGETHER, len(names)), len(names))
    if bad:
        screen.say(f"{len(bad)} pictures cannot be read and are left out: {'; '.join(bad[:3])}")
