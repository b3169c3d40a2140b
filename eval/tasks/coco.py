"""COCO captions on Karpathy's split: 5,000 dev and 5,000 test pictures, five captions each."""

from __future__ import annotations

from pathlib import Path

from vlm.data.example import Example
from vlm.eval.task import Published
from vlm.eval.tasks.layouts import COCO_FOLDERS, caption_task, karpathy


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """dataset_coco.json, and the pictures in val2014 and train2014."""
    return karpathy(root, split, pictures, "dataset_coco.json", COCO_FOLDERS)


TASKS = (
    caption_task(
        "coco-captions",
        "captions of COCO pictures, Karpathy's split",
        read=read,
        split="test",
        splits=("train", "dev", "test"),
        published=(
            Published("cider", 84.3, "Flamingo-80B, no shots, arXiv:2204.14198, test"),
            Published("cider", 113.1, "ClipCap, frozen GPT-2, arXiv:2111.09734, Karpathy test"),
            Published("cider", 145.8, "BLIP-2 ViT-g OPT-2.7B, fine-tuned, arXiv:2301.12597, Karpathy test"),
        ),
    ),
)
