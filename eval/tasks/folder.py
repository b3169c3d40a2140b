"""Your own pictures: a folder with metadata.csv or metadata.jsonl (the imagefolder convention).

`folder-caption` wants the columns file_name and caption (or text; several rows a picture, or a list, are its
references); `folder-vqa` file_name, question and answer (or answers, a JSON list), and takes question_type.
Metadata may lie in a subfolder called after the split (`val` and `validation` mean dev). The folder's own is
read for every split that has none, but never for training: it is what is evaluated. Without metadata `--data`
may be anything that `vlm.data` reads: CSV, JSONL, COCO or LLaVA JSON, Parquet, WebDataset shards, a hub id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlm.config import CAPTION_DECODING, CAPTION_PROMPT
from vlm.data.convert.common import make_example, parse_json, parse_json_lines, read_text
from vlm.data.example import Example
from vlm.data.readers import read_source
from vlm.data.rows import as_text
from vlm.data.streams import SPLIT_NAMES
from vlm.data.tables import metadata_file, whole_csv
from vlm.errors import DataError
from vlm.eval.scorers import caption_scores, exact, item_scores, vqa_metrics
from vlm.eval.task import Task, question


def metadata_of(root: Path, split: str) -> Path | None:
    """The metadata that has the split; None where this is no image folder.

    Raises:
        DataError: training rows are asked for, and the folder has none but those that are evaluated.
    """
    for name in SPLIT_NAMES.get(split, ()):
        if (found := metadata_file(root / name)) is not None:
            return found
    whole = metadata_file(root)
    if whole is not None and split == "train":
        raise DataError(
            f"{root} has no training split: its one {whole.name} is what is evaluated; "
            f"give training rows a folder of their own, {root / 'train'}"
        )
    return whole


def elsewhere(root: Path, split: str, pictures: bool) -> list[Example]:
    """The examples of any other source.

    Raises:
        DataError: a row that cannot be used; in an evaluation none is left out.
    """
    reading = read_source(root, "train" if split == "all" else split, divide=False, pictures=pictures)
    if reading.bad:
        raise DataError(f"{root}: {len(reading.bad)} rows cannot be used, the first: {reading.bad[0]}")
    reading.log_left_out()
    return reading.examples


def rows(path: Path) -> list[Mapping[str, Any]]:
    """The metadata's rows; values are texts as they stand ("007", "1.50").

    Raises:
        DataError: a line that cannot be read, a row without file_name.
    """
    csv = path.suffix == ".csv"
    found = whole_csv(path) if csv else parse_json_lines(read_text(path), path, words=True)
    for number, row in enumerate(found, start=1):
        if not isinstance(row, Mapping) or not row.get("file_name") or not isinstance(row["file_name"], str):
            raise DataError(f"{path}, entry {number}: no file_name")
    return found


def _picture(path: Path, pictures: bool) -> Path:
    if pictures and not path.is_file():
        raise DataError(f"the picture {path} is missing")
    return path


def _texts(row: Mapping[str, Any], *names: str, where: str) -> list[str]:
    """The texts of the first column that has any: one, or several as a list.

    Raises:
        DataError: there are none, or one is empty or no text.
    """
    value = next((row[name] for name in names if row.get(name) not in (None, "", [])), None)
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, list | Mapping) or not as_text(item).strip() for item in items):
        raise DataError(f"{where}: no text in its column {' or '.join(names)}: {str(value)[:80]}")
    return [as_text(item) for item in items]


def read_captions(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """One example per picture, its references in the rows' order."""
    assert root is not None
    path = metadata_of(root, split)
    if path is None:
        return _together([e for e in elsewhere(root, split, pictures) if question(e) == CAPTION_PROMPT])
    captions: dict[str, list[str]] = {}
    for number, row in enumerate(rows(path), start=1):
        texts = _texts(row, "caption", "text", where=f"{path}, entry {number}")
        captions.setdefault(row["file_name"], []).extend(texts)
    return [
        make_example(_picture(path.parent / name, pictures), CAPTION_PROMPT, texts, name, {"key": name})
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
    path = metadata_of(root, split)
    if path is None:
        return [e for e in elsewhere(root, split, pictures) if question(e) != CAPTION_PROMPT]
    examples = []
    for number, row in enumerate(rows(path)):
        where = f"{path}, entry {number + 1}"
        asked = row.get("question")
        if not isinstance(asked, str) or not asked.strip():
            raise DataError(f"{where}: no text in its column question: {str(asked)[:80]}")
        answers = _texts(row, "answers", "answer", where=where)
        if len(answers) == 1 and answers[0].startswith("["):  # a CSV's list
            answers = _texts({"answers": parse_json(answers[0], where, words=True)}, "answers", where=where)
        meta = {"key": as_text(row.get("id")) or str(number)}
        if kind := as_text(row.get("question_type")):
            meta["question_type"] = kind
        image = _picture(path.parent / row["file_name"], pictures)
        examples.append(make_example(image, asked, answers, f"{split}/{meta['key']}", meta))
    return examples


TASKS = (
    Task(
        name="folder-vqa",
        about="your own questions: metadata.csv or .jsonl beside the pictures",
        read=read_questions,
        main="exact_match",
        score=item_scores({"exact_match": exact, **vqa_metrics("folder-vqa")}),
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
        generation=CAPTION_DECODING,
        id_key="file_name",
        answer_key="caption",
    ),
)
