"""Local tables with pictures beside them: image folders, CSV, TSV, JSON lines, JSON lists."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from vlm.data.convert.common import IMAGE_SUFFIXES, read_text
from vlm.data.example import Example
from vlm.data.rows import (
    IMAGE_COLUMNS,
    KNOWN_COLUMNS,
    BadRow,
    Find,
    Item,
    RowError,
    TextRow,
    examples_from_row,
    known_column,
    load_json,
    picture_finder,
)
from vlm.errors import DataError

METADATA = ("metadata.jsonl", "metadata.csv")
CELL_LIMIT = 1 << 24
DELIMITERS = (",", ";", "\t")
MANY_LINES = 10
"""So many lines of a cell that look like rows are no text."""
Rows = Iterator[tuple[str, Mapping[str, Any] | BadRow]]


def csv_rows(text: str, name: str, delimiter: str = ",", columns: Sequence[str] = ()) -> Rows:
    """(place, row) of a CSV text with a header; columns of one name (five "caption"s) become a list.

    A place is the line that a row begins in; where a quote is not closed every line that it takes is a
    `BadRow`. `columns` are those of a text without header.

    Raises:
        DataError: there is no header.
    """
    csv.field_size_limit(CELL_LIMIT)
    blank = len(text) - len(text.lstrip("\r\n"))
    if said := re.match(r"sep=(.)[\r\n]+", text[blank:], re.IGNORECASE):  # Excel's word for the delimiter
        delimiter, blank = said[1], blank + said.end()
    before = text[:blank].count("\n") or text[:blank].count("\r")
    delimiter = delimiter if columns else _delimiter(text[blank:], delimiter)
    reader = csv.reader(io.StringIO(text[blank:], newline=""), delimiter=delimiter, strict=True)
    try:
        header = list(columns) or [cell.strip() for cell in next(reader, [])]
    except csv.Error as error:
        raise DataError(f"{name} has a header row that is not CSV: {error}") from None
    if not any(header):
        raise DataError(f"{name} has no header row (file_name,text or file_name,question,answer)")
    while True:
        first = before + reader.line_num + 1
        place = f"{name}:{first}"
        try:
            cells = next(reader, None)
        except csv.Error as error:
            last = before + reader.line_num
            yield from _broken(name, first, last) if last > first else (
                (place, BadRow(place, "not CSV", str(error))),
            )  # fmt: skip
            continue
        if cells is None:
            return
        if not any(cell.strip() for cell in cells):
            continue
        if _swallowed(cells, header, delimiter):
            yield from _broken(name, first, before + reader.line_num)
        elif len(cells) != len(header):
            yield place, BadRow(place, "wrong number of cells", f"{len(cells)} instead of {len(header)}")
        else:
            yield place, _by_column(header, cells)


def _by_column(header: Sequence[str], cells: Sequence[str]) -> dict[str, Any]:
    """The row as column -> cell; those of columns that share a name are a list."""
    row: dict[str, Any] = {}
    for column, cell in zip(header, cells, strict=True):
        row[column] = [*row[column], cell] if isinstance(row.get(column), list) else (
            [row[column], cell] if column in row else cell
        )  # fmt: skip
    return row


def _broken(name: str, first: int, last: int) -> Rows:
    """A `BadRow` for each line that a broken quote took: each may have been a row."""
    why = f"lines {first} to {last} read as one row"
    for place in (f"{name}:{line}" for line in range(first, last + 1)):
        yield place, BadRow(place, "quote is not closed", why)


def _swallowed(cells: Sequence[str], header: Sequence[str], delimiter: str) -> bool:
    """Whether a cell of several lines holds rows: its quote is not closed, and that of a later row ends it.

    A line is a row if it has as many cells as the header and names a picture where this row does; where none
    is named, nearly all of many lines must have as many cells.
    """
    if len(header) < 2 or not any("\n" in cell or "\r" in cell for cell in cells):
        return False
    column = next((n for n, name in enumerate(header) if known_column(name) in IMAGE_COLUMNS), len(header))
    own = PurePath(cells[column].strip()).suffix.lower() if column < len(cells) else ""
    kinds = {*IMAGE_SUFFIXES, own} - {""}
    for cell in cells:
        lines = re.split(r"\r\n?|\n", cell)[1:]
        rows = [row for row in csv.reader(lines, delimiter=delimiter) if len(row) == len(header)]
        if any(PurePath(cell.strip()).suffix.lower() in kinds for row in rows for cell in row[column:][:1]):
            return True
        if len(rows) >= max(MANY_LINES, 0.9 * len(lines)):
            return True
    return False


def _delimiter(text: str, usual: str) -> str:
    """What separates the cells: the mark that makes most known columns of the header; else the usual one."""
    header = text.splitlines()[0] if text else ""

    def known(mark: str) -> int:
        return sum(known_column(cell.strip('" ')) in KNOWN_COLUMNS for cell in header.split(mark))

    return max((usual, *DELIMITERS), key=known)


def mark_of(path: Path) -> str:
    """What separates the cells of a file of this name."""
    return "\t" if path.suffix.lower() == ".tsv" else ","


def whole_csv(path: Path, columns: Sequence[str] = ()) -> list[Mapping[str, Any]]:
    """Every row of a CSV or TSV file; `columns` are those of a file that does not name them.

    Raises:
        DataError: the file is missing or has no header; a row cannot be used.
    """
    rows: list[Mapping[str, Any]] = []
    for _, row in csv_rows(read_text(path), str(path), mark_of(path), columns):
        if isinstance(row, BadRow):
            raise DataError(str(row))
        rows.append(row)
    return rows


def jsonl_rows(text: str, name: str) -> Rows:
    """(place, row) of a text with one JSON object a line; a broken line is a `BadRow`."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{name}:{number}"
        try:
            row = load_json(line, once=True)
        except (json.JSONDecodeError, RecursionError) as error:
            deep = isinstance(error, RecursionError)
            yield place, BadRow(place, "not JSON", "nested too deeply" if deep else str(error))
            continue
        yield place, row if isinstance(row, dict) else BadRow(place, "not a JSON object", line[:60])


