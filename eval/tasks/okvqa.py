"""OK-VQA: questions that need outside knowledge (Marino et al. 2019)."""

from __future__ import annotations

from pathlib import Path

from vlm.data.example import Example
from vlm.eval.scorers import vqa_scores
from vlm.eval.task import Published, Task
from vlm.eval.tasks import hub
from vlm.eval.tasks.layouts import vqa_example, vqa_pairs

HUB_PARTS = {"train": ("train2014", "train"), "test": ("val2014", "validation", "val")}


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """The official questions and annotations files, or lmms-lab/OK-VQA; its test part is COCO's val."""
    if hub.holds(root):
        return [vqa_example(entry) for entry in hub.entries(root, split, pictures, names=HUB_PARTS[split])]
    part = "val2014" if split == "test" else "train2014"
    questions = f"OpenEnded_mscoco_{part}_questions.json"
    return vqa_pairs(root, pictures, questions, f"mscoco_{part}_annotations.json", part)


TASKS = (
    Task(
        name="okvqa",
        about="questions that need outside knowledge, 10 answers",
        read=read,
        main="accuracy_strict",
        score=vqa_scores("okvqa"),
        split="test",
        splits=("train", "test"),
        generation={"max_new_tokens": 12},
        published=(
            Published("accuracy_strict", 14.9, "question only, Marino et al. 2019, arXiv:1906.00067, test"),
            Published("accuracy_strict", 26.4, "MUTAN, Marino et al. 2019, arXiv:1906.00067, test"),
            Published("accuracy_strict", 50.6, "Flamingo-80B, no shots, arXiv:2204.14198, test"),
        ),
    ),
)
