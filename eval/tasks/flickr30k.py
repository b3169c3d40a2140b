"""Flickr30k captions on Karpathy's split: 1,000 test pictures, five captions each (Young et al. 2014)."""

from __future__ import annotations

from pathlib import Path

from vlm.data.example import Example
from vlm.eval.scorers import object_caption_scores
from vlm.eval.task import Published
from vlm.eval.tasks import hub
from vlm.eval.tasks.layouts import KARPATHY, caption_example, caption_task, karpathy

FOLDERS = ("flickr30k-images", "flickr30k_images", "Images", "images", "")


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """dataset_flickr30k.json, and the pictures in flickr30k-images; or the Parquet of nlphuji/flickr30k.

    The hub's one part, called test, holds every picture with the name of its split.
    """
    if hub.holds(root):
        return [
            caption_example(entry.image, map(str.strip, entry.texts("caption")), entry.text("filename"))
            for entry in hub.entries(root, split, pictures, names=("test",))
            if entry["split"] in KARPATHY[split]
        ]
    return karpathy(root, split, pictures, "dataset_flickr30k.json", FOLDERS)


TASKS = (
    caption_task(
        "flickr30k",
        "captions of photographs, Karpathy's split",
        read=read,
        score=object_caption_scores,
        split="test",
        splits=("train", "dev", "test"),
        published=(Published("cider", 67.2, "Flamingo-80B, no shots, arXiv:2204.14198, Karpathy test"),),
    ),
)
