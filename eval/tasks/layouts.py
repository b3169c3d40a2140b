"""What the readers of benchmarks share: entries that must be right, official JSON, pictures, VQA's pairs.

An entry is one row of a benchmark, whether official JSON or the hub's Parquet (see `hub.py`) holds it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.config import CAPTION_DECODING, CAPTION_PROMPT
from vlm.conversation import ImageSource
from vlm.data.convert.common import first_existing, make_example, parse_json, parse_json_lines, read_text
from vlm.data.example import Example
from vlm.errors import DataError
from vlm.eval.scorers import caption_scores
from vlm.eval.task import Task

_COCO_PARTS = ("val2014", "train2014", "test2014", "test2015", "val2017", "train2017", "test2017")
_COCO_BASES = ("images/", "Images/", "Images/mscoco/")
COCO_FOLDERS = ("", "images", *_COCO_PARTS, *(base + part for base in _COCO_BASES for part in _COCO_PARTS))
"""Beside the annotations, or as VQA's toolkit has them."""
KARPATHY = {"dev": ("val",), "train": ("train", "restval"), "test": ("test",)}


@dataclass(frozen=True)
class Entry:
    """One row of a benchmark.

    Attributes:
        where: its file, and its row where the file has rows; for messages.
        row: column -> value, without the picture.
        image: the picture.
        number: its place in its split, from 0.
        hidden: the benchmark keeps the answers of this split, so that there may be none.
    """

    where: str | Path
    row: Mapping[str, Any]
    image: ImageSource
    number: int = 0
    hidden: bool = False

    def __getitem__(self, name: str) -> Any:
        """A column's value.

        Raises:
            DataError: the entry has none.
        """
        return field(self.row, name, self.where)

    def text(self, name: str) -> str:
        """A column's words; numbers are written out.

        Raises:
            DataError: the entry has none, or a list or an object instead.
        """
        return text_of(self.row, name, self.where)

    def listed(self, name: str) -> list[Any]:
        """A column's values.

        Raises:
            DataError: the entry has none, or no list of them.
        """
        return rows_of(self.row, self.where, name)

    def texts(self, name: str) -> list[str]:
        """A column's texts, not all of them empty: plain ones, or VQA's objects with an "answer".

        Raises:
            DataError: there are none, or one is no text.
        """
        found = [
            text_of(each if isinstance(each, Mapping) else {"answer": each}, "answer", self.where)
            for each in self.listed(name)
        ]
        if not any(found):
            raise DataError(f"{self.where}: {name!r} is empty: {str(dict(self.row))[:80]}")
        return found

    def published(self, name: str) -> list[str]:
        """A column's texts as `texts` gives them; none where the benchmark keeps them."""
        return [] if self.kept(name) else self.texts(name)

    def kept(self, name: str) -> bool:
        """Whether the benchmark keeps what this column would say: it is absent, null or only empty texts in a
        split whose answers are hidden. Anywhere else a missing column is an error."""
        found = self.row.get(name) if self.hidden else True
        if isinstance(found, list):
            return not any(each.get("answer") if isinstance(each, Mapping) else each for each in found)
        return found in (None, "")


def load(root: Path | None, names: Sequence[str], what: str) -> tuple[Path, Any]:
    """The first of the files that exists, and its JSON.

    Raises:
        DataError: none exists, or it is no JSON; the line is named.
    """
    assert root is not None
    path = first_existing(root, names, what)
    return path, parse_json(read_text(path), path)


def json_lines(root: Path | None, names: Sequence[str], what: str) -> tuple[Path, list[Any]]:
    """The first of the files that exists, one JSON value a line.

    Raises:
        DataError: none exists, or a line is no JSON.
    """
    assert root is not None
    path = first_existing(root, names, what)
    return path, parse_json_lines(read_text(path), path)


def field(row: Any, name: str, where: str | Path) -> Any:
    """`row[name]`.

    Raises:
        DataError: the entry has no such field, or null there.
    """
    if not isinstance(row, Mapping) or row.get(name) is None:
        raise DataError(f"{where}: an entry has no {name!r}: {str(row)[:80]}")
    return row[name]


