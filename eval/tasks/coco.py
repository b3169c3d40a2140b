"""COCO captions on Karpathy's split: 5,000 dev and 5,000 test pictures, five captions each.

`test2014` is COCO's own test part, whose captions nobody has but its server.
"""

from __future__ import annotations

from pathlib import Path

from vlm.data.example import Example
from vlm.eval.task import Published
from vlm.eval.tasks.layouts import COCO_FOLDERS, caption_task, image_info, karpathy

HIDDEN = ("test2014",)


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """dataset_coco.json, and the pictures in val2014 and train2014; image_info_test2014.json and test2014."""
    if split in HIDDEN:
        return image_info(root, pictures, "image_info_test2014.json", COCO_FOLDERS)
    return karpathy(root, split, pictures, "dataset_coco.json", COCO_FOLDERS)


TASKS = (
    caption_task(
        "coco-captions",
        "captions of COCO pictures, Karpathy's split",
        read=read,
        split="test",
        splits=("train", "dev", "test", *HIDDEN),
        hidden=HIDDEN,
        published=(
            Published("cider", 84.3, "Flamingo-80B, no shots, arXiv:2204.14198, test"),
            Published("cider", 113.1, "ClipCap, frozen GPT-2, arXiv:2111.09734, Karpathy test"),
            Published("cider", 145.8, "BLIP-2 ViT-g OPT-2.7B, fine-tuned, arXiv:2301.12597, Karpathy test"),
        ),
    ),
)
