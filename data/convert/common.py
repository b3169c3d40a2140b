"""What the readers of the public sets share: files that must be there, pictures, single examples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from vlm.conversation import ImageSlot, ImageSource, Turn
from vlm.data.example import Example
from vlm.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif")


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
        raise DataError(f"{path} is not UTF-8 text (byte {error.start})") from None


def first_existing(root: Path, names: Iterable[str], what: str) -> Path:
    """The first of `names` that exists under `root`.

    Raises:
        DataError: none does; the message lists what was looked for.
    """
    tried = list(names)
    for name in tried:
        if (root / name).exists():
            return root / name
    raise DataError(f"{root} holds no {what}; looked for {', '.join(tried)}")


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
