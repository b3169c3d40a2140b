"""VQA v2: open questions about COCO pictures, ten answers each (Goyal et al. 2017)."""

from __future__ import annotations

from pathlib import Path

from vlm.data.example import Example
from vlm.eval.scorers import vqa_scores
from vlm.eval.task import Published, Task
from vlm.eval.tasks import hub
from vlm.eval.tasks.layouts import vqa_example, vqa_pairs

HIDDEN = ("test-dev", "test")  # of the second the first is a part; both are about COCO's test2015
HUB_PARTS = {"test-dev": ("testdev",)}


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The official questions and annotations files, and the pictures beside them; or lmms-lab/VQAv2."""
    hidden = split in HIDDEN
    if hub.holds(root):
        names = HUB_PARTS.get(split, ())
        return [vqa_example(e) for e in hub.entries(root, split, pictures, names=names, hidden=hidden)]
    if hidden:
        return vqa_pairs(root, pictures, f"v2_OpenEnded_mscoco_{split}2015_questions.json", None, "test2015")
    part = "val2014" if split == "dev" else f"{split}2014"
    questions = f"v2_OpenEnded_mscoco_{part}_questions.json"
    return vqa_pairs(root, pictures, questions, f"v2_mscoco_{part}_annotations.json", part)


TASKS = (
    Task(
        name="vqav2",
        about="open questions about COCO pictures, 10 answers",
        read=read,
        main="accuracy_strict",
        score=vqa_scores("vqav2"),
        split="dev",
        splits=("train", "dev", *HIDDEN),
        hidden=HIDDEN,
        generation={"max_new_tokens": 12},
        published=(
            Published(
                "accuracy_strict", 26.0, "answering yes, Goyal et al. 2017, arXiv:1612.00837, test-std"
            ),
            Published(
                "accuracy_strict", 44.3, "question only, Goyal et al. 2017, arXiv:1612.00837, test-std"
            ),
            Published("accuracy_strict", 56.3, "Flamingo-80B, no shots, arXiv:2204.14198, test-dev"),
            Published("accuracy_strict", 65.0, "BLIP-2 FlanT5-XXL, no shots, arXiv:2301.12597, test-dev"),
        ),
    ),
)
