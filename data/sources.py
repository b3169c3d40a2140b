"""One call from a data set's name (or a folder, file or hub id) and a split to examples."""

from __future__ import annotations

from pathlib import Path

from vlm.data.convert import easy_vqa
from vlm.data.example import Example
from vlm.data.readers import PUBLIC, Reading, read_source
from vlm.errors import DataError

DATASETS = tuple(PUBLIC)
_SPELLINGS = {"easyvqa": "easy-vqa", "flickr-8k": "flickr8k"}


def canonical_name(name: str) -> str:
    """The data set's name in this table, for any spelling ("easy_vqa", "Flickr8k"), or the name as it is."""
    plain = name.lower().replace("_", "-")
    return _SPELLINGS.get(plain, plain)


def find_root(name: str, root: Path | None) -> Path:
    """The folder of set `name`: `root` itself, or a subfolder of it that is called after the set.

    Raises:
        DataError: neither has the set's layout (easy-VQA falls back on the installed package).
    """
    looks_like, _ = PUBLIC[name]
    for folder in (root, root / name, root / name.replace("-", "_")) if root else ():
        if looks_like(folder):
            return folder
    if name == "easy-vqa":
        return easy_vqa.package_root()
    if root is None:
        raise DataError(f"say where {name} lies (--data FOLDER)")
    raise DataError(f"{root} does not hold {name} in a layout that is known; see `vlm data convert --help`")


def read_dataset(name_or_dir: str | Path, root: Path | None = None, split: str = "train") -> list[Example]:
    """The examples of one split of a public set or of any source that `vlm data check` reads.

    Args:
        name_or_dir: `flickr8k`, `daquar` or `easy-vqa` (with `root` the set's folder or its parent; a
            converted folder will do too), or a folder, file or hub id (relative paths also below `root`).
        root: where the named set lies; for easy-VQA the installed package is used when it is not there.
        split: `train`, `dev` (also `val`, `validation`), `test`, or `train-rest`: the training part without
            the pictures that `dev` sets aside where a set has no dev part of its own.

    Raises:
        DataError: the set, the split or one of its files is not there, or more than 1 % of it cannot be used.
    """
    return find_reading(name_or_dir, root, split).checked()


def find_reading(name_or_dir: str | Path, root: Path | None = None, split: str = "train") -> Reading:
    """What `read_dataset` reads, with the rows that cannot be used.

    Raises:
        DataError: the set, the split or one of its files is not there.
    """
    name = canonical_name(str(name_or_dir))
    if name in PUBLIC and (root is not None or not Path(name_or_dir).is_dir()):
        converted = (
            [folder for folder in (root, root / name) if (folder / "dataset.json").is_file()] if root else []
        )
        if converted:
            return read_source(converted[0], split)
        folder = find_root(name, root)
        return Reading(str(folder), PUBLIC[name][1](folder, split))
    if not str(name_or_dir):
        raise DataError("no data set is named")
    if root is not None and not Path(name_or_dir).exists() and (root / name_or_dir).exists():
        return read_source(root / name_or_dir, split)
    return read_source(name_or_dir, split)
