"""From a recipe to what the loop needs: examples grouped by picture, with their features in the cache."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vlm.config import HintsConfig
from vlm.conversation import ImageSource
from vlm.data.collate import Group, Source, group_by_image, group_name, image_name
from vlm.data.duplicates import Print, print_of
from vlm.data.example import Example
from vlm.data.readers import Reading, own_dev
from vlm.data.sources import find_reading
from vlm.data.splits import split_by_image
from vlm.data.text import all_spoken
from vlm.errors import ConfigError, DataError
from vlm.features import Features
from vlm.hints import likely_labels
from vlm.images import ImageError, Picture, open_picture
from vlm.train.config import SourceConfig, TrainConfig
from vlm.train.pairs import pair_sources
from vlm.train.shapes import SHAPES, shapes

MEMORY = 6 << 30
"""Bytes of features held in memory; the rest is read from the cache, step by step."""

Progress = Callable[[str, int, int], None]
Labels = list[list[tuple[str, float]]]


def read_sources(config: TrainConfig) -> list[Source]:
    """The recipe's sources, captions written the way the model is to speak.

    Raises:
        ConfigError: the recipe names none.
        DataError: one cannot be read, or more than 1 % of its rows cannot be used.
    """
    if config.objective == "preference":
        return pair_sources(config.data)
    if not config.sources:
        raise ConfigError("the recipe names no sources")
    return [read_source(source, config) for source in config.learnt]


def read_source(source: SourceConfig, config: TrainConfig) -> Source:
    """One source, with the rows of it that cannot be used."""
    if source.name == SHAPES:
        examples: Sequence[Example] = shapes(source.limit or 64, config.seed)
        return Source(all_spoken(examples)[0], source.per_image, source.weight)
    if not source.name and not config.data:
        raise ConfigError("say where your pictures are: data=FOLDER")
    root = Path(config.data) if config.data else None
    reading: Reading = find_reading(source.name or config.data, root, source.split)
    reading.require_sound()
    examples = reading.examples
    if source.limit:
        examples = first_pictures(examples, source.limit)
    passed_by = len(reading.examples) - len(examples)
    if source.questions:
        from vlm.data.questions import questions_from_captions

        examples = questions_from_captions(examples, seed=config.seed)
    said, silent = all_spoken(examples)
    bad = [*reading.bad, *silent]
    return Source(said, source.per_image, source.weight, bad, passed_by=passed_by, texts=reading.texts)


def own_part(config: TrainConfig) -> Source | None:
    """The part that a person's own folder sets aside itself (`val/`), read as its training part is.

    None where the recipe sets nothing aside, learns other sources too, or the folder has no such part.

    Raises:
        DataError: it cannot be read, or more than 1 % of its rows cannot be used.
    """
    source = config.learnt[0] if len(config.learnt) == 1 else None
    if not config.holdout or source is None or source.name or source.split != "train" or not config.data:
        return None
    if own_dev(Path(config.data).expanduser()) is None:
        return None
    return read_source(replace(source, split="dev", limit=0), config)


def first_pictures(examples: Sequence[Example], count: int) -> list[Example]:
    """Everything said of the first `count` pictures."""
    names = [group_name(example.images) for example in examples]
    kept = set(list(dict.fromkeys(names))[:count])
    return [example for example, name in zip(examples, names, strict=True) if name in kept]


def set_aside(
    sources: Sequence[Source], share: float, part: Source | None = None
) -> tuple[list[Source], list[Example]]:
    """The sources without a share of their pictures, and every example of those pictures.

    Where the data has a `part` for this, nothing is taken from the sources. A fifth of one's
    own folder is what `vlm eval --split dev` asks about.

    Raises:
        DataError: there are fewer than two pictures.
    """
    if not share:
        return list(sources), []
    if part is not None:
        first = replace(sources[0], bad=[*sources[0].bad, *part.bad], texts=[*sources[0].texts, *part.texts])
        return [first, *sources[1:]], list(part.examples)
    try:
        _, held = split_by_image([e for source in sources for e in source.examples], share)
    except DataError as problem:
        raise DataError(f"{problem}: say holdout=0 to learn from everything") from None
    away = {id(example) for example in held}
    kept = [replace(s, examples=[e for e in s.examples if id(e) not in away]) for s in sources]
    return kept, held


def groups_of(sources: Sequence[Source]) -> list[Group]:
    """The sources' examples by picture.

    Raises:
        DataError: nothing is left to learn from.
    """
    groups = group_by_image(sources)
    if not groups:
        raise DataError("there are no pictures to learn from")
    return groups


def prints_of(images: Sequence[ImageSource], pictures: Sequence[Picture]) -> dict[str, Print]:
    """The prints of opened pictures, by their names."""
    return {
        name: print_of(name, picture.sha256, picture.pixels)
        for name, picture in zip(map(image_name, images), pictures, strict=True)
    }


class FeatureStore:
    """Features of the groups' pictures by group and view, from the cache; without one, all from memory.

    Everything is encoded before the first step and read from the cache afterwards: the features of one
    picture differ in their last bits between batch sizes, and a resumed run must not see that. Several
    processes begin at different places, so that each finds most of the others' work done.

    Every group's key becomes its pictures' contents, on which all drawing depends from then on.

    Args:
        looks: take the pictures' prints too, by which those that look alike are found.

    Attributes:
        bad: why pictures cannot be used, by the group's id; such groups have no features.
        prints: by the picture's name; empty unless `looks`.
    """

    def __init__(
        self,
        features: Features,
        groups: Sequence[Group],
        flip: float,
        hints: HintsConfig,
        progress: Progress,
        rank: int = 0,
        processes: int = 1,
        looks: bool = False,
    ) -> None:
        self.features, self.hints, self.looks = features, hints, looks
        self.prints: dict[str, Print] = {}
        self.bad: dict[str, ImageError] = {}
        self._keys: dict[tuple[str, str], list[str]] = {}
        self._held: dict[tuple[str, str], Tensor] = {}
        self._labels: dict[tuple[str, str], Labels] = {}
        self._first: Counter[str] = Counter()
        self._bytes = 0
        order = sorted(range(len(groups)), key=lambda i: ((i - rank) % processes, i))
        for done, index in enumerate(order):
            group = groups[index]
            try:
                self._add(group, ("whole", "flip") if flip > 0 and group.mirrors else ("whole",))
            except ImageError as problem:
                self.bad[group.id] = problem
            progress("reading pictures", done + 1, len(groups))

    def _add(self, group: Group, views: Sequence[str]) -> None:
        pictures = [open_picture(image) for image in group.images]
        if self.looks:
            self.prints |= prints_of(group.images, pictures)
        group.key = "|".join(picture.sha256 for picture in pictures)
        for view in views:
            found = self.features.see(pictures, view, scored=self.hints.count > 0)
            seen, names = found.features, self.features.encoder.labels
            self._labels[group.id, view] = likely_labels(found.scores, names, self.hints)
            self._keys[group.id, view] = [self.features.key(picture, view) for picture in pictures]
            if view == "whole":
                self._first.update(told[0][0] for told in self._labels[group.id, view] if told)
            if self._bytes < MEMORY or self.features.cache is None:
                self._held[group.id, view] = seen.half()
                self._bytes += seen.numel() * 2

    def usable(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that have features, ordered by content: the same wherever the data lies."""
        return sorted((group for group in groups if group.id not in self.bad), key=lambda group: group.key)

    def __call__(self, group: Group, view: str) -> Tensor:
        """(I, N, D_v) of the group's pictures; the whole view where there is no mirrored one."""
        name = (group.id, view) if (group.id, view) in self._keys else (group.id, "whole")
        if name in self._held:
            return self._held[name].float()
        return self.features.stored(self._keys[name])

    def labels(self, group: Group, view: str) -> Labels:
        """The encoder's labels of each of the group's pictures, in the view that `__call__` gives."""
        name = (group.id, view)
        return self._labels[name if name in self._labels else (group.id, "whole")]

    def rarity(self, label: str) -> float:
        """How much rarer a label is among the pictures' likeliest than labels are on average: the root of
        how many times; 1 for one of average number, below it for a commoner one."""
        average = self._first.total() / max(1, len(self._first))
        return math.sqrt(average / max(1, self._first[label]))

    def data_hash(self, groups: Sequence[Group]) -> str:
        """SHA-256 over the pictures' contents and everything said of them, in the groups' order."""
        total = hashlib.sha256()
        for group in groups:
            total.update("\0".join(self._keys[group.id, "whole"]).encode())
            for pairs in group.by_source:
                for pair in pairs:
                    words = "\1".join(turn.text for turn in pair.example.turns)
                    total.update(f"\n{words}\0{pair.answer}\0{pair.weight}".encode())
        return total.hexdigest()
