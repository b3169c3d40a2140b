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


def find_root(name: str, root: Path | None, *, pictures: bool = True) -> Path:
    """The folder of set `name`: `root` itself, or a subfolder of it that is called after the set.

    Where no root is given easy-VQA is the installed package's. `pictures=False`: its words will do.

    Raises:
        DataError: neither has the set's layout.
    """
    if root is None:
        if name == "easy-vqa":
            return easy_vqa.package_root()
        raise DataError(f"say where {name} lies (--data FOLDER)")
    looks_like, _ = PUBLIC[name]
    for folder in (root, root / name, root / name.replace("-", "_")):
        if looks_like(folder, pictures):
            return folder
    raise DataError(f"{root} does not hold {name} in a layout that is known; see `vlm data convert --help`")


def read_dataset(
    name_or_dir: str | Path, root: Path | None = None, split: str = "train", *, pictures: bool = True
) -> list[Example]:
    """The examples of one split of a public set or of any source that `vlm data check` reads.

    Args:
        name_or_dir: `flickr8k`, `daquar` or `easy-vqa` (with `root` the set's folder or its parent; a
            converted folder will do too), or a folder, file or hub id (relative paths also below `root`).
        root: where the named set lies; for easy-VQA the installed package is used when none is given.
        split: `train`, `dev` (also `val`, `validation`), `test`, or `train-rest`: the training part without
            the pictures that `dev` sets aside where a set has no dev part of its own.
        pictures: False: those of a named set need not be there, only its words are wanted.

    Raises:
        DataError: the set, the split or one of its files is not there, or more than 1 % of it cannot be used.
    """
    return find_reading(name_or_dir, root, split, pictures=pictures).checked()


def find_reading(
    name_or_dir: str | Path, root: Path | None = None, split: str = "train", *, pictures: bool = True
) -> Reading:
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
            return read_source(converted[0], split, pictures=pictures)
        folder = find_root(name, root, pictures=pictures)
        return Reading(str(folder), PUBLIC[name][1](folder, split, pictures))
    if not str(name_or_dir):
        raise DataError("no data set is named")
    if root is not None and not Path(name_or_dir).exists() and (root / name_or_dir).exists():
        return read_source(root / name_or_dir, split)
    return read_source(name_or_dir, split)
