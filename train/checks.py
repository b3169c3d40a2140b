"""The data check of a run: `vlm data check`'s counts, from the reading that the run needs anyway.

Pictures to learn from are decoded once, for their features; those that were set aside are decoded here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vlm.data.collate import Group, Source, group_name, masked_text, told_of
from vlm.data.example import Example
from vlm.data.readers import Reading
from vlm.data.rows import BadRow
from vlm.images import ImageError, open_picture
from vlm.model import VLM
from vlm.train.config import TrainConfig
from vlm.train.hints import hint_texts
from vlm.train.prepare import FeatureStore

SHOWN = 10
"""Unusable rows named on the screen; run.json names them all."""
SAMPLES = 3


def unreadable(examples: Iterable[Example]) -> dict[str, ImageError]:
    """Why pictures cannot be used, by their group's id; each is decoded once."""
    found: dict[str, ImageError | None] = {}
    for example in examples:
        name = group_name(example.images)
        if name in found:
            continue
        found[name] = None
        try:
            for image in example.images:
                open_picture(image)
        except ImageError as problem:
            found[name] = problem
    return {name: problem for name, problem in found.items() if problem is not None}


def check(
    name: str, sources: Sequence[Source], held: Sequence[Example], store: FeatureStore
) -> tuple[Reading, list[Example]]:
    """Everything that was read, with each row that cannot be used; and what can be used of `held`.

    What stands in two sources, as the two answers of a pair do, is one row.

    Raises:
        DataError: more than 1 % of the rows cannot be used; it counts them by cause and names some.
    """
    bad = dict.fromkeys(row for source in sources for row in source.bad)
    broken = store.bad | unreadable(held)
    sound: dict[tuple[object, ...], Example] = {}
    for example in (*(e for source in sources for e in source.examples), *held):
        pictures = group_name(example.images)
        problem = broken.get(pictures)
        if problem is None:
            sound[example.id, pictures, example.turns] = example
        else:
            cause = f"picture {problem.code}".replace("_", " ")
            bad[BadRow(example.id, cause, str(problem))] = None
    reading = Reading(name, list(sound.values()), list(bad))
    reading.require_sound()
    return reading, [example for example in held if group_name(example.images) not in broken]


def check_text(reading: Reading) -> str:
    """What was found, in lines for people."""
    count, total = len(reading.bad), len(reading.bad) + len(reading.examples)
    if not count:
        return f"{reading.source}: all of its {total} rows can be used"
    causes = ", ".join(f"{number} x {cause}" for cause, number in reading.causes.most_common())
    lines = [f"{reading.source}: {count} of {total} rows are left out: {causes}"]
    lines += [f"  {row}" for row in reading.bad[:SHOWN]]
    if count > SHOWN:
        lines.append(f"  ... and {count - SHOWN} more (run.json names them all)")
    return "\n".join(lines)


def own(config: TrainConfig) -> bool:
    """Whether a run learns from a person's own pictures."""
    return any(not source.name for source in config.sources) and config.objective != "words"


def sample_text(model: VLM, groups: Sequence[Group], store: FeatureStore, seed: int) -> str:
    """The first samples of a run as the model reads them, hints included."""
    lines = ["the first samples as the model reads them; what it learns to say stands in [[ ]]:"]
    for group in groups[:SAMPLES]:
        hints = hint_texts(store.labels(group, "whole"))
        tokens, _ = told_of(group, model.processor, seed, 0, hints)[0]
        lines.append(f"{group.id}\n{masked_text(tokens, model.language)}")
    return "\n\n".join(lines)
