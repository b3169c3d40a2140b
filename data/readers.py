"""Any source a person may name -> examples, with every row that could not be used counted and named.

folder with metadata.csv/.jsonl (or train/, validation/, test/ that hold them)   image folder
.csv .tsv .jsonl                                                                 tables with image paths
.json                                                                            LLaVA list, COCO, VQA
.parquet .tar (a file, or a folder of them)                                      Parquet, WebDataset
owner/name                                                                       a hub data set
a public set's download folder                                                   see vlm.data.convert
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from vlm.data import coco
from vlm.data.convert import daquar, easy_vqa, flickr8k
from vlm.data.example import Example
from vlm.data.rows import BadRow, Find, Item, TextRow, picture_finder
from vlm.data.shards import Shard
from vlm.data.splits import canonical_split, split_by_image
from vlm.data.streams import SPLIT_NAMES, hub_name, no_part, read_hub, read_parquet, read_webdataset
from vlm.data.tables import json_list_rows, metadata_file, read_image_folder, text_rows, to_examples
from vlm.errors import DataError, NoPartError

log = logging.getLogger(__name__)

PUBLIC: dict[str, tuple[Callable[[Path, bool], bool], Callable[[Path, str, bool], list[Example]]]] = {
    "flickr8k": (flickr8k.looks_like, flickr8k.read),
    "daquar": (daquar.looks_like, daquar.read),
    "easy-vqa": (easy_vqa.looks_like, easy_vqa.read),
}
TABLES = (".csv", ".tsv", ".jsonl", ".json")
TARS = (".tar", ".tar.gz", ".tgz")
BAD_SHARE = 0.01
SHOWN = 5


@dataclass
class Reading:
    """What a source holds: usable examples, unusable rows, rows that are about no picture."""

    source: str
    examples: list[Example] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    has_part: bool = True
    """Whether the source itself says which rows are its train, dev and test parts."""
    passed_by: int = 0
    """Usable rows that are left out on purpose."""
    texts: list[TextRow] = field(default_factory=list)

    @property
    def causes(self) -> Counter[str]:
        """How many rows are unusable, by cause."""
        return Counter(row.cause for row in self.bad)

    @property
    def bad_share(self) -> float:
        """The unusable share of the rows, 0 to 1."""
        total = len(self.examples) + len(self.bad) + self.passed_by
        return len(self.bad) / total if total else 0.0

    def summary(self) -> str:
        """The unusable rows in a line: counts by cause, and the first few by name."""
        causes = ", ".join(f"{count} x {cause}" for cause, count in self.causes.most_common())
        named = "; ".join(str(row) for row in self.bad[:SHOWN])
        more = f"; and {len(self.bad) - SHOWN} more" if len(self.bad) > SHOWN else ""
        return f"{self.source}: {len(self.bad)} rows cannot be used: {causes}. {named}{more}"

    def log_left_out(self) -> None:
        """Warns of the rows that are left out, bad ones by name."""
        if self.bad:
            log.warning("%s", self.summary())
        if self.texts:
            log.warning("%s: %s", self.source, told_texts(len(self.texts)))

    def require_sound(self) -> None:
        """Raises:
        DataError: more than 1 % of the rows cannot be used, or nothing is left.
        """
        if self.bad_share > BAD_SHARE:
            raise DataError(f"{self.summary()} (at most {BAD_SHARE:.0%} may be; see `vlm data check`)")
        if not self.examples:
            why = "none of its rows names a picture" if self.texts else "no row was found in it"
            raise DataError(f"{self.source} holds no example: {why}")

    def checked(self) -> list[Example]:
        """The examples, after a warning of what was left out.

        Raises:
            DataError: more than 1 % of the rows cannot be used, or nothing is left.
        """
        self.require_sound()
        self.log_left_out()
        return self.examples


def told_texts(count: int) -> str:
    """How many rows are about no picture, for people."""
    return f"no picture: {count:,} rows left out"


def public_set(folder: Path) -> str | None:
    """The public set whose downloaded layout `folder` has, or None."""
    return next((name for name, (looks_like, _) in PUBLIC.items() if looks_like(folder, True)), None)


def dev_is_from_train(source: str | Path) -> bool:
    """Whether a folder's dev part is set aside from its official training part."""
    folder = Path(source).expanduser()
    if (folder / "dataset.json").is_file():
        return _described(folder).get("dev_from") == "train"
    return folder.is_dir() and public_set(folder) in ("daquar", "easy-vqa")


