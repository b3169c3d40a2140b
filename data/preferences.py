"""Preference pairs: two answers to one question about pictures, the first of which people preferred.

They come as JSON lines, pictures named relative to the file,

    {"images": ["images/ab12.jpg"], "question": "What is this?", "chosen": "a cat", "rejected": "a dog"}

where `turns` may stand for `question` (that is what `vlm serve feedback export` writes), or straight from the
database of `vlm serve --feedback`. Both give the same pairs in the same order.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.conversation import Conversation, ImageSlot, PreferencePair, Turn
from vlm.data.rows import Find, RowError, picture_finder
from vlm.errors import DataError
from vlm.preferences import OPINIONS, PICTURE, make_pairs

EXPORTED = "pairs.jsonl"
"""The file that an export's folder holds."""
SQLITE = b"SQLite format 3\0"
"""How every SQLite file begins."""


@dataclass(frozen=True)
class Preferences:
    """The pairs of a file, and how many of its rows or opinions make none."""

    pairs: list[PreferencePair]
    unused: int = 0


def read_preferences(path: Path) -> Preferences:
    """The pairs of a JSONL file, of an export's folder, or of a feedback database.

    Raises:
        DataError: the file is missing or cannot be read, or a line is no pair; the message names the line.
    """
    if path.is_dir():
        path = path / EXPORTED
    try:
        with open(path, "rb") as file:
            database = file.read(len(SQLITE)) == SQLITE
        if database:
            return _read_database(path)
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path} cannot be read: {problem}") from problem
    return _collected(_rows(text, path), picture_finder(path.parent))


def _rows(text: str, path: Path) -> Iterator[tuple[str, str, Any]]:
    """Of every line that is not empty: its place, the name of a pair that says none, its JSON."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", f"{path.stem}-{number}", json.loads(line)
            except (json.JSONDecodeError, RecursionError) as problem:
                raise DataError(f"{path}:{number}: not JSON ({problem})") from problem


def _collected(rows: Iterable[tuple[str, str, Any]], find: Find, unused: int = 0) -> Preferences:
    """The pairs of rows with their places and names; what makes none is added to `unused`."""
    pairs = []
    for place, name, row in rows:
        try:
            pair = pair_of(row, name, find)
        except RowError as problem:
            said = problem.cause + (f" ({problem.detail})" if problem.detail else "")
            raise DataError(f"{place}: {said}") from problem
        if pair is None:
            unused += 1
        else:
            pairs.append(pair)
    return Preferences(pairs, unused)


def _read_database(path: Path) -> Preferences:
    """Reads without writing, beside a server that writes."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=10)) as db:
            rows, unused = make_pairs(db.execute(OPINIONS).fetchall())
            pictures: dict[str, bytes] = {}
            for name in {name for row in rows for name in row["images"]}:
                found = db.execute(PICTURE, (name,)).fetchone()
                if found is None:
                    raise DataError(f"{path}: a picture of an opinion is missing ({name})")
                pictures[name] = found[0]
    except (sqlite3.Error, ValueError, TypeError, KeyError) as problem:
        raise DataError(f"{path} is no feedback database: {problem}") from problem
    named = ((f"{path}: {row['id']}", row["id"], row) for row in rows)
    return _collected(named, pictures.__getitem__, unused)


def pair_of(row: Any, name: str, find: Find) -> PreferencePair | None:
    """The pair of one JSON object; None where an answer is blank, as in exports of older servers.

    Args:
        name: the pair's id where it says none.
        find: what a picture's name stands for; raises `RowError`.

    Raises:
        RowError: it is no pair at all.
    """
    if not isinstance(row, Mapping):
        raise RowError("not a JSON object", str(row)[:60])
    chosen, rejected = (_text(row, key).strip() for key in ("chosen", "rejected"))
    if not chosen or not rejected:
        return None
    if chosen == rejected:
        raise RowError("chosen and rejected are the same answer", chosen[:60])
    images = row.get("images", [])
    if not isinstance(images, list):
        raise RowError("images is no list", str(images)[:60])
    pictures = tuple(find(image) for image in images)
    if "question" in row:
        conversation = Conversation.ask(pictures, _text(row, "question"))
    else:
        try:
            conversation = Conversation(pictures, _turns(row.get("turns")))
        except ValueError as problem:
            raise RowError("turns and images do not fit", str(problem)) from None
    return PreferencePair(conversation, chosen, rejected, str(row.get("id", name)))


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise RowError(f"{key} is no text" if key in row else f"{key} is missing")
    return value


def _turns(value: Any) -> tuple[Turn, ...]:
    """The turns of a conversation that the user ends."""
    if not isinstance(value, list) or not value:
        raise RowError("neither question nor turns")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping) or turn.get("role") not in ("user", "assistant"):
            raise RowError("a turn is neither the user's nor the assistant's", str(turn)[:60])
        parts = turn.get("parts")
        if not isinstance(parts, list):
            raise RowError("a turn has no list of parts", str(turn)[:60])
        turns.append(Turn(turn["role"], tuple(map(_part, parts))))
    if turns[-1].role != "user":
        raise RowError("the last turn is not the user's")
    return tuple(turns)


def _part(value: Any) -> str | ImageSlot:
    if isinstance(value, Mapping):
        if isinstance(text := value.get("text"), str):
            return text
        if type(index := value.get("image")) is int:
            return ImageSlot(index)
    raise RowError("a part is neither text nor image", str(value)[:60])
