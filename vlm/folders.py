"""Which files of a folder are pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from vlm.container import kind_of
from vlm.images import ImageError

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif"})
OTHER_SUFFIXES: Final = frozenset(
    {
        ".heic",
        ".heif",
        ".avif",
        ".tif",
        ".tiff",
        ".bmp",
        ".jxl",
        ".jp2",
        ".svg",
        ".dng",
        ".cr2",
        ".nef",
        ".arw",
    }
)
"""Of kinds of pictures that are not read: named where a folder holds some."""


def list_pictures(folder: str | Path) -> tuple[list[Path], list[Path]]:
    """The pictures of a folder by name, and what of it is passed by: other kinds of pictures, and folders.

    A picture is what is called one (`SUFFIXES`) or begins like one; hidden files are none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError("missing", f"there is no folder {folder}")
    pictures, others = [], []
    for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
        suffix = path.suffix.lower()
        if path.is_dir():
            others.append(path)
        elif path.is_file() and (suffix in SUFFIXES or _begins_like_a_picture(path)):
            pictures.append(path)
        elif suffix in OTHER_SUFFIXES:
            others.append(path)
    return pictures, others


def _begins_like_a_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return kind_of(file.read(16)) is not None
    except OSError:
        return False  # what cannot be read and is not called a picture is no one's picture
