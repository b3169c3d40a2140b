"""What the readers of the public sets share: files that must be there, pictures, single examples."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlm.conversation import ImageSlot, ImageSource, Turn
from vlm.data.example import Example
from vlm.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def make_example(
    image: ImageSource, question: str, answers: Iterable[str], id: str, meta: Mapping[str, Any] | None = None
) -> Example:
    """One picture, one question about it, and the answers that count as right."""
    return Example(
        images=(Path(image) if isinstance(image, str) else image,),
        turns=(Turn("user", (ImageSlot(0), question)),),
        answers=tuple(answers),
        id=id,
        meta=MappingProxyType(dict(meta or {})),
    )


def read_text(path: Path) -> str:
    """The text of a data set file.

    Raises:
        DataError: the file is missing or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path} is missing") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder, a text file is needed") from None
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8 (in Excel: CSV UTF-8)"
        ) from None


class TwiceError(json.JSONDecodeError):
    """A key stands twice in one object: which of the two values is meant, nobody knows."""

    def __str__(self) -> str:
        return self.msg


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs, for `json.loads`.

    Raises:
        TwiceError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        key, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise TwiceError(f"the key {key!r} stands twice in one object", "", 0)
    return found


def parse_json(text: str, where: str | Path, *, words: bool = False) -> Any:
    """JSON that says everything once and can be written down again.

    Args:
        where: the file, and the line where it holds many; for messages.
        words: numbers stay as they are written ("1.50").

    Raises:
        DataError: it is not JSON or nested too deeply, an object has a key twice, a character is half of one.
    """

    kinds: dict[str, Any] = (
        dict.fromkeys(("parse_int", "parse_float", "parse_constant"), str) if words else {}
    )
    try:
        found = json.loads(text, object_pairs_hook=each_once, **kinds)
        if _ESCAPED_HALF.search(text):
            json.dumps(found, ensure_ascii=False).encode("utf-8")
    except TwiceError as error:
        raise DataError(f"{where}: {error}") from None
    except json.JSONDecodeError as error:
        place = f" (line {error.lineno})" if "\n" in text.strip() else ""
        raise DataError(f"{where} is not JSON: {error.msg}{place}") from None
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise DataError(f"{where}: {half!r} is half a character (a lone surrogate)") from None
    except RecursionError:
        raise DataError(f"{where} is not JSON that can be read: it is nested too deeply") from None
    except ValueError:
        raise DataError(f"{where} is not JSON that can be read: a number has too many digits") from None
    return found


def parse_json_lines(text: str, path: Path, *, words: bool = False) -> list[Any]:
    """JSON values, one a line; only a line feed ends a line, as JSON leaves U+2028 and U+0085 in its texts.

    Raises:
        DataError: as `parse_json`; the line is named.
    """
    lines = enumerate(text.split("\n"), start=1)
    return [parse_json(line, f"{path}, line {n}", words=words) for n, line in lines if line.strip()]


def first_existing(root: Path, names: Iterable[str], what: str, error: type[DataError] = DataError) -> Path:
    """The first of `names` that exists under `root`.

    Raises:
        DataError: none does; the message lists what was looked for. It is an `error`.
    """
    if root.is_file():
        raise DataError(f"{root} is a file; the folder that it lies in is needed, for all files of the set")
    tried = list(names)
    for name in tried:
        if (root / name).exists():
            return root / name
    raise error(f"{root} holds no {what}; looked for {', '.join(tried)}")


def picture_files(folder: Path) -> dict[str, Path]:
    """Stem -> path of every picture in a folder (not recursive).

    Raises:
        DataError: the folder is missing, or two pictures share a stem.
    """
    if not folder.is_dir():
        raise DataError(f"the picture folder {folder} is missing")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in IMAGE_SUFFIXES:
            if path.stem in found:
                raise DataError(f"{folder} holds both {found[path.stem].name} and {path.name}: remove one")
            found[path.stem] = path
    return found
