"""`vlm data remember`: the captioned pictures of any source become a memory that answers can draw on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from vlm.checkpoint import adapter_folder, model_config, read_config
from vlm.config import MemoryConfig
from vlm.conversation import ImageSource
from vlm.data.collate import image_name
from vlm.data.readers import read_source
from vlm.data.text import normalise_caption
from vlm.errors import DataError
from vlm.features import FeatureCache, Features
from vlm.images import ImageError, Picture, open_picture
from vlm.memory import SETTINGS, Memory, pooled
from vlm.vision import load_encoder
from vlm.weights import resolve

TOGETHER = 64
"""Decoded pictures in memory at a time."""

Progress = Callable[[str, int, int], None]


@dataclass
class Remembered:
    """What became of a source's pictures.

    Attributes:
        memory: everything remembered, what was there before included.
        new: pictures that were not known before.
        bad: why pictures could not be read, a line each.
    """

    memory: Memory
    new: int = 0
    bad: list[str] = field(default_factory=list)


def adapter_features(
    adapter: str, *, offline: bool = False, device: str = "cpu", cache: Path | None = None
) -> Features:
    """The eyes of an adapter without its language model.

    Raises:
        WeightsError: the adapter or the encoder is missing or damaged.
    """
    folder = adapter_folder(adapter, offline=offline)
    vision = model_config(folder, read_config(folder)).vision
    found = resolve(vision.encoder, offline=offline)
    encoder = load_encoder(vision, found).to(device)
    return Features(encoder, found.frozen_hash, None if cache is None else FeatureCache(cache))


def remember(
    source: str | Path,
    folder: Path,
    features: Features,
    *,
    split: str = "train",
    count: int | None = None,
    least: float | None = None,
    progress: Progress | None = None,
) -> Remembered:
    """Adds a source's captioned pictures to the memory in `folder`, which is made if it is not there.

    Args:
        source: anything that `read_source` takes.
        count, least: of `MemoryConfig`; None keeps what the memory says (a new one: the defaults).

    Raises:
        DataError: nothing to read, no captions, or the folder holds the memory of another encoder.
        ConfigError: `count` or `least` is out of range.
    """
    begun = (folder / SETTINGS).exists()
    memory = Memory.load(folder, features) if begun else Memory(features, MemoryConfig())
    memory.config = MemoryConfig(
        memory.config.count if count is None else count, memory.config.least if least is None else least
    )
    captioned = captions_by_picture(source, split)
    done = Remembered(memory)
    pictures = list(captioned)
    for begin in range(0, len(pictures), TOGETHER):
        part = pictures[begin : begin + TOGETHER]
        _add([captioned[name] for name in part], features, done)
        if progress:
            progress("remembering", begin + len(part), len(pictures))
    if len(memory):
        memory.save(folder)
    return done


def captions_by_picture(
    source: str | Path, split: str = "train", *, divide: bool = False
) -> dict[str, tuple[ImageSource, list[str]]]:
    """Each picture of a part with its captions, written the way the model speaks.

    Args:
        split: of several parts, with + between them (`train+dev`), each picture is there once.
        divide: of a source with one part only, `dev` is a fifth (else it has `train` only).

    Raises:
        DataError: a part cannot be read, or none holds captions.
    """
    found: dict[str, tuple[ImageSource, list[str]]] = {}
    parts = [read_source(source, part, divide=divide).checked() for part in split.split("+")]
    for example in itertools.chain.from_iterable(parts):
        if example.meta.get("task") != "caption" or len(example.images) != 1:
            continue
        captions = list(filter(None, map(normalise_caption, example.answers)))
        if captions:
            image = example.images[0]
            found.setdefault(image_name(image), (image, []))[1].extend(captions)
    if not found:
        raise DataError(f"the {split} part of {source} holds no captions")
    return found


def _add(captioned: Iterable[tuple[ImageSource, list[str]]], features: Features, done: Remembered) -> None:
    """Adds some pictures; only those that are new are encoded, each once."""
    memory = done.memory
    fresh: dict[str, tuple[Picture, list[str]]] = {}
    for image, captions in captioned:
        try:
            picture = open_picture(image)
        except ImageError as problem:
            done.bad.append(str(problem))
            continue
        if picture.sha256 in memory.captions:
            memory.add(picture.sha256, captions)
        else:
            fresh.setdefault(picture.sha256, (picture, []))[1].extend(captions)
    vectors = pooled(features([picture for picture, _ in fresh.values()]))
    for (sha256, (_, captions)), vector in zip(fresh.items(), vectors, strict=True):
        done.new += memory.add(sha256, captions, vector)
