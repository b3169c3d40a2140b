"""What people thought of answers, in SQLite, and the preference pairs that come of it.

Nothing is stored without consent. Pictures are kept without their metadata (a photograph's place and time),
at most 1,024 pixels a side, once each. `export` writes what `vlm train prefer` reads: one JSON object a line,

    {"id": "feedback-7", "images": ["images/ab12....jpg"],
     "turns": [{"role": "user", "parts": [{"image": 0}, {"text": "What is this?"}]}],
     "chosen": "a cat", "rejected": "a dog"}

What makes a pair is said in `vlm.preferences`; the rest is counted as unused.
"""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from vlm.conversation import Conversation, ImageSlot
from vlm.errors import DataError, VLMError
from vlm.preferences import OPINIONS, PICTURE, make_pairs

_SIDE = 1024
_SCHEMA = """
CREATE TABLE IF NOT EXISTS pictures (sha256 TEXT PRIMARY KEY, jpeg BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS feedback (
    id INTEGER PRIMARY KEY,
    created TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%SZ', 'now')),
    model TEXT NOT NULL,
    conversation TEXT NOT NULL,
    answer TEXT NOT NULL,
    verdict TEXT NOT NULL CHECK (verdict IN ('up', 'down')),
    correction TEXT
);
"""


class FeedbackFull(VLMError):
    """The store has reached the size that its owner set."""


@dataclass(frozen=True)
class Exported:
    """What an export found."""

    pairs: int
    unused: int
    pictures: int


class FeedbackStore:
    """One SQLite file; safe to call from several threads.

    Raises:
        DataError: the file cannot be opened or is no feedback store.
    """

    def __init__(self, path: Path, *, max_entries: int = 100_000, max_bytes: int = 2 << 30) -> None:
        self._path = path
        self._max_entries, self._max_bytes = max_entries, max_bytes
        self._lock = threading.Lock()
        try:
            new = not path.exists()
            path.touch(mode=0o600)
            with self._open() as db:
                db.executescript(_SCHEMA)
                if new:
                    db.execute("PRAGMA journal_mode=WAL")
        except (OSError, sqlite3.Error) as error:
            raise DataError(f"feedback database {path} cannot be used: {error}") from error

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with self._lock, closing(sqlite3.connect(self._path, timeout=10)) as db, db:
            yield db

    def add(
        self, conversation: Conversation, pictures: Sequence[Image.Image], answer: str, verdict: str,
        correction: str | None = None, model: str = "",
    ) -> int:  # fmt: skip
        """Store one opinion; returns its number.

        Args:
            pictures: RGB images, one for each of `conversation.images`.

        Raises:
            FeedbackFull: the store holds as much as it may.
        """
        jpegs = {}
        names = []
        for picture in pictures:
            data = _jpeg(picture)
            names.append(hashlib.sha256(data).hexdigest())
            jpegs[names[-1]] = data
        text = json.dumps(_plain(conversation, names), ensure_ascii=False, sort_keys=True)
        with self._open() as db:
            entries = db.execute("SELECT count(*) FROM feedback").fetchone()[0]
            pages, size = (db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
            if entries >= self._max_entries or pages * size + sum(map(len, jpegs.values())) > self._max_bytes:
                raise FeedbackFull("the feedback store is full")
            db.executemany("INSERT OR IGNORE INTO pictures VALUES (?, ?)", jpegs.items())
            cursor = db.execute(
                "INSERT INTO feedback (model, conversation, answer, verdict, correction)"
                " VALUES (?, ?, ?, ?, ?)",
                (model, text, answer, verdict, correction),
            )
            return int(cursor.lastrowid or 0)

    def __len__(self) -> int:
        with self._open() as db:
            return int(db.execute("SELECT count(*) FROM feedback").fetchone()[0])

    def export(self, folder: Path) -> Exported:
        """Write `pairs.jsonl` and its pictures into a folder (made if missing; pairs are replaced).

        Raises:
            DataError: the folder cannot be written.
        """
        with self._open() as db:
            pairs, unused = make_pairs(db.execute(OPINIONS).fetchall())
            wanted = sorted({name for pair in pairs for name in pair["images"]})
            try:
                (folder / "images").mkdir(parents=True, exist_ok=True)
                for name in wanted:
                    found = db.execute(PICTURE, (name,)).fetchone()
                    (folder / "images" / f"{name}.jpg").write_bytes(found[0])
                lines = [json.dumps(_with_paths(pair), ensure_ascii=False) + "\n" for pair in pairs]
                (folder / "pairs.jsonl").write_text("".join(lines), encoding="utf-8")
            except OSError as error:
                raise DataError(f"{folder} cannot be written: {error.strerror}") from error
        return Exported(len(pairs), unused, len(wanted))


def _jpeg(picture: Image.Image) -> bytes:
    """RGB pixels as a JPEG. The image is made anew: Pillow would write a source's comment again."""
    small = Image.new("RGB", picture.size)
    small.paste(picture)
    small.thumbnail((_SIDE, _SIDE))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=95)
    return out.getvalue()


def _plain(conversation: Conversation, names: Sequence[str]) -> dict[str, Any]:
    turns = []
    for turn in conversation.turns:
        parts = [{"image": p.index} if isinstance(p, ImageSlot) else {"text": p} for p in turn.parts]
        turns.append({"role": turn.role, "parts": parts})
    return {"images": list(names), "turns": turns}


def _with_paths(pair: dict[str, Any]) -> dict[str, Any]:
    return {**pair, "images": [f"images/{name}.jpg" for name in pair["images"]]}
