"""Your own pictures: a folder with metadata.csv or metadata.jsonl (the imagefolder convention).

`folder-caption` wants the columns file_name and caption (or text; several rows a picture, or a list, are its
references); `folder-vqa` file_name, question and answer (or answers, a JSON list), and takes question_type.
Metadata may lie in a subfolder called after the split (`val` and `validation` mean dev). The folder's own is
read for the splits that have none: whole for `test` and `all`, and as training divides it for `dev` (a fifth
of the pictures) and `train-rest`. Without metadata `--data` may be any other source: CSV, JSONL, COCO or
LLaVA JSON, Parquet, WebDataset shards, a hub id. All is read by `vlm.data`, as for training.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from vlm.config import CAPTION_DECODING, CAPTION_PROMPT
from vlm.data.example import Example
from vlm.data.readers import Reading, divided, part_folders, read_source
from vlm.data.splits import image_key
from vlm.data.tables import metadata_file
from vlm.errors import DataError
from vlm.eval.scorers import caption_scores, exact, item_scores, vqa_metrics
from vlm.eval.task import Task, question

DIVIDED = ("dev", "train-rest")
SPLITS = ("train", "train-rest", "dev", "test", "all")


def table_folder(root: Path, split: str) -> tuple[Path | None, bool]:
    """The image folder that has the split, and whether the split is one of two parts that it is divided into.

    None where there is no such folder: another source, or a part that is not there.
    """
    if not root.is_dir():
        return None, False
    below = part_folders(root)
    own = below.get("train" if split == "train-rest" else split)
    if metadata_file(root):
        return (own, False) if own else (root, split in DIVIDED)
    if split in DIVIDED and "dev" not in below:
        return below.get("train"), True
    return own, False


def part_name(root: Path | None, split: str) -> str:
    """`all` for a split that is all of a folder's own table; else its name."""
    if root is None:
        return split
    root = root.expanduser()
    place, part = table_folder(root, split)
    return "all" if place == root and not part else split


def _sound(root: Path, reading: Reading) -> Reading:
    """Raises:
    DataError: a row cannot be used; in an evaluation none is left out.
    """
    if reading.bad:
        raise DataError(
            f"{root}: {len(reading.bad)} rows cannot be used, and an evaluation leaves none out; "
            f"the first: {reading.bad[0]}"
        )
    reading.log_left_out()
    return reading


def read(root: Path, split: str, pictures: bool, *, captions: bool) -> list[Example]:
    """The captions of a split, or its questions, by ids that do not depend on how the folder is divided.

    Raises:
        DataError: a row cannot be used, or there are only rows of the other kind.
    """
    root = root.expanduser()
    place, part = table_folder(root, split)
    if place is None:
        whole = "train" if split == "all" else split
        reading = _sound(root, read_source(root, whole, divide=split in DIVIDED, pictures=pictures))
    else:
        # A folder is divided by its pictures, copies under other names told by their bytes.
        reading = _sound(place, read_source(place, "train", divide=False, pictures=pictures or part))
        found = reading.examples
        reading.examples = _captions(found, place) if captions else _questions(found, place, split)
        reading = divided(reading, split) if part else reading
    found = [each for each in reading.examples if (question(each) == CAPTION_PROMPT) == captions]
    if reading.examples and not found:
        held, task = ("questions", "folder-vqa") if captions else ("captions", "folder-caption")
        raise DataError(f"{root} holds {held} only, in split {split}: score them with {task}")
    return found


def _captions(examples: list[Example], place: Path) -> list[Example]:
    """The same, called by their pictures' names."""
    return [_called(each, name, name) for each in examples for name in [_names(each, place)]]


def _questions(examples: list[Example], place: Path, split: str) -> list[Example]:
    """The same, called by their table's ids; where it has none, by the number of their row."""
    table = metadata_file(place)
    numbers: dict[str, int] = {}
    for each in examples:
        numbers.setdefault(each.id, len(numbers))
    keys = [
        str(numbers[each.id]) if table and each.id.startswith(f"{table.name}:") else each.id
        for each in examples
    ]
    return [_called(each, f"{split}/{key}", key) for each, key in zip(examples, keys, strict=True)]


def _called(example: Example, id: str, key: str) -> Example:
    kind = {"question_type": example.meta["question_type"]} if "question_type" in example.meta else {}
    return replace(example, id=id, meta=MappingProxyType({"key": key, **kind}))


def _names(example: Example, place: Path) -> str:
    """A picture as the folder's table names it; a name that is no UTF-8 is spelled out."""
    paths = [Path(each) if isinstance(each, str | Path) else Path(image_key(each)) for each in example.images]
    inside = [path.relative_to(place) if path.is_relative_to(place) else path for path in paths]
    names = ",".join(path.as_posix().replace("\\", "/") for path in inside)
    return names.encode("utf-8", "backslashreplace").decode()


def read_captions(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """One example per picture, its references in the rows' order."""
    assert root is not None
    by_pictures: dict[object, Example] = {}
    for example in read(root, split, pictures, captions=True):
        first = by_pictures.setdefault(example.images, example)
        if first is not example:
            by_pictures[example.images] = replace(first, answers=(*first.answers, *example.answers))
    return list(by_pictures.values())


def read_questions(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """One example per question."""
    assert root is not None
    return read(root, split, pictures, captions=False)


TASKS = (
    Task(
        name="folder-vqa",
        about="your own questions: metadata.csv or .jsonl beside the pictures",
        read=read_questions,
        main="exact_match",
        score=item_scores({"exact_match": exact, **vqa_metrics("folder-vqa")}),
        split="test",
        splits=SPLITS,
        part=part_name,
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
        splits=SPLITS,
        part=part_name,
        generation=CAPTION_DECODING,
        id_key="file_name",
        answer_key="caption",
    ),
)