def _described(folder: Path) -> dict[str, Any]:
    """What the dataset.json of a folder that `vlm data` wrote says; nothing where there is none."""
    path = folder / "dataset.json"
    table = coco.read_json(path) if path.is_file() else {}
    return table if isinstance(table, dict) else {}


def _collect(source: str, items: Iterator[Item]) -> Reading:
    reading = Reading(source)
    for item in items:
        if isinstance(item, BadRow):
            reading.bad.append(item)
        elif isinstance(item, TextRow):
            reading.texts.append(item)
        else:
            reading.examples.append(item)
    return reading


def _beside(path: Path) -> Find:
    """Finds a table's pictures: as it names them; else where COCO's would lie (`images/`, `train2017/`)."""
    return picture_finder(path.parent, elsewhere=coco.Pictures(path.parent).find)


def _json_file(path: Path, split: str) -> tuple[Iterator[Item], bool]:
    """(examples, whether the file itself says which split is which)."""
    table = coco.read_json(path)
    if isinstance(table, list):
        return to_examples(json_list_rows(table, path.name), _beside(path)), False
    kind = coco.kind_of(table)
    if kind == "karpathy":
        return coco.read_karpathy(table, path, "train" if split == "train-rest" else split), True
    if kind == "captions":
        return coco.read_captions(table, path), False
    if kind == "questions":
        return coco.read_questions(table, path), False
    raise DataError(
        f"{path} is none of the JSON layouts that are known (LLaVA list, COCO captions, VQA questions)"
    )


def _file(path: Path, split: str, shard: Shard) -> tuple[Iterator[Item], bool]:
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv", ".jsonl"):
        return to_examples(text_rows(path), _beside(path)), False
    if suffix == ".json":
        return _json_file(path, split)
    if suffix == ".parquet":
        return read_parquet([path], shard), False
    if path.name.lower().endswith(TARS):
        return read_webdataset([path], shard), False
    raise DataError(f"{path.name}: a folder, .csv, .tsv, .jsonl, .json, .parquet or .tar is expected")


def _part_files(files: list[Path], split: str) -> tuple[list[Path], bool]:
    """Those of a folder's shards that are named after the split ("train-00000.parquet"), if any are."""
    named = {
        part: [f for f in files if re.match(f"(?:{'|'.join(names)})(?:set)?(?![a-z])", f.name.lower())]
        for part, names in SPLIT_NAMES.items()
    }
    if not any(named.values()):
        return files, False
    part = "train" if split == "train-rest" else split
    if not named[part]:
        raise no_part(files[0].parent, SPLIT_NAMES[part], [name for name, held in named.items() if held])
    return named[part], True


def _ending(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(path for path in folder.glob("*") if path.name.lower().endswith(suffixes))


def shards_in(folder: Path, split: str) -> tuple[str, list[Path], bool] | None:
    """(kind, files, whether they are named after the split) of a folder of shards; None where it has none."""
    for suffixes, kind in (((".parquet",), "parquet"), (TARS, "webdataset")):
        files = _ending(folder, suffixes) or _ending(folder / "data", suffixes)
        if files:
            return kind, *_part_files(files, split)
    return None


def part_folders(folder: Path) -> dict[str, Path]:
    """The image folders below a folder that are called after a part ("train", "val"), by part."""
    below = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    return {
        part: found
        for part, names in SPLIT_NAMES.items()
        if (found := next((below[n] for n in names if n in below and metadata_file(below[n])), None))
    }


def own_dev(folder: Path) -> Path | None:
    """The dev part that a folder brings itself, apart from its training part; None where it has none."""
    if not folder.is_dir() or metadata_file(folder) or public_set(folder) or dev_is_from_train(folder):
        return None
    parts = part_folders(folder)
    return parts.get("dev") if "train" in parts else None


def _folder(folder: Path, split: str, shard: Shard, pictures: bool) -> tuple[Iterator[Item], bool]:
    """(examples, whether the folder itself has the split as a part)."""
    if metadata_file(folder):
        return read_image_folder(folder, pictures), False
    if _described(folder).get("unfinished"):
        raise DataError(f"{folder} was not written to its end: run the command that made it again")
    parts = part_folders(folder)
    if parts:
        if split == "train-rest" and "dev" not in parts and "train" in parts:
            return read_image_folder(parts["train"], pictures), False
        if split == "dev" and "dev" not in parts and "train" in parts:
            return read_image_folder(parts["train"], pictures), False
        if split == "train" and {"train", "dev"} <= parts.keys() and dev_is_from_train(folder):
            return chain(
                read_image_folder(parts["train"], pictures), read_image_folder(parts["dev"], pictures)
            ), True
        wanted = "train" if split == "train-rest" else split
        if wanted not in parts:
            raise no_part(folder, SPLIT_NAMES[wanted], sorted(parts))
        return read_image_folder(parts[wanted], pictures), True
    if (found_shards := shards_in(folder, split)) is not None:
        kind, chosen, named = found_shards
        return (read_parquet if kind == "parquet" else read_webdataset)(chosen, shard), named
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in TABLES and path.is_file()]
    if any("question" in path.name.lower() for path in tables):  # VQA's answers lie beside its questions
        tables = [path for path in tables if "annotation" not in path.name.lower()]
    if len(tables) == 1:
        return _file(tables[0], split, shard)
    raise DataError(f"{folder} has {_no_table(folder, tables)}")


