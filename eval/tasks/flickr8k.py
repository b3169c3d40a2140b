"""Flickr8k captions: photographs with five captions each (Hodosh, Young and Hockenmaier, JAIR 47, 2013)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from vlm.config import CAPTION_DECODING
from vlm.data.example import Example
from vlm.data.sources import read_dataset
from vlm.eval.scorers import object_caption_scores
from vlm.eval.task import Published, Task


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """One example per photograph; without `pictures` only the captions and the list are read."""
    return read_dataset("flickr8k", root, split, pictures=pictures)


def keyed(examples: Sequence[Example]) -> list[Example]:
    """Questions made from captions, known in results files by their photograph and what follows its name."""
    return [
        replace(e, meta=MappingProxyType({**e.meta, "key": e.id.removeprefix("flickr8k/")})) for e in examples
    ]


TASKS = (
    Task(
        name="flickr8k",
        about="captions of photographs, 5 references",
        read=read,
        main="cider",
        score=object_caption_scores,
        captions=True,
        split="dev",
        splits=("train", "dev", "test"),
        generation=CAPTION_DECODING,
        id_key="image_id",
        answer_key="caption",
        published=(
            Published("cider", 48.1, "Tanti et al. 2018, arXiv:1703.09137, frozen VGG-19, test"),
            Published("bleu_4", 21.3, "Xu et al. 2015, arXiv:1502.03044, Table 1, hard attention, test"),
            Published("meteor", 20.3, "Xu et al. 2015, arXiv:1502.03044, Table 1, hard attention, test"),
        ),
    ),
)
