"""The benchmarks by name. A task's file is imported when it is asked for.

A new benchmark is one file with a `TASKS` tuple and one line in the table below; its fixture, prompt snapshot
and expected scores go into tests/eval/test_tasks.py.
"""

from __future__ import annotations

import difflib
import importlib

from vlm.errors import UsageError
from vlm.eval.task import Task

_MODULES = {
    "flickr8k": "flickr8k",
    "flickr8k-yesno": "flickr8k_questions",
    "flickr8k-questions": "flickr8k_questions",
    "flickr8k-pope": "flickr8k_pope",
    "easy-vqa": "easy_vqa",
    "daquar": "daquar",
    "daquar-reduced": "daquar",
    "daquar-random": "daquar",
    "vqav2": "vqav2",
    "okvqa": "okvqa",
    "aokvqa": "aokvqa",
    "aokvqa-choice": "aokvqa",
    "textvqa": "textvqa",
    "vizwiz": "vizwiz",
    "gqa": "gqa",
    "vqa-rad": "vqa_rad",
    "scienceqa-img": "scienceqa",
    "pope": "pope",
    "nlvr": "nlvr",
    "coco-captions": "coco",
    "flickr30k": "flickr30k",
    "nocaps": "nocaps",
    "folder-vqa": "folder",
    "folder-caption": "folder",
}
TASKS = tuple(_MODULES)


def get(name: str) -> Task:
    """The task of a name ("easy_vqa" and "Easy-VQA" are "easy-vqa").

    Raises:
        UsageError: there is no such task; the nearest name is given.
    """
    plain = name.lower().replace("_", "-")
    if plain not in _MODULES:
        near = difflib.get_close_matches(plain, TASKS, n=1)
        hint = f"did you mean {near[0]}?" if near else "`vlm eval --list` shows them all"
        raise UsageError(f"there is no task {name!r}; {hint}")
    tasks: tuple[Task, ...] = importlib.import_module(f"vlm.eval.tasks.{_MODULES[plain]}").TASKS
    return next(task for task in tasks if task.name == plain)
