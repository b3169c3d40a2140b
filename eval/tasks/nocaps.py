"""NoCaps: captions of objects that COCO's captions do not have (Agrawal et al. 2019), by domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vlm.data.example import Example
from vlm.errors import DataError
from vlm.eval.scorers import caption_scores
from vlm.eval.task import Published, Scores
from vlm.eval.tasks import hub
from vlm.eval.tasks.layouts import (
    Pictures,
    caption_example,
    caption_task,
    image_info,
    load,
    rows_of,
    text_of,
)

HIDDEN = ("test",)


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The official file of a part, and its pictures; or lmms-lab/NoCaps, which lacks the domains."""
    hidden = split in HIDDEN
    if hub.holds(root):
        found = hub.entries(root, split, pictures, hidden=hidden)
        return [
            caption_example(e.image, e.published("annotations_captions"), e.text("image_id"), domain="")
            for e in found
        ]
    if hidden:
        return image_info(root, pictures, "nocaps_test_image_info.json", ("test", "images", ""))
    path, found = load(root, ["nocaps_val_4500_captions.json", "nocaps_val.json"], "NoCaps file")
    find = Pictures(root, ("val", "images", "validation", ""), pictures)
    captions: dict[str, list[str]] = {}
    for row in rows_of(found, path, "annotations"):
        captions.setdefault(text_of(row, "image_id", path), []).append(text_of(row, "caption", path))
    examples = []
    for row in rows_of(found, path, "images"):
        id = text_of(row, "id", path)
        if id not in captions:
            raise DataError(f"{path}: picture {id} has no caption")
        image = find(text_of(row, "file_name", path))
        examples.append(caption_example(image, captions[id], id, domain=str(row.get("domain", ""))))
    return examples


def score(examples: Sequence[Example], answers: Sequence[str], *, java: bool = True) -> Scores:
    """Caption scores, by domain too."""
    return caption_scores(examples, answers, java=java, by=("domain",))


TASKS = (
    caption_task(
        "nocaps",
        "captions of novel objects, by domain",
        read=read,
        score=score,
        split="dev",
        splits=("dev", "test"),
        hidden=HIDDEN,
        train=None,
        published=(
            Published("cider", 65.8, "ClipCap, frozen GPT-2, arXiv:2111.09734, val"),
            Published("cider", 121.6, "BLIP-2 FlanT5-XL, trained on COCO, arXiv:2301.12597, val"),
        ),
    ),
)
