"""Flickr30k captions on Karpathy's split: 1,000 test pictures, five captions each (Young et al. 2014)."""

from __future__ import annotations

from pathlib import Path

from vlm.data.example import Example
from vlm.eval.scorers import object_caption_scores
from vlm.eval.task import Published
from vlm.eval.tasks.layouts import caption_task, karpathy

FOLDERS = ("flickr30k-images", "flickr30k_images", "Images", "images", "")


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """dataset_flickr30k.json, and the pictures in flickr30k-images."""
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
