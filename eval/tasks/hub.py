"""A benchmark as the Hugging Face hub has it: Parquet files with the pictures inside, or a data set's id.

`--data` is a folder of Parquet files (the repository as downloaded, a folder of it, or one file) or
`owner/name`, `owner/name:config`. Which columns each benchmark has stands in docs/benchmarks.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from vlm.data.rows import BadRow, RowError, picture_finder
from vlm.data.streams import SPLIT_NAMES, guarded, hub_name, hub_part, hub_rows, no_part, shard_rows
from vlm.data.tables import Rows
from vlm.errors import DataError
from vlm.eval.tasks.layouts import Entry

IMAGE = "image"
"""The picture's column, which is called the same in every set."""
_WORD = re.compile(r"[a-z][a-z0-9]*")
_DEPTHS = ("*.parquet", "*/*.parquet", "*/*/*.parquet")


def holds(root: Path | None) -> bool:
    """Whether this is the hub's form: a Parquet file, a folder of some, or a data set's id."""
    return root is not None and (hub_name(root) is not None or bool(_parquet_files(root)))


def entries(
    root: Path | None,
    split: str,
    pictures: bool,
    *,
    names: Sequence[str] = (),
    config: str = "",
    bare: bool = False,
    hidden: bool = False,
) -> Iterator[Entry]:
    """The rows of one part, in order; pictures stay the bytes that they are stored as.

    Args:
        pictures: False: their column is not read, and the row's place stands for the picture.
        names: what the part may be called, the best first; the usual names of `split` where none is given.
        config: the configuration (a folder of the repository) where the benchmark has several tables.
        bare: rows without a picture are passed over rather than refused.
        hidden: the benchmark keeps the part's answers, so that rows may have none.

    Raises:
        DataError: no such part, an unreadable file, a row without picture; the file and the row are named.
    """
    assert root is not None
    without = () if pictures or bare else (IMAGE,)
    rows, base = _rows(root, split, names or SPLIT_NAMES.get(split, (split,)), config, without)
    find = picture_finder(base)
    for number, (place, row) in enumerate(guarded(rows, str(root))):
        if isinstance(row, BadRow):
            raise DataError(str(row))
        words = {name: value for name, value in row.items() if name != IMAGE}
        if without:
            yield Entry(place, words, Path(place), number, hidden)
            continue
        if IMAGE not in row:
            raise DataError(f"{place} has no column {IMAGE!r}; it has {', '.join(words)}")
        if row[IMAGE] is None and bare:
            continue
        try:
            image = find(row[IMAGE])
        except RowError as error:
            raise DataError(f"{place}, column {IMAGE!r}: {error.cause} {error.detail}".rstrip()) from None
        yield Entry(place, words, image if pictures else Path(place), number, hidden)


def _rows(
    root: Path, split: str, names: Sequence[str], config: str, without: Sequence[str]
) -> tuple[Rows, Path]:
    """The rows of a part, and the folder that paths of pictures are relative to."""
    if (repo := hub_name(root)) is not None:
        repo = f"{repo.partition(':')[0]}:{config}" if config else repo
        return hub_rows(hub_part(repo, split, names), repo, without=without), Path()
    files = _part_files(root, names, config)
    return shard_rows("parquet", [str(file) for file in files], without=without), files[0].parent


def _parquet_files(root: Path) -> list[Path]:
    """A Parquet file itself, or those of a folder, down to two folders below it."""
    if not root.is_dir():
        return [root] if root.suffix == ".parquet" and root.is_file() else []
    return [path for depth in _DEPTHS for path in sorted(root.glob(depth))]


def part_of(file: Path) -> str:
    """The part that a file's name begins with; of files that are only numbered, their folder's name.

    `val2014-00000-of-00002.parquet` and `val2014/0000.parquet` are of part `val2014`.
    """
    word = _WORD.match(file.stem.lower())
    return word[0] if word else file.parent.name.lower()


def _part_files(root: Path, names: Sequence[str], config: str) -> list[Path]:
    """The files of the first part that there is.

    Raises:
        DataError: there is none, or it stands in several folders.
    """
    files = [file for file in _parquet_files(root) if not config or config in file.parts]
    if not files:
        raise DataError(f"{root} has no Parquet file in a folder {config}")
    for name in names:
        chosen = [file for file in files if part_of(file) == name]
        folders = sorted({str(file.parent.relative_to(root)) for file in chosen}) if root.is_dir() else []
        if len(folders) > 1:
            raise DataError(f"{root} has a {name} part in {', '.join(folders)}: name one of the folders")
        if chosen:
            return chosen
    raise no_part(root, names, sorted({part_of(file) for file in files}))
