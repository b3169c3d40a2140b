"""Your own pictures: a folder with metadata.csv or metadata.jsonl (the imagefolder convention).

`folder-caption` wants the columns file_name and caption (or text; several rows a picture are several
references); `folder-vqa` file_name, question and answer (or answers, a JSON list), and takes question_type.
Metadata may lie in a subfolder called after the split. Without metadata `--data` may be anything that
`vlm.data` reads: a CSV or JSONL file, COCO or LLaVA JSON, Parquet, WebDataset shards, a hub id.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.config import CAPTION_PROMPT
from vlm.data.convert.common import first_existing, make_example, read_text
from vlm.data.example import Example
from vlm.data.readers import read_source
from vlm.errors import DataError
from vlm.eval.scorers import caption_scores, exact, item_scores, normalised, strict
from vlm.eval.task import Task, question

METADATA = ("metadata.csv", "metadata.jsonl")


def has_metadata(root: Path, split: str) -> bool:
    """Whether this is an image folder."""
    return any((folder / name).is_file() for folder in (root, root / split) for name in METADATA)


def elsewhere(root: Path, split: str) -> list[Example]:
    """The examples of any other source.

    Raises:
        DataError: a row that cannot be used; in an evaluation none is left out.
    """
    reading = read_source(root, "train" if split == "all" else split, divide=False)
    if reading.bad:
        raise DataError(f"{root}: {len(reading.bad)} rows cannot be used, the first: {reading.bad[0]}")
    return reading.examples


def rows(root: Path, split: str) -> tuple[Path, list[dict[str, Any]]]:
    """The folder that pictures are named from, and the metadata's rows; CSV values are strings as they stand.

    Raises:
        DataError: no metadata, a line that cannot be read, a row without file_name.
    """
    folder = root / split if (root / split).is_dir() else root
    path = first_existing(folder, METADATA, "metadata")
    text = read_text(path)
    found: list[dict[str, Any]] = []
    if path.suffix == ".csv":
        found = list(csv.DictReader(io.StringIO(text, newline="")))
    else:
        for number, line in enumerate(text.splitlines(), start=1):
            try:
                found += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number} is not JSON: {error.msg}") from None
    for number, row in enumerate(found, start=1):
        if not isinstance(row, dict) or not row.get("file_name"):
            raise DataError(f"{path}, entry {number}: no file_name")
    return folder, found


def _picture(folder: Path, name: str, pictures: bool) -> Path:
    path = folder / name
    if pictures and not path.is_file():
        raise DataError(f"the picture {path} is missing")
    return path


def read_captions(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """One example per picture, its references in the rows' order."""
    assert root is not None
    if not has_metadata(root, split):
        return _together([e for e in elsewhere(root, split) if question(e) == CAPTION_PROMPT])
    folder, found = rows(root, split)
    captions: dict[str, list[str]] = {}
    for row in found:
        text = row.get("caption") or row.get("text")
        if not text:
            raise DataError(f"{row['file_name']} has no caption: a column caption or text is needed")
        captions.setdefault(row["file_name"], []).append(str(text))
    return [
        make_example(_picture(folder, name, pictures), CAPTION_PROMPT, texts, name, {"key": name})
        for name, texts in captions.items()
    ]


def _together(examples: list[Example]) -> list[Example]:
    """One example per picture: rows about one picture are its references."""
    by_picture: dict[object, Example] = {}
    for example in examples:
        first = by_picture.setdefault(example.images[0], example)
        if first is not example:
            by_picture[example.images[0]] = replace(first, answers=(*first.answers, *example.answers))
    return list(by_picture.values())


def read_questions(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """One example per row."""
    assert root is not None
    if not has_metadata(root, split):
        return [e for e in elsewhere(root, split) if question(e) != CAPTION_PROMPT]
    folder, found = rows(root, split)
    examples = []
    for number, row in enumerate(found):
        answers = row.get("answers") or [row.get("answer")]
        if isinstance(answers, str):
            answers = json.loads(answers) if answers.startswith("[") else [answers]
        if not row.get("question") or not answers or not all(answers):
            raise DataError(f"{row['file_name']}, row {number + 1}: a question and an answer are needed")
        meta = {"key": str(row.get("id") or number)}
        if row.get("question_type"):
            meta["question_type"] = str(row["question_type"])
        examples.append(
            make_example(
                _picture(folder, row["file_name"], pictures),
                str(row["question"]),
                map(str, answers),
                f"{split}/{meta['key']}",
                meta,
            )
        )
    return examples


TASKS = (
    Task(
        name="folder-vqa",
        about="your own questions: metadata.csv or .jsonl beside the pictures",
        read=read_questions,
        main="exact_match",
        score=item_scores(
            {"exact_match": exact, "accuracy_strict": strict, "accuracy_normalised": normalised}
        ),
        split="test",
        splits=("train", "dev", "test", "all"),
        generation={"max_new_tokens": 24},
    ),
    Task(
        name="folder-caption",
        about="your own captions: metadata.csv or .jsonl beside the pictures",
        read=read_captions,
        main="cider",
        score=caption_scores,
        captions=True,
        split="test",
        splits=("train", "dev", "test", "all"),
        generation={"num_beams": 3, "max_new_tokens": 32},
        id_key="file_name",
        answer_key="caption",
    ),
)