def text_of(row: Any, name: str, where: str | Path) -> str:
    """`row[name]` as words; numbers are written out.

    Raises:
        DataError: the entry has no such field, or no text and no number there.
    """
    found = field(row, name, where)
    if isinstance(found, bool) or not isinstance(found, str | int | float) or found != found:
        raise DataError(f"{where}: {name!r} is no text: {str(found)[:80]}")
    return str(found)


def rows_of(table: Any, where: str | Path, name: str | None = None) -> list[Any]:
    """A file's rows: the list that it is, or the one that it has under a name.

    Raises:
        DataError: there is no list.
    """
    found = table if name is None else field(table, name, where)
    if not isinstance(found, list):
        said = "a list of entries is expected, got" if name is None else f"{name!r} is no list:"
        raise DataError(f"{where}: {said} {str(found)[:80]}")
    return found


def rows_by_id(table: Any, where: str | Path) -> Mapping[str, Any]:
    """A file's rows by their ids.

    Raises:
        DataError: it is no object.
    """
    if not isinstance(table, Mapping):
        raise DataError(f"{where}: an object of entries by id is expected, got {str(table)[:80]}")
    return table


def known(kind: Any, kinds: Sequence[str], id: Any, where: str | Path) -> str:
    """`kind`, if it is one of `kinds`.

    Raises:
        DataError: it is not.
    """
    if kind not in kinds:
        raise DataError(
            f"{where}: question {id} has the unknown answer type {kind!r}; known: {', '.join(kinds)}"
        )
    return str(kind)


class Pictures:
    """Finds a picture below a root in the folders where people keep it."""

    def __init__(self, root: Path | None, folders: Iterable[str], needed: bool) -> None:
        assert root is not None
        self.root, self.needed = root, needed
        self.folders = [root / name for name in dict.fromkeys(folders) if (root / name).is_dir()]

    def __call__(self, *names: str) -> Path:
        """The path of the picture under the first of its names that is there.

        Raises:
            DataError: none is, and pictures are needed.
        """
        if not self.needed:
            return Path(names[0])
        for folder in self.folders:
            for name in names:
                if (folder / name).is_file():
                    return folder / name
        raise DataError(f"the picture {names[0]} is missing below {self.root}")


def coco_names(row: Any, part: str, where: str | Path) -> tuple[str, ...]:
    """The file names of the COCO picture of a row's `image_id`: of `part` ("val2014") and of 2017.

    Raises:
        DataError: its id is no whole number.
    """
    id = text_of(row, "image_id", where)
    if not id.isdecimal():
        raise DataError(f"{where}: 'image_id' is no whole number: {id[:80]}")
    number = f"{int(id):012d}.jpg"
    return (f"COCO_{part}_{number}", number)


def chosen_of(entry: Entry, options: str, right: str) -> tuple[list[str], list[str]]:
    """(the choices, the right one of them) from the columns of the choices and of the right one's number.

    Raises:
        DataError: there is no right one, and it is not that the benchmark keeps it.
    """
    listed = entry.texts(options)
    if entry.kept(right):
        return listed, []
    number = entry[right]
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < len(listed):
        raise DataError(f"{entry.where}: {right!r} is {number!r} of {len(listed)} choices: {listed}")
    return listed, [listed[number]]


def vqa_example(entry: Entry) -> Example:
    """A question with VQA's annotations.

    Raises:
        DataError: a field is missing, the answer type is unknown.
    """
    id = entry.text("question_id")
    if entry.kept("answers"):
        return make_example(entry.image, entry.text("question"), (), id, {"key": id})
    meta = {
        "key": id,
        "question_type": str(entry.row.get("question_type", "")),
        "answer_type": known(entry["answer_type"], ("yes/no", "number", "other"), id, entry.where),
    }
    return make_example(entry.image, entry.text("question"), entry.texts("answers"), id, meta)


