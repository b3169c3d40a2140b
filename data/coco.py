"""The COCO family's JSON files: captions, VQA questions with annotations, and the split files of Karpathy.

captions_*.json      {"images": [{"id", "file_name"}], "annotations": [{"image_id", "caption"}]}
*_questions.json     {"questions": [{"question_id", "image_id", "question"}]}
*_annotations.json   {"annotations": [{"question_id", "answers": [{"answer"}, ...]}]}
dataset_*.json       {"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from vlm.config import CAPTION_PROMPT
from vlm.data.convert.common import make_example, read_text
from vlm.data.example import Example
from vlm.data.rows import BadRow, as_text, existing, load_json
from vlm.errors import DataError

_PART = re.compile(r"images|(?:train|val|trainval|test|test-dev|unlabeled)(?:20\d\d)?(?:[-_]images)?")
"""Folders of pictures beside a folder of annotations."""
KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "dev", "test": "test"}


def read_json(path: Path) -> Any:
    """A JSON file with its numbers as text.

    Raises:
        DataError: it is missing or not JSON.
    """
    try:
        return load_json(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        lines = getattr(error, "msg", "") == "Extra data"
        hint = " (a file with one object a line is to end in .jsonl)" if lines else ""
        raise DataError(f"{path} is not JSON: {error}{hint}") from None


def kind_of(table: Any) -> str | None:
    """`captions`, `questions`, `annotations`, `karpathy` or None."""
    if not isinstance(table, dict):
        return None
    if isinstance(table.get("questions"), list):
        return "questions"
    images, notes = table.get("images"), table.get("annotations")
    if isinstance(images, list) and images and isinstance(images[0], dict) and "sentences" in images[0]:
        return "karpathy"
    if isinstance(notes, list) and notes and isinstance(notes[0], dict):
        if isinstance(images, list) and "caption" in notes[0]:
            return "captions"
        if "question_id" in notes[0]:
            return "annotations"
    return None


class Pictures:
    """Finds a picture by name: in the JSON file's `images/`, its folder and the folders in that; then one
    level up, where COCO's pictures lie beside its `annotations/`: there in `images/`, in folders that are
    called after a part (`val2014`), and in the folder itself, never in another set's folder."""

    def __init__(self, base: Path) -> None:
        self.base = base

    @cached_property
    def folders(self) -> list[Path]:
        """Where pictures may lie, in this order."""
        base = self.base
        own = [folder for folder in sorted(base.iterdir()) if folder.is_dir()]
        first = [folder for folder in own if folder.name.lower() == "images"]
        above = [f for f in sorted(base.parent.iterdir()) if _PART.fullmatch(f.name.lower()) and f.is_dir()]
        return list(dict.fromkeys([*first, base, *own, *above, base.parent]))

    def find(self, name: str) -> Path | None:
        """The first file of that name, or None."""
        return next((path for folder in self.folders if (path := existing(folder, name))), None)


def read_captions(table: dict[str, Any], path: Path) -> Iterator[Example | BadRow]:
    """One example per picture, with all its captions."""
    pictures = Pictures(path.parent)
    texts: dict[str, list[str]] = {}
    for number, note in enumerate(table["annotations"]):
        if not isinstance(note, dict):
            yield BadRow(f"{path.name} annotation {number}", "not a JSON object", str(note)[:60])
            continue
        texts.setdefault(as_text(note.get("image_id")), []).append(as_text(note.get("caption")).strip())
    for number, entry in enumerate(table["images"]):
        if not isinstance(entry, dict):
            yield BadRow(f"{path.name} image entry {number}", "not a JSON object", str(entry)[:60])
            continue
        id, name = as_text(entry.get("id")), as_text(entry.get("file_name"))
        found = pictures.find(name)
        captions = [text for text in texts.pop(id, []) if text]
        if found is None:
            yield BadRow(f"{path.name} image {id}", "picture missing", name)
        elif not captions:
            yield BadRow(f"{path.name} image {id}", "empty text", name)
        else:
            yield make_example(found, CAPTION_PROMPT, captions, f"coco/{id}", {"task": "caption"})
    for id in texts:
        yield BadRow(f"{path.name} image {id}", "annotation of an unknown picture")


