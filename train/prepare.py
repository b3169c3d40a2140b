"""From a recipe to what the loop needs: examples grouped by picture, with their features in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from vlm.config import CAPTION_PROMPT
from vlm.data.collate import Group, Source
from vlm.data.example import Example
from vlm.data.sources import read_dataset
from vlm.data.text import normalise_caption
from vlm.errors import ConfigError
from vlm.features import Features
from vlm.images import open_picture
from vlm.train.config import TrainConfig

MEMORY = 6 << 30
"""Bytes of features held in memory; the rest is read from the cache, step by step."""

Progress = Callable[[str, int, int], None]


def read_sources(config: TrainConfig) -> list[Source]:
    """The recipe's sources, captions written the way the model is to speak.

    Raises:
        ConfigError: the recipe names none.
        DataError: one cannot be read.
    """
    if not config.sources:
        raise ConfigError("the recipe names no sources")
    root = Path(config.data) if config.data else None
    sources = []
    for source in config.sources:
        examples = read_dataset(source.name or config.data, root, source.split)
        if source.questions:
            from vlm.data.questions import questions_from_captions

            examples = questions_from_captions(examples, seed=config.seed)
        sources.append(Source([spoken(e) for e in examples], source.per_image, source.weight))
    return sources


def spoken(example: Example) -> Example:
    """Captions in lower case without the final full stop; other answers as they are."""
    if example.turns[-1].text != CAPTION_PROMPT:
        return example
    answers = tuple(filter(None, map(normalise_caption, example.answers)))
    return Example(example.images, example.turns, answers, example.id, example.meta)


class FeatureStore:
    """Features of the groups' pictures by group and view, always from the cache.

    Everything is encoded before the first step and read from the cache afterwards: the features of one
    picture differ in their last bits between batch sizes, and a resumed run must not see that.
    """

    def __init__(self, features: Features, groups: Sequence[Group], flip: float, progress: Progress) -> None:
        self.features = features
        self._keys: dict[tuple[str, str], list[str]] = {}
        self._held: dict[tuple[str, str], Tensor] = {}
        held = 0
        for number, group in enumerate(groups):
            pictures = [open_picture(image) for image in group.images]
            for view in ("whole", "flip") if flip > 0 and group.mirrors else ("whole",):
                seen = features(pictures, view)
                self._keys[group.id, view] = [features.key(picture, view) for picture in pictures]
                if held < MEMORY:
                    self._held[group.id, view] = seen.half()
                    held += seen.numel() * 2
            progress("reading pictures", number + 1, len(groups))

    def __call__(self, group: Group, view: str) -> Tensor:
        """(I, N, D_v) of the group's pictures; the whole view where there is no mirrored one."""
        name = (group.id, view) if (group.id, view) in self._keys else (group.id, "whole")
        if name in self._held:
            return self._held[name].float()
        return self.features.stored(self._keys[name])
