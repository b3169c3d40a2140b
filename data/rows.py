"""One row of a user's table -> examples, whatever its columns are called.

    file_name, text                        a caption (or several, as a list)
    file_name, question, answer | answers  a question (a row may hold a caption too: both are taken)
    image, conversations | messages        LLaVA or chat layout: one example per assistant turn

Column names are read in any case (`File Name`). Every value is read as text: "007" stays "007", `true` and
`N/A` stay words. A row that cannot be used is a `BadRow` that says why; nothing is dropped in silence.

Instruction files hold conversations about no picture among the others, and question sets questions whose
picture is null. Nothing is wrong with such a `TextRow`; it is left out and counted.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from vlm.config import CAPTION_PROMPT
from vlm.conversation import ImageSlot, ImageSource, Turn
from vlm.data.convert.common import each_once
from vlm.data.example import Example

IMAGE_COLUMNS = (
    "file_name", "file_names", "image", "images", "image_path", "image_file", "filepath", "file_path", "path",
    "img", "filename", "jpg", "jpeg", "png", "webp", "gif",
)  # fmt: skip
CAPTION_COLUMNS = ("text", "caption", "captions", "txt", "description", "sentence", "sentences")
QUESTION_COLUMNS = ("question", "query")
ANSWER_COLUMNS = ("answers", "answer", "multiple_choice_answer", "response")
SEVERAL = frozenset(("answers", "captions", "sentences"))
ONE_OR_SEVERAL = frozenset(("answer", "caption", "text"))
TALK_COLUMNS = ("conversations", "messages", "conversation")
ID_COLUMNS = ("id", "question_id", "__key__")
KNOWN_COLUMNS = frozenset(
    (*IMAGE_COLUMNS, *CAPTION_COLUMNS, *QUESTION_COLUMNS, *ANSWER_COLUMNS, *TALK_COLUMNS, *ID_COLUMNS)
)
ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "bot": "assistant",
    "system": "system", "developer": "system",
}  # fmt: skip
PLACEHOLDER = "<image>"
_LIST = re.compile(r"\s*\[")
_QUOTED_LIST = re.compile(r"""\s*\[\s*(["']).*\1\s*\]\s*$""", re.DOTALL)

Find = Callable[[Any], ImageSource]


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used: where it stands, the cause (a short fixed phrase), what was found."""

    where: str
    cause: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.cause}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True)
class TextRow:
    """A sound row that is about no picture, by where it stands: there is nothing in it for an adapter."""

    where: str


Item = Example | BadRow | TextRow
"""What a reader finds in a row."""


class RowError(Exception):
    """Why a row cannot be used; its reader turns it into a `BadRow`."""

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.detail = detail


def load_json(text: str, *, once: bool = False) -> Any:
    """JSON with its numbers left as they are written ("1.50" stays "1.50").

    Raises:
        json.JSONDecodeError: it is not JSON, or (`once`) an object has a key twice.
    """
    pairs = each_once if once else None
    return json.loads(text, object_pairs_hook=pairs, parse_int=str, parse_float=str, parse_constant=str)


def as_text(value: Any) -> str:
    """A cell as text: strings as they are, truth values in lower case, nothing as the empty string."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return str(value)


def _first(row: Mapping[str, Any], names: Sequence[str]) -> Any:
    for name in names:
        if name in row and row[name] is not None and row[name] != "" and row[name] != []:
            return row[name]
    return None


def _texts(value: Any) -> list[str]:
    """The non-empty texts of a cell: one, several, or annotators' answers as {"answer": ...}."""
    items = value if isinstance(value, list | tuple) else [value]
    inner = [item.get("answer", item.get("raw", "")) if isinstance(item, Mapping) else item for item in items]
    if nested := next((item for item in inner if isinstance(item, list | tuple | Mapping)), None):
        raise RowError("no text", str(nested)[:60])
    return [text for text in (as_text(item).strip() for item in inner) if text]


def _told(row: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The texts of the first column that has any.

    A table of plain text holds several as a JSON list: in a column whose name says that they are several, and
    of quoted texts in one whose name leaves it open ("[0.1, 0.2]" is one answer there). A list as Python
    prints it is refused: it would be learnt with its brackets.
    """
    for name in names:
        value = row.get(name)
        form = _LIST if name in SEVERAL else _QUOTED_LIST if name in ONE_OR_SEVERAL else None
        if form and isinstance(value, str) and form.match(value):
            try:
                value = load_json(value)
            except (json.JSONDecodeError, RecursionError):
                raise RowError("list is not JSON", value[:60]) from None
        if found := _texts(value):
            return found
    return []


def _asked(row: Mapping[str, Any]) -> str:
    """The question; empty where there is none."""
    value = _first(row, QUESTION_COLUMNS)
    if isinstance(value, list | tuple | Mapping):
        raise RowError("question is no text", str(value)[:60])
    return as_text(value).strip()


def _images(row: Mapping[str, Any], find: Find) -> tuple[ImageSource, ...]:
    value = _first(row, IMAGE_COLUMNS)
    if value is None:
        return ()
    items = value if isinstance(value, list | tuple) else [value]
    return tuple(find(item) for item in items)


def _no_picture(row: Mapping[str, Any]) -> RowError:
    named = any(name in row for name in IMAGE_COLUMNS)
    return (
        RowError("no picture named") if named else RowError("no picture column", _columns(row, "file_name"))
    )


def _columns(row: Mapping[str, Any], wanted: str) -> str:
    return f"{', '.join(map(str, row))[:80]}; wanted: {wanted}"


def _meta(row: Mapping[str, Any]) -> dict[str, str]:
    plain = (str, int, float, bool)
    rest = {k: v for k, v in row.items() if k not in KNOWN_COLUMNS}
    return {str(k): as_text(v) for k, v in rest.items() if isinstance(v, plain) and v != ""}


def known_column(name: str) -> str:
    """A column's name as the tables above spell it, where they know it in another case."""
    plain = re.sub(r"[ -]", "_", name.strip().lower())
    return plain if plain in KNOWN_COLUMNS else name


def _by_known_names(row: Mapping[str, Any]) -> Mapping[str, Any]:
    others = {name: known for name in row if (known := known_column(str(name))) != name and known not in row}
    return {others.get(name, name): value for name, value in row.items()} if others else row


def _turn(role: str, text: str, next_image: int, total: int) -> tuple[Turn, int]:
    """A turn with a slot where its text has a placeholder (as far as there are pictures)."""
    parts: list[str | ImageSlot] = []
    pieces = text.split(PLACEHOLDER)
    for number, piece in enumerate(pieces):
        if number and role == "user" and next_image < total:
            parts.append(ImageSlot(next_image))
            next_image += 1
        elif number:
            parts.append(PLACEHOLDER)
        if piece.strip():
            # LLaVA writes "<image>\nQuestion": the line break belongs to the placeholder.
            parts.append(piece.strip("\n") if len(pieces) > 1 else piece.strip())
    return Turn("user" if role == "user" else "assistant", tuple(parts)), next_image


def _said(value: Any) -> list[tuple[str, str]]:
    """(speaker, words) of each turn of a conversation; a picture among the words is a placeholder."""
    if isinstance(value, str):
        try:
            value = load_json(value)
        except json.JSONDecodeError:
            raise RowError("conversation is no list", value[:60]) from None
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise RowError("conversation is no list", as_text(value)[:60])
    said = []
    for item in value:
        text = item.get("value", item.get("content", ""))
        if isinstance(text, list):  # chat layout: parts of type text or image
            text = "".join(map(_part_text, text))
        said.append((as_text(item.get("from", item.get("role"))), as_text(text)))
    return said


def _talk(said: Sequence[tuple[str, str]], total: int) -> list[Turn]:
    """The turns of a conversation about so many pictures.

    System words go before the first user's, as they do in `vlm serve`: the model's frame has no system turn.
    """
    turns: list[Turn] = []
    system: list[str] = []
    used = 0
    for speaker, text in said:
        role = ROLES.get(speaker.lower())
        if role is None:
            raise RowError("unknown speaker", speaker[:40])
        if role == "system":
            system += [text.strip()] if text.strip() else []
            continue
        turn, used = _turn(role, text, used, total)
        turns.append(turn)
    if turns and turns[0].role == "user":
        before = ("\n".join(system) + "\n",) if system else ()
        rest = [ImageSlot(i) for i in range(used, total)]
        turns[0] = Turn("user", (*before, *_with_rest(turns[0].parts, rest)))
    return turns


def _with_rest(parts: tuple[str | ImageSlot, ...], rest: Sequence[ImageSlot]) -> Sequence[str | ImageSlot]:
    """A question with the pictures that no placeholder names: behind its last one that is, or before it."""
    last = max((i for i, part in enumerate(parts) if isinstance(part, ImageSlot)), default=-1)
    return (*parts[: last + 1], *rest, *parts[last + 1 :])


def _part_text(part: Any) -> str:
    if not isinstance(part, Mapping):
        return as_text(part)
    return PLACEHOLDER if part.get("type") in ("image", "image_url") else as_text(part.get("text"))


def _from_talk(
    said: Sequence[tuple[str, str]], images: tuple[ImageSource, ...], id: str, meta: Mapping[str, str]
) -> list[Example]:
    turns = _talk(said, len(images))
    if not turns or turns[0].role != "user":
        raise RowError("conversation does not begin with a question")
    examples = []
    for number, turn in enumerate(turns):
        if turn.role != "assistant" or not turn.text.strip() or turns[number - 1].role != "user":
            continue
        history = tuple(turns[:number])
        used = sorted({p.index for t in history for p in t.parts if isinstance(p, ImageSlot)})
        if used != list(range(len(used))):
            raise RowError("pictures out of order")
        name = id if number == 1 else f"{id}@{number // 2}"
        examples.append(Example(images[: len(used)], history, (turn.text.strip(),), name, meta))
    if not examples:
        raise RowError("no answer")
    return examples


def examples_from_row(row: Mapping[str, Any], where: str, find: Find) -> list[Example]:
    """The examples of one row: one, one per assistant turn of a conversation, or a question and a caption.

    None of a row that is about no picture: a conversation that points at none, or a question whose picture
    column says null. An empty cell says nothing: where a table has a question or a caption, it is a slip.

    Args:
        row: column -> value.
        where: the row's place; it is the id where the row has none.
        find: a cell of the picture column -> what the picture is opened from; raises `RowError`.

    Raises:
        RowError: the row cannot be used.
    """
    row = _by_known_names(row)
    images = _images(row, find)
    id = as_text(_first(row, ID_COLUMNS)) or where
    meta = _meta(row)
    talk = _first(row, TALK_COLUMNS)
    if talk is not None:
        said = _said(talk)
        if images:
            return _from_talk(said, images, id, MappingProxyType({"task": "vqa"} | meta))
        if any(PLACEHOLDER in text and ROLES.get(speaker.lower()) == "user" for speaker, text in said):
            raise _no_picture(row)
        return []
    slots = tuple(ImageSlot(i) for i in range(len(images)))
    captions = _told(row, CAPTION_COLUMNS)
    question = _asked(row)
    if not images:
        if question and not captions and any(row.get(name, "") in (None, []) for name in IMAGE_COLUMNS):
            return []
        raise _no_picture(row)
    examples = []
    if question:
        answers = _told(row, ANSWER_COLUMNS)
        if not answers and not any(name in row for name in ANSWER_COLUMNS):
            raise RowError("no answer column", _columns(row, "answer"))
        if not answers:
            raise RowError("empty answer", question[:60])
        asked = (Turn("user", (*slots, question)),)
        examples.append(Example(images, asked, tuple(answers), id, MappingProxyType({"task": "vqa"} | meta)))
    if captions:
        asked = (Turn("user", (*slots, CAPTION_PROMPT)),)
        told = MappingProxyType({"task": "caption"} | meta)
        examples.append(Example(images, asked, tuple(captions), id, told))
    if not examples:
        if any(name in row for name in (*CAPTION_COLUMNS, *QUESTION_COLUMNS)):
            raise RowError("empty text")
        raise RowError("no text or question column", _columns(row, "text, or question and answer"))
    return examples


def _nowhere(_: str) -> Path | None:
    return None


def picture_finder(
    base: Path, needed: bool = True, elsewhere: Callable[[str], Path | None] = _nowhere
) -> Find:
    """Cells of a picture column that are paths relative to `base` (or absolute), bytes, or both.

    `needed=False`: files that are not there stay as they are named. `elsewhere` finds those that do not lie
    where they should.

    Question sets hold a picture once for each of its questions, side by side: the bytes are kept once.
    """
    last = b""

    def find(value: Any) -> ImageSource:
        nonlocal last
        if isinstance(value, Mapping):
            value = bytes(value["bytes"]) if value.get("bytes") else value.get("path")
        if isinstance(value, bytes):
            last = last if value == last else value
            return last
        name = as_text(value).strip()
        if not name:
            raise RowError("no picture named")
        if "://" in name:
            raise RowError("picture is a web address", name[:80])
        path = existing(base, name) or elsewhere(name)
        if path is None and needed:
            raise RowError("picture missing", name[:80])
        return path or base / name

    return find


def existing(base: Path, name: str) -> Path | None:
    """The file of that name below `base` (or of an absolute name), or None.

    Where it is not there as written: Windows's separators are read, accents composed the other way (a Mac's
    file names have them apart, tables have them in one letter), and endings in the other case (`.JPG`).
    """
    try:
        return next((base / form for form in _spellings(name) if (base / form).is_file()), None)
    except OSError:  # longer than a name may be: no file is called so
        return None


def _spellings(name: str) -> Iterator[str]:
    yield name  # nearly always enough, and there are as many names as rows
    written = dict.fromkeys((name, name.replace("\\", "/")))
    forms = [form for w in written for form in (w, *(unicodedata.normalize(k, w) for k in ("NFC", "NFD")))]
    endings = [(form, PurePosixPath(form).suffix) for form in forms]
    cased = [form.removesuffix(e) + other for form, e in endings for other in (e.lower(), e.upper())]
    yield from dict.fromkeys((*forms, *cased))