def _no_table(folder: Path, tables: list[Path]) -> str:
    """Why a folder cannot be read as it is, and what would help."""
    below = [path for suffix in TABLES for path in sorted(folder.glob(f"*/*{suffix}"))]
    names = [str(path.relative_to(folder)) for path in tables or below]
    named = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    if tables:
        return f"several tables; name one of them: {named}"
    none = "no metadata.csv, metadata.jsonl, Parquet or tar files"
    if below:
        return f"{none}; name one of the tables in its folders: {named}"
    return f"{none}: write a metadata.csv with the columns file_name and text, or file_name, question, answer"


def divided(reading: Reading, split: str) -> Reading:
    """A source with one part only: `train` is all of it, `train-rest` and `dev` its two parts by image.

    Raises:
        DataError: its test part is asked for, or it has fewer than two pictures.
    """
    if split == "test":
        raise NoPartError(f"{reading.source} has one part only; it cannot be asked for its test part")
    if split != "train":
        rest, held = split_by_image(reading.examples)
        reading.examples = held if split == "dev" else rest
    return reading


def read_source(
    source: str | Path,
    split: str = "train",
    *,
    shard: Shard = (0, 1),
    divide: bool = True,
    pictures: bool = True,
) -> Reading:
    """Read any source; `Reading.checked()` gives the examples or says what is wrong.

    A source with one part only is divided by image: `train` is all of it, `dev` a fifth, `train-rest` the
    other four fifths (`divide=False`: it has `train` only). `shard` = (rank, world) reads one of `world`
    parts of Parquet, tar and hub sources. `pictures=False`: image folders and public sets may lack them.

    Raises:
        NoPartError: the source has no such part.
        DataError: there is no such source, or its table cannot be read at all.
    """
    split = canonical_split(split)
    try:
        reading = _read(source, split, shard, pictures)
    except OSError as problem:
        place = problem.filename or source
        raise DataError(f"{place} cannot be read: {problem.strerror or problem}") from problem
    if reading.has_part or (not divide and split == "train"):
        return reading
    if not divide:
        raise NoPartError(f"{source} has one part only, so no {split}: ask for train, which is all of it")
    return divided(reading, split)


def _read(source: str | Path, split: str, shard: Shard, pictures: bool) -> Reading:
    """A source's split, where it has such a part; else everything."""
    path = Path(source).expanduser()
    if path.is_dir():
        public = public_set(path)
        if public:
            return Reading(str(source), PUBLIC[public][1](path, split, pictures))
        items, has_part = _folder(path, split, shard, pictures)
    elif path.is_file():
        items, has_part = _file(path, split, shard)
    elif (name := hub_name(source)) is not None:
        items, has_part = read_hub(name, "train" if split == "train-rest" else split, shard), True
    else:
        raise DataError(f"{source} is no file, no folder and no hub data set (owner/name)")
    reading = _collect(str(source), items)
    reading.has_part = has_part
    return reading
