"""Flickr8k: 8,000 photographs, five captions each (Hodosh, Young, Hockenmaier, JAIR 47, 2013).

Both layouts that people download are read as they are:

    captions.txt            Images/             (CSV with a header: image,caption)
    Flickr8k.token.txt      Flicker8k_Dataset/  (name.jpg#0<tab>caption)

with the official lists Flickr_8k.{train,dev,test}Images.txt beside them. A split needs only its own list
and its own pictures.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from vlm.config import CAPTION_PROMPT
from vlm.data.convert.common import first_existing, make_example, read_text
from vlm.data.example import Example
from vlm.data.splits import canonical_split
from vlm.errors import DataError, NoPartError

CAPTION_FILES = ("captions.txt", "Flickr8k.token.txt", "Flickr8k_text/Flickr8k.token.txt", "captions.csv")
IMAGE_FOLDERS = (
    "Images",
    "Flicker8k_Dataset",
    "Flickr8k_Dataset",
    "Flickr8k_Dataset/Flicker8k_Dataset",
    "images",
)


def looks_like(root: Path, pictures: bool = True) -> bool:
    """Whether `root` is a folder in one of the two layouts; without `pictures` its captions will do."""
    return any((root / name).is_file() for name in CAPTION_FILES) and (
        not pictures or any((root / name).is_dir() for name in IMAGE_FOLDERS)
    )


def read_captions(path: Path) -> dict[str, list[str]]:
    """File name -> its captions, in the file's order, of either caption file.

    Raises:
        DataError: a row that is neither `image,caption` nor `image#n<tab>caption`; the line is named.
    """
    text = read_text(path)
    captions: dict[str, list[str]] = {}
    if path.name.endswith("token.txt"):
        rows = [line.split("\t") for line in text.splitlines()]
    else:
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), strict=True))
        except csv.Error as error:
            raise DataError(f"{path} is not CSV: {error}") from None
        if rows and [cell.strip().lower() for cell in rows[0]] == ["image", "caption"]:
            rows[0] = []
    for number, row in enumerate(rows, start=1):
        if not row or row == [""]:
            continue
        if len(row) != 2 or not row[0].strip():
            raise DataError(f"{path}, row {number}: expected a picture's name and one caption, got {row!r}")
        name = row[0].split("#")[0].strip()
        if row[1].strip():
            captions.setdefault(name, []).append(row[1].strip())
    return captions


def split_names(root: Path, split: str) -> list[str]:
    """The official list of a split, in its own order.

    Raises:
        NoPartError: there is none.
    """
    name = f"Flickr_8k.{split}Images.txt"
    path = first_existing(root, [name, f"Flickr8k_text/{name}"], f"list of the {split} split", NoPartError)
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def read(root: Path, split: str, pictures: bool = True) -> list[Example]:
    """The captioning examples of one split: one per photograph, `answers` its raw captions.

    `train-rest` means `train`: the set has a dev part of its own. Without `pictures` only captions and list
    are read, and a photograph's name stands for it.

    Raises:
        NoPartError: the split's list is missing.
        DataError: another file is missing, or a listed photograph has no captions or is not in the folder.
    """
    split = canonical_split(split)
    captions = read_captions(first_existing(root, CAPTION_FILES, "caption file"))
    folder = first_existing(root, IMAGE_FOLDERS, "picture folder") if pictures else Path()
    names = split_names(root, "train" if split == "train-rest" else split)
    without = [name for name in names if name not in captions]
    if without:
        raise DataError(f"{len(without)} photographs of {split} have no caption, the first is {without[0]}")
    there = {path.name for path in folder.iterdir()} if pictures else set(names)
    missing = [name for name in names if name not in there]
    if missing:
        raise DataError(
            f"{len(missing)} photographs of {split} are not in {folder}, the first is {missing[0]}"
        )
    return [
        make_example(folder / name, CAPTION_PROMPT, captions[name], f"flickr8k/{name}", {"task": "caption"})
        for name in names
    ]
