"""Flickr8k captions: photographs with five captions each (Hodosh, Young and Hockenmaier, JAIR 47, 2013)."""

from __future__ import annotations

from pathlib import Path

from vlm.config import CAPTION_PROMPT
from vlm.data.convert import flickr8k
from vlm.data.convert.common import first_existing, make_example
from vlm.data.example import Example
from vlm.data.sources import read_dataset
from vlm.data.splits import canonical_split
from vlm.errors import DataError
from vlm.eval.scorers import object_caption_scores
from vlm.eval.task import Published, Task

BEAMS = 3


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """One example per photograph; without `pictures` only the captions and the list are read."""
    assert root is not None
    if pictures:
        return read_dataset("flickr8k", root, split)
    folder = root / "flickr8k" if (root / "flickr8k").is_dir() else root
    captions = flickr8k.read_captions(first_existing(folder, flickr8k.CAPTION_FILES, "caption file"))
    names = flickr8k.split_names(folder, canonical_split(split))
    if bare := [name for name in names if name not in captions]:
        raise DataError(f"{len(bare)} photographs of {split} have no caption, the first is {bare[0]}")
    return [make_example(name, CAPTION_PROMPT, captions[name], f"flickr8k/{name}") for name in names]


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
        generation={"num_beams": BEAMS, "max_new_tokens": 32},
        id_key="image_id",
        answer_key="caption",
        published=(
            Published("cider", 48.1, "Tanti et al. 2018, arXiv:1703.09137, frozen VGG-19, test"),
            Published("bleu_4", 21.3, "Xu et al. 2015, arXiv:1502.03044, Table 1, hard attention, test"),
            Published("meteor", 20.3, "Xu et al. 2015, arXiv:1502.03044, Table 1, hard attention, test"),
        ),
    ),
)