def json_list_rows(table: list[Any], name: str) -> Rows:
    """(place, row) of a JSON list of objects, as LLaVA's instruction files are."""
    for number, row in enumerate(table):
        place = f"{name}[{number}]"
        yield place, row if isinstance(row, dict) else BadRow(place, "not a JSON object", str(row)[:60])


def to_examples(rows: Rows, pictures: Path | Find) -> Iterator[Item]:
    """Rows -> examples, and the rows that give none; pictures lie below a folder or are found."""
    find = picture_finder(pictures) if isinstance(pictures, Path) else pictures
    for place, row in rows:
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            examples = examples_from_row(row, place, find)
            _whole_characters(examples, place)
        except RowError as error:
            yield BadRow(place, error.cause, error.detail)
            continue
        yield from examples
        if not examples:
            yield TextRow(place)


def _whole_characters(examples: Sequence[Example], place: str) -> None:
    """Raises:
    RowError: a text holds half a character (JSON can escape one), which can be neither read nor written.
    """
    ids = [each.id for each in examples if not each.id.startswith(place)]
    texts = [text for each in examples for text in (*(turn.text for turn in each.turns), *each.answers)]
    try:
        "".join((*ids, *texts)).encode()
    except UnicodeEncodeError as error:
        raise RowError("half a character", repr(error.object[error.start])) from None


def text_rows(path: Path, text: str | None = None) -> Rows:
    """The rows of a CSV, TSV or JSONL file (by its suffix).

    Raises:
        DataError: the file is missing, not UTF-8, or has no header.
    """
    content = read_text(path) if text is None else text
    if path.suffix.lower() == ".jsonl":
        return jsonl_rows(content, path.name)
    return csv_rows(content, path.name, mark_of(path))


def metadata_file(folder: Path) -> Path | None:
    """The table of an image folder, or None.

    Raises:
        DataError: there are two.
    """
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in inside if path.name.lower() in METADATA and path.is_file()]
    if len(found) > 1:
        raise DataError(f"{folder} has both {found[0].name} and {found[1].name}: remove one")
    return found[0] if found else None


def read_image_folder(folder: Path, pictures: bool = True) -> Iterator[Item]:
    """The examples of a folder with `metadata.csv` or `metadata.jsonl` (the imagefolder convention).

    `pictures=False`: they need not be there.

    Raises:
        DataError: the folder has no such file, or two.
    """
    path = metadata_file(folder)
    if path is None:
        raise DataError(f"{folder} has no metadata.csv or metadata.jsonl (columns file_name and text)")
    return to_examples(text_rows(path), picture_finder(folder, needed=pictures))
