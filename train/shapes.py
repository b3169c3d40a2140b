"""A data set that needs no download: pictures of one coloured shape, drawn here.

It is for finding out whether a set-up learns at all (`vlm train smoke`, `vlm train selftest`), and for tests.
"""

from __future__ import annotations

import io
import random

from PIL import Image, ImageDraw

from vlm.config import CAPTION_PROMPT
from vlm.conversation import ImageSlot, Turn
from vlm.data.example import Example

SHAPES = "shapes"
"""The source's name in a recipe."""
COLOURS = {
    "red": (205, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 70, 200),
    "yellow": (235, 205, 40),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
FORMS = ("circle", "square", "triangle", "cross")
SIDE = 96


def draw(form: str, colour: str, chance: random.Random) -> bytes:
    """A PNG of one shape on grey, of random place and size."""
    picture = Image.new("RGB", (SIDE, SIDE), (128 + chance.randint(-12, 12),) * 3)
    pen = ImageDraw.Draw(picture)
    size = chance.randint(22, 34)
    x, y = (chance.randint(size, SIDE - size) for _ in range(2))
    fill = COLOURS[colour]
    if form == "circle":
        pen.ellipse((x - size, y - size, x + size, y + size), fill=fill)
    elif form == "square":
        pen.rectangle((x - size, y - size, x + size, y + size), fill=fill)
    elif form == "triangle":
        pen.polygon([(x, y - size), (x - size, y + size), (x + size, y + size)], fill=fill)
    else:
        pen.rectangle((x - size, y - size // 4, x + size, y + size // 4), fill=fill)
        pen.rectangle((x - size // 4, y - size, x + size // 4, y + size), fill=fill)
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def shapes(count: int, seed: int = 0) -> list[Example]:
    """`count` pictures, the first 24 all different, each with a caption and three questions."""
    kinds = [(form, colour) for form in FORMS for colour in COLOURS]
    random.Random(seed).shuffle(kinds)
    examples = []
    for number in range(count):
        form, colour = kinds[number % len(kinds)]
        chance = random.Random(f"{seed} {number}")
        image = draw(form, colour, chance)
        other = chance.choice([name for name in COLOURS if name != colour])
        asked = (
            (CAPTION_PROMPT, f"a {colour} {form} on grey"),
            ("What shape is in the picture?", form),
            ("What color is the shape?", colour),
            (f"Is the shape {colour if number % 2 else other}?", "yes" if number % 2 else "no"),
        )
        examples += [
            Example((image,), (Turn("user", (ImageSlot(0), text)),), (answer,), f"shapes/{number}/{k}")
            for k, (text, answer) in enumerate(asked)
        ]
    return examples