def _vqa_picture(entry: dict[str, Any], subtype: str, pictures: Pictures) -> Path | None:
    named = as_text(entry.get("image") or entry.get("file_name"))
    if named:
        return pictures.find(named)
    number = as_text(entry.get("image_id"))
    names = [f"COCO_{subtype}_{number:0>12}.jpg", f"{number:0>12}.jpg", f"{number}.jpg", f"{number}.png"]
    return next((found for name in names if (found := pictures.find(name))), None)


def _annotations_beside(path: Path, ids: set[str]) -> dict[str, dict[str, Any]]:
    for other in sorted(path.parent.glob("*.json")):
        if other == path or "annotation" not in other.name:
            continue
        table = read_json(other)
        if kind_of(table) == "annotations":
            dicts = [note for note in table["annotations"] if isinstance(note, dict)]
            notes = {as_text(note.get("question_id")): note for note in dicts}
            if not ids.isdisjoint(notes):
                return notes
    raise DataError(f"no annotations file with answers to {path.name} lies beside it")


def _answers(note: dict[str, Any]) -> list[str]:
    """Every annotator's answer; the one that was chosen of them, where only that is there."""
    several = note.get("answers")
    given = several if isinstance(several, list) else []
    found = [as_text(item.get("answer") if isinstance(item, dict) else item).strip() for item in given]
    chosen = as_text(note.get("multiple_choice_answer")).strip()
    return found if any(found) or not chosen else [chosen]


def read_questions(table: dict[str, Any], path: Path) -> Iterator[Example | BadRow]:
    """One example per question, with every annotator's answer.

    Raises:
        DataError: no annotations file for these questions lies beside the file.
    """
    pictures = Pictures(path.parent)
    questions = [entry for entry in table["questions"] if isinstance(entry, dict)]
    notes = _annotations_beside(path, {as_text(entry.get("question_id")) for entry in questions})
    subtype = as_text(table.get("data_subtype"))
    for number, entry in enumerate(table["questions"]):
        if not isinstance(entry, dict):
            yield BadRow(f"{path.name} entry {number}", "not a JSON object", str(entry)[:60])
            continue
        id = as_text(entry.get("question_id"))
        place = f"{path.name} question {id}"
        note = notes.get(id, {})
        answers = _answers(note)
        found = _vqa_picture(entry, subtype, pictures)
        if found is None:
            yield BadRow(place, "picture missing", as_text(entry.get("image_id")))
        elif not as_text(entry.get("question")).strip():
            yield BadRow(place, "empty question")
        elif not any(answers):
            yield BadRow(place, "empty answer", as_text(entry.get("question"))[:60])
        else:
            kinds = {k: as_text(note[k]) for k in ("question_type", "answer_type") if note.get(k)}
            meta = {"task": "vqa"} | kinds
            yield make_example(
                found, as_text(entry.get("question")), filter(None, answers), f"vqa/{id}", meta
            )


def read_karpathy(table: dict[str, Any], path: Path, split: str) -> Iterator[Example | BadRow]:
    """One example per picture of a split, with all its captions."""
    pictures = Pictures(path.parent)
    for number, entry in enumerate(table["images"]):
        if not isinstance(entry, dict):
            yield BadRow(f"{path.name}[{number}]", "not a JSON object", str(entry)[:60])
            continue
        if KARPATHY_SPLITS.get(as_text(entry.get("split"))) != split:
            continue
        name = as_text(entry.get("filename"))
        folder = as_text(entry.get("filepath"))
        found = pictures.find(f"{folder}/{name}" if folder else name) or pictures.find(name)
        captions = [
            as_text(s.get("raw")).strip() for s in entry.get("sentences") or [] if isinstance(s, dict)
        ]
        if found is None:
            yield BadRow(f"{path.name}[{number}]", "picture missing", name)
        elif not any(captions):
            yield BadRow(f"{path.name}[{number}]", "empty text", name)
        else:
            yield make_example(found, CAPTION_PROMPT, filter(None, captions), name, {"task": "caption"})
