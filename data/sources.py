"""One call from a data set's name (or folder) and a split to examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlm.data.convert import daquar, easy_vqa, flickr8k
from vlm.data.example import Example
from vlm.errors import DataError

_READERS: dict[str, Callable[[Path, str], list[Example]]] = {
    "flickr8k": flickr8k.read,
    "daquar": daquar.read,
    "easy-vqa": easy_vqa.read,
}
_LAYOUTS = {"flickr8k": flickr8k.looks_like, "daquar": daquar.looks_like, "easy-vqa": easy_vqa.looks_like}
DATASETS = tuple(_READERS)


def canonical_name(name: str) -> str:
    """The data set's name in this table, for any spelling ("easy_vqa", "Flickr8k"), or the name as it is."""
    plain = name.lower().replace("_", "-")
    return {"easyvqa": "easy-vqa", "flickr-8k": "flickr8k"}.get(plain, plain)


def detect(folder: Path) -> str | None:
    """The public set whose downloaded layout `folder` has, or None."""
    for name, looks_like in _LAYOUTS.items():
        if looks_like(folder):
            return name
    return None


def find_root(name: str, root: Path | None) -> Path:
    """The folder of set `name`: `root` itself, or a subfolder of it that is called after the set.

    Raises:
        DataError: neither has the set's layout (easy-VQA falls back on the installed package).
    """
    for folder in (root, root / name, root / name.replace("-", "_")) if root else ():
        if _LAYOUTS[name](folder):
            return folder
    if name == "easy-vqa" and root is None:
        return easy_vqa.package_root()
    if root is None:
        raise DataError(f"say where {name} lies (--data FOLDER)")
    raise DataError(f"{root} does not hold {name} in a layout that is known; see `vlm data convert --help`")


def read_dataset(name_or_dir: str | Path, root: Path | None = None, split: str = "train") -> list[Example]:
    """The examples of one split, read from the layout that people download.

    Args:
        name_or_dir: `flickr8k`, `daquar` or `easy-vqa` (with `root` the set's folder or its parent), or a
            folder, whose layout is found out.
        root: where the named set lies; easy-VQA's installed package is used when it is None.
        split: `train`, `dev` (also `val`, `validation`), `test`, or `train-rest`: the official training part
            without the pictures that `dev` sets aside where a set has no official dev part.

    Raises:
        DataError: the set, the split or one of its files is not there.
    """
    name = canonical_name(str(name_or_dir))
    if name in _READERS:
        return _READERS[name](find_root(name, root), split)
    folder = Path(name_or_dir)
    if not folder.exists():
        raise DataError(f"{name_or_dir!s} is neither a folder nor one of {', '.join(DATASETS)}")
    found = detect(folder)
    if found is None:
        raise DataError(f"{folder} has none of the known layouts ({', '.join(DATASETS)})")
    return _READERS[found](folder, split)