def caption_example(image: ImageSource, captions: Iterable[str], key: str, **meta: str) -> Example:
    """A picture and its captions."""
    return make_example(image, CAPTION_PROMPT, captions, key, {"key": key, **meta})


def vqa_pairs(
    root: Path | None, pictures: bool, questions: str, annotations: str | None, part: str
) -> list[Example]:
    """The examples of an official VQA pair of files: questions, and ten answers each.

    The files lie side by side, or as VQA's toolkit has them (Questions/, Annotations/, Images/mscoco/).
    Where the benchmark keeps the annotations they have no name. `part` is that of COCO's pictures.

    Raises:
        DataError: a question without annotation, an unknown answer type, a missing picture.
    """
    question_path, asked = load(root, beside(questions, "Questions", "questions"), "question file")
    notes = _annotations(root, annotations) if annotations else None
    find = Pictures(root, COCO_FOLDERS, pictures)
    examples = []
    for row in rows_of(asked, question_path, "questions"):
        asks = {name: text_of(row, name, question_path) for name in ("question_id", "question")}
        image = find(*coco_names(row, part, question_path))
        if notes is None:
            examples.append(vqa_example(Entry(question_path, asks, image, hidden=True)))
            continue
        path, by_id = notes
        if asks["question_id"] not in by_id:
            raise DataError(f"{path} has no annotation for question {asks['question_id']}")
        examples.append(vqa_example(Entry(path, by_id[asks["question_id"]] | asks, image)))
    return examples


def _annotations(root: Path | None, name: str) -> tuple[Path, dict[str, Any]]:
    """VQA's file of annotations, and its rows by their questions' ids."""
    path, said = load(root, beside(name, "Annotations"), "annotation file")
    by_id: dict[str, Any] = {}
    for row in rows_of(said, path, "annotations"):
        id = text_of(row, "question_id", path)
        if id in by_id:
            raise DataError(f"{path}: question {id} is annotated twice")
        by_id[id] = row
    return path, by_id


def beside(name: str, *folders: str) -> list[str]:
    """Where a file of annotations may lie: in the root, in one of the folders, in `annotations`."""
    return [name, *(f"{folder}/{name}" for folder in (*folders, "annotations"))]


def karpathy(
    root: Path | None, split: str, pictures: bool, name: str, folders: Sequence[str]
) -> list[Example]:
    """The captioning examples of one of Karpathy's splits ("dev" is its "val").

    Raises:
        DataError: the file or a picture is missing, an entry lacks a field.
    """
    path, found = load(root, [name, f"annotations/{name}", f"karpathy/{name}"], "Karpathy's split")
    find = Pictures(root, folders, pictures)
    examples = []
    for row in rows_of(found, path, "images"):
        if field(row, "split", path) in KARPATHY[split]:
            file = text_of(row, "filename", path)
            texts = [text_of(each, "raw", path).strip() for each in rows_of(row, path, "sentences")]
            key = str(row.get("cocoid", file))
            places = (f"{row['filepath']}/{file}", file) if row.get("filepath") else (file,)
            examples.append(caption_example(find(*places), texts, key))
    return examples


def image_info(root: Path | None, pictures: bool, name: str, folders: Sequence[str]) -> list[Example]:
    """The pictures of a part whose captions the benchmark keeps: COCO's JSON with `images` alone.

    Raises:
        DataError: the file or a picture is missing, an entry lacks a field.
    """
    path, found = load(root, beside(name), "list of the part's pictures")
    find = Pictures(root, folders, pictures)
    return [
        caption_example(find(text_of(row, "file_name", path)), (), text_of(row, "id", path))
        for row in rows_of(found, path, "images")
    ]


def caption_task(name: str, about: str, **rest: Any) -> Task:
    """A captioning task with the usual decoding and the official results format."""
    usual: dict[str, Any] = {
        "main": "cider",
        "score": caption_scores,
        "captions": True,
        "generation": CAPTION_DECODING,
    }
    return Task(name=name, about=about, id_key="image_id", answer_key="caption", **(usual | rest))
