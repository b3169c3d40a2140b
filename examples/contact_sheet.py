"""Draws the README's contact sheet: each sample picture, its caption, two answers; wrong ones marked.

    python examples/contact_sheet.py docs/contact-sheet.png [--adapter DIR]

Nothing is selected: every sample is shown. An answer is right when it holds one of the words below; so is a
caption, unless it holds one of the words for what is not there.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from pathlib import Path

from vlm import VLM
from vlm.conversation import Conversation
from vlm.images import open_picture

SAMPLES = Path(__file__).parents[1] / "data" / "samples"
RIGHT, WRONG = "#1a7f37", "#b3261e"

# Of each sample: words for what it shows, words for what is not there, and two questions with right answers.
ASKED: dict[str, tuple[set[str], set[str], list[tuple[str, set[str]]]]] = {
    "astronaut.jpg": (
        {"astronaut", "woman", "suit"},
        {"man", "dog", "football"},
        [("Is there a person in the picture?", {"yes"}), ("What colour is the suit?", {"orange"})],
    ),
    "camera.jpg": (
        {"camera", "tripod", "photographer"},
        {"woman", "dog", "sitting"},
        [("Is there a dog in the picture?", {"no"}), ("What is the man holding?", {"camera"})],
    ),
    "cat.jpg": (
        {"cat", "kitten"},
        {"dog", "man", "water", "eating"},
        [("What animal is in the picture?", {"cat"}), ("How many cats are there?", {"one", "1"})],
    ),
    "coffee.jpg": (
        {"coffee", "cup", "mug"},
        {"man", "woman", "dog"},
        [("Is there a cup in the picture?", {"yes"}), ("Is there a dog in the picture?", {"no"})],
    ),
    "coins.jpg": (
        {"coin", "coins"},
        {"man", "people", "rock"},
        [("Are there people in the picture?", {"no"}), ("What is in the picture?", {"coins", "coin"})],
    ),
    "galaxies.jpg": (
        {"galaxies", "galaxy", "stars", "sky", "night", "space"},
        {"man", "person", "people"},
        [("Is there a car in the picture?", {"no"}), ("What colour is the sky?", {"black", "dark"})],
    ),
    "grass.jpg": (
        {"grass"},
        {"dog", "man", "woman", "people"},
        [("Is there grass in the picture?", {"yes"}), ("Is there a man in the picture?", {"no"})],
    ),
    "rocket.jpg": (
        {"rocket", "launch", "tower"},
        {"man", "people", "boat"},
        [("Is there water in the picture?", {"no"}), ("What is in the picture?", {"rocket", "missile"})],
    ),
}


def answers(model: VLM) -> dict[str, list[tuple[str, str, bool]]]:
    """(question, answer, right) of every sample; the caption comes first, under an empty question."""
    names = list(ASKED)
    captions = model.caption([SAMPLES / name for name in names])
    sheet = {}
    for name, caption in zip(names, captions, strict=True):
        words, absent, questions = ASKED[name]
        fits = holds(caption.text, words) and not holds(caption.text, absent)
        lines = [("", caption.text, fits)]
        conversations = [Conversation.ask([SAMPLES / name], question) for question, _ in questions]
        for (question, right), answer in zip(questions, model.ask_batch(conversations), strict=True):
            lines.append((question, answer.text, holds(answer.text, right)))
        sheet[name] = lines
    return sheet


def holds(text: str, words: set[str]) -> bool:
    """Whether one of the words stands in a text."""
    return bool(words & set(re.findall(r"\w+", text.lower())))


def draw(sheet: dict[str, list[tuple[str, str, bool]]], out: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 4, figsize=(14, 9))
    for axis, (name, lines) in zip(axes.flat, sheet.items(), strict=True):
        axis.imshow(open_picture(SAMPLES / name).pixels)
        axis.set_axis_off()
        y = -0.04
        for question, answer, right in lines:
            mark = "" if right else "  [wrong]"
            text = textwrap.fill(f"{question} {answer}{mark}".strip(), 42)
            axis.text(
                0, y, text, transform=axis.transAxes, va="top", fontsize=9, color=RIGHT if right else WRONG
            )
            y -= 0.085 * (text.count("\n") + 1)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.98, bottom=0.16, hspace=0.6, wspace=0.12)
    figure.savefig(out, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--adapter", default="default")
    args = parser.parse_args()
    sheet = answers(VLM.from_pretrained(args.adapter, offline=True))
    for name, lines in sheet.items():
        for question, answer, right in lines:
            print(f"{name:14} {'right' if right else 'WRONG'}  {question or 'caption:'} {answer}")
    draw(sheet, args.out)


if __name__ == "__main__":
    main()
