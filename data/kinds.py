"""Questions after the kind of a thing ("What animal is this?", "What kind of dog is this?"), for ImageNet's.

Of animals and vehicles a person gives the plain name ("cat" for a tabby); a question after dogs or musical
instruments wants the label itself.
"""

from __future__ import annotations

from vlm.kinds import BROAD_KINDS, kinds_of, plain_name

NAMING = (
    "What is this?",
    "What is that?",
    "What is this called?",
    "What is shown here?",
    "What is in the picture?",
)
"""Questions that a thing's name answers."""
BROAD = ("What {} is this?", "What {} is in the picture?", "What {} do you see?", "Which {} is shown?")
NARROW = ("What kind of {} is this?", "What kind of {} is in the picture?", "Which kind of {} is it?")


def kind_questions(label: str) -> list[tuple[str, str]]:
    """Every question after a kind that the label answers, with its answer."""
    asked: list[tuple[str, str]] = []
    for kind in kinds_of(label):
        if kind in BROAD_KINDS:
            asked += [(form.format(kind), plain_name(label)) for form in BROAD]
        else:
            asked += [(form.format(kind), label) for form in (*BROAD, *NARROW)]
    if "dog" in kinds_of(label):
        asked.append(("What breed of dog is this?", label))
    return asked
