"""The data check of a run: `vlm data check`'s counts, from the reading that the run needs anyway.

Pictures to learn from are decoded once, for their features; those that were set aside are decoded here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from vlm.data.check import PartReport, count
from vlm.data.collate import Group, Source, all_fitting, group_name, image_name, masked_text, told_of
from vlm.data.duplicates import Print, leaks
from vlm.data.example import Example
from vlm.data.readers import Reading, told_texts
from vlm.data.rows import BadRow
from vlm.errors import DataError
from vlm.images import ImageError, open_picture
from vlm.model import VLM
from vlm.processor import Processor
from vlm.train.config import TrainConfig
from vlm.train.hints import hint_texts
from vlm.train.prepare import FeatureStore, prints_of

SHOWN = 10
"""Unusable rows named on the screen; run.json names them all."""
SAMPLES = 3


@dataclass(frozen=True)
class Checked:
    """What the check of a run found.

    Attributes:
        reading: everything that was read, with each row that cannot be used.
        held: what can be used of the examples set aside.
        contents: answers, words and pictures that look alike; None where nobody looked at the pictures.
        leaks: (picture set aside, picture to learn from that looks like it), by name.
    """

    reading: Reading
    held: list[Example]
    contents: PartReport | None
    leaks: list[tuple[str, str]]

    def text(self) -> str:
        """What was found, in lines for people."""
        lines = [_rows_text(self.reading)]
        if self.reading.texts:
            lines.append(f"  {told_texts(len(self.reading.texts))}")
        if self.contents is not None:
            lines += self.contents.lines()
        if self.leaks:
            learnt = {name for _, name in self.leaks}
            lines.append(f"  {len(learnt)} pictures look like some that are set aside and are not learnt:")
            lines += [f"    {name} = {held}" for held, name in self.leaks[:SAMPLES]]
        return "\n".join(lines)

    def apart(self, sources: Sequence[Source], groups: Sequence[Group]) -> tuple[list[Source], list[Group]]:
        """What is left to learn from without pictures that look like one set aside.

        Raises:
            DataError: nothing is.
        """
        away = {name for _, name in self.leaks}
        left = [group for group in groups if not away & set(map(image_name, group.images))]
        if not left:
            raise DataError("every picture looks like one that is set aside: say holdout=0 to learn from all")
        kept = [
            replace(s, examples=[e for e in s.examples if not away & set(map(image_name, e.images))])
            for s in sources
        ]
        return kept if away else list(sources), left


def fitting_pairs(
    sources: Sequence[Source], held: Sequence[Example], processor: Processor
) -> tuple[list[Source], list[Example]]:
    """`fitting` for pairs (`vlm.train.pairs`): where an answer cannot be read whole, both are left out."""
    (chosen, rejected), half = sources, len(held) // 2
    bad: list[BadRow] = []

    def whole(first: Sequence[Example], second: Sequence[Example]) -> tuple[list[Example], list[Example]]:
        kept = []
        for pair in zip(first, second, strict=True):
            _, unfit = all_fitting(pair, processor)
            bad.extend(unfit[:1])
            if not unfit:
                kept.append(pair)
        return [one for one, _ in kept], [other for _, other in kept]

    preferred, others = whole(chosen.examples, rejected.examples)
    asked = sum(whole(held[:half], held[half:]), [])
    told = replace(chosen, examples=preferred, bad=[*chosen.bad, *bad])
    return [told, replace(rejected, examples=others)], asked


def fitting(
    sources: Sequence[Source], held: Sequence[Example], processor: Processor
) -> tuple[list[Source], list[Example]]:
    """What the model can read whole of all sources and of what is set aside; the rest are bad rows."""
    kept = []
    for source in sources:
        examples, unfit = all_fitting(source.examples, processor)
        kept.append(replace(source, examples=examples, bad=[*source.bad, *unfit]))
    asked, unfit = all_fitting(held, processor)
    return [replace(kept[0], bad=[*kept[0].bad, *unfit]), *kept[1:]], asked


def decode(
    examples: Iterable[Example], looks: bool = False
) -> tuple[dict[str, ImageError], dict[str, Print]]:
    """Why pictures cannot be used, by their group's id, and the prints of the others; each decoded once."""
    broken: dict[str, ImageError] = {}
    prints: dict[str, Print] = {}
    for name, images in {group_name(example.images): example.images for example in examples}.items():
        try:
            pictures = [open_picture(image) for image in images]
            prints |= prints_of(images, pictures) if looks else {}
        except ImageError as problem:
            broken[name] = problem
    return broken, prints


def check(name: str, sources: Sequence[Source], held: Sequence[Example], store: FeatureStore) -> Checked:
    """Everything that was read; pictures are compared where the store has taken their prints.

    What stands in two sources, as the two answers of a pair do, is one row.

    Raises:
        DataError: more than 1 % of the rows cannot be used; it counts them by cause and names some.
    """
    bad = dict.fromkeys(row for source in sources for row in source.bad)
    unreadable, prints = decode(held, store.looks)
    broken = store.bad | unreadable
    sound: dict[tuple[object, ...], Example] = {}
    for example in (*(e for source in sources for e in source.examples), *held):
        pictures = group_name(example.images)
        problem = broken.get(pictures)
        if problem is None:
            sound[example.id, pictures, example.turns] = example
        else:
            cause = f"picture {problem.code}".replace("_", " ")
            bad[BadRow(example.id, cause, str(problem))] = None
    passed_by = sum(source.passed_by for source in sources)
    texts = list(dict.fromkeys(row for source in sources for row in source.texts))
    reading = Reading(name, list(sound.values()), list(bad), passed_by=passed_by, texts=texts)
    reading.require_sound()
    contents = None
    if store.looks:
        contents = PartReport(name, bad=reading.bad)
        count(reading.examples, [*store.prints.values(), *prints.values()], contents)
    alike = leaks(list(store.prints.values()), list(prints.values()))
    return Checked(
        reading,
        [example for example in held if group_name(example.images) not in broken],
        contents,
        [(one.name, other.name) for one, other in alike],
    )


def _rows_text(reading: Reading) -> str:
    total = len(reading.bad) + len(reading.examples)
    left_out = len(reading.bad)
    if not left_out:
        return f"{reading.source}: all of its {total} rows can be used"
    causes = ", ".join(f"{number} x {cause}" for cause, number in reading.causes.most_common())
    lines = [f"{reading.source}: {left_out} of {total} rows are left out: {causes}"]
    lines += [f"  {row}" for row in reading.bad[:SHOWN]]
    if left_out > SHOWN:
        lines.append(f"  ... and {left_out - SHOWN} more (run.json names them all)")
    return "\n".join(lines)


def own(config: TrainConfig) -> bool:
    """Whether a run learns from a person's own pictures."""
    return any(not source.name for source in config.learnt)


def sample_text(model: VLM, groups: Sequence[Group], store: FeatureStore, seed: int) -> str:
    """The first samples of a run as the model reads them, hints included."""
    lines = ["the first samples as the model reads them; what it learns to say stands in [[ ]]:"]
    for group in groups[:SAMPLES]:
        hints = hint_texts(store.labels(group, "whole"))
        tokens, _ = told_of(group, model.processor, seed, 0, hints)[0]
        lines.append(f"{group.id}\n{masked_text(tokens, model.language)}")
    return "\n\n".join(lines)
