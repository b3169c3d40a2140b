"""Parquet, WebDataset shards and hub data sets through `datasets`, row by row, without decoding a picture.

`datasets` guesses types: left alone it reads "007" as 7.0, "true" as a boolean and "N/A" as nothing. So its
text tables (CSV, JSON, an image folder's metadata) are found by it and read by `vlm.data.tables`; from the
typed formats every value is taken as text; and pictures stay bytes for `vlm/images.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from vlm.data.example import Example
from vlm.data.rows import BadRow, Find, RowError, as_text, examples_from_row, picture_finder
from vlm.data.tables import Rows, text_rows
from vlm.errors import DataError

SPLIT_NAMES = {"train": ("train",), "dev": ("validation", "dev", "val"), "test": ("test",)}
TEXT_TABLES = (".csv", ".tsv", ".jsonl")
JSON_FIELDS = ("json", "jsonl")
Shard = tuple[int, int]


def _load(kind: str, files: Sequence[str]) -> Any:
    import datasets

    stream = datasets.load_dataset(kind, data_files={"train": list(files)}, split="train", streaming=True)
    return _undecoded(stream)


def _undecoded(stream: Any) -> Any:
    import datasets

    if stream.features is None:
        stream = stream._resolve_features()
    for name, feature in (stream.features or {}).items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(name, datasets.Image(decode=False))
    return stream


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the object of its `.json` member beside the other columns (WebDataset)."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if name in JSON_FIELDS and isinstance(value, Mapping):
            flat.update({key: item for key, item in value.items() if item is not None})
        elif name not in ("__url__", "__local_path__"):
            flat[name] = value
    return flat


def _rows(kind: str, files: Sequence[str], shard: Shard) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, row) of this reader's part: whole files where they divide evenly, else every n-th row.

    A row's place is the same whoever reads it.
    """
    rank, world = shard
    by_file = len(files) % world == 0
    total = 0
    for number, file in enumerate(files):
        if by_file and number % world != rank:
            continue
        for index, row in enumerate(_load(kind, [file])):
            if by_file or total % world == rank:
                yield f"{PurePosixPath(file).name} row {as_text(row.get('__key__')) or index}", row
            total += 1


def _stream_rows(stream: Any, name: str, shard: Shard) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for index, row in enumerate(stream):
        if index % shard[1] == shard[0]:
            yield f"{name} row {index}", row


def _examples(rows: Iterator[tuple[str, Mapping[str, Any]]], find: Find) -> Iterator[Example | BadRow]:
    for place, row in rows:
        try:
            yield from examples_from_row(_flat(row), place, find)
        except RowError as error:
            yield BadRow(place, error.cause, error.detail)


def _guarded(examples: Iterator[Example | BadRow], name: str) -> Iterator[Example | BadRow]:
    """The same, with what `datasets` and its readers raise turned into a message for the user."""
    import tarfile

    import pyarrow as pa

    try:
        yield from examples
    except (pa.ArrowException, tarfile.TarError, ValueError, OSError, KeyError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{name} cannot be read: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error


def _read_files(kind: str, files: Sequence[Path], shard: Shard) -> Iterator[Example | BadRow]:
    name = files[0].name if len(files) == 1 else f"{files[0].parent.name}/*{files[0].suffix}"
    rows = _rows(kind, [str(file) for file in files], shard)
    return _guarded(_examples(rows, picture_finder(files[0].parent)), name)


def read_parquet(files: Sequence[Path], shard: Shard = (0, 1)) -> Iterator[Example | BadRow]:
    """The rows of Parquet files, in order; a picture column holds {"bytes", "path"} or paths.

    `shard` = (rank, world): the part of one of `world` readers; together they read every row once.
    """
    return _read_files("parquet", files, shard)


def read_webdataset(files: Sequence[Path], shard: Shard = (0, 1)) -> Iterator[Example | BadRow]:
    """The samples of WebDataset tar shards: `KEY.jpg` with `KEY.txt` (a caption) or `KEY.json` (columns)."""
    return _read_files("webdataset", files, shard)


def _remote_text(url: str) -> str:
    import fsspec

    with fsspec.open(url, "rb") as file:
        content: bytes = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{url} is not UTF-8 text") from None


def _remote_rows(url: str) -> Rows:
    return text_rows(Path(PurePosixPath(url).name), _remote_text(url))


def _remote_examples(urls: Sequence[str]) -> Iterator[Example | BadRow]:
    """Text tables and the pictures that stand beside them, wherever `datasets` found them."""
    import fsspec

    for url in urls:
        folder = url.rsplit("/", 1)[0]

        def find(value: Any, folder: str = folder) -> bytes:
            name = as_text(value).strip()
            if not name or "://" in name or name.startswith("/") or ".." in PurePosixPath(name).parts:
                raise RowError("picture outside the data set", name[:80])
            try:
                with fsspec.open(f"{folder}/{name}", "rb") as file:
                    content: bytes = file.read()
            except FileNotFoundError:
                raise RowError("picture missing", name[:80]) from None
            return content

        for place, row in _remote_rows(url):
            if isinstance(row, BadRow):
                yield row
                continue
            try:
                yield from examples_from_row(row, place, find)
            except RowError as error:
                yield BadRow(place, error.cause, error.detail)


def read_hub(repo: str, split: str = "train", shard: Shard = (0, 1)) -> Iterator[Example | BadRow]:
    """A data set of the hub (or a local folder in its layout), streamed.

    Args:
        repo: `owner/name`, or `owner/name:config`.
        split: `train`, `dev` or `test`; the data set may call dev validation.
        shard: (rank, world), as for Parquet.

    Raises:
        DataError: the data set or the split is not there.
    """
    import datasets

    name, _, config = repo.partition(":")
    try:
        builder = datasets.load_dataset_builder(name, config or None)
    except (FileNotFoundError, ConnectionError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"the data set {repo} cannot be had: {reason}") from error
    files = dict(builder.config.data_files or {})
    known = [str(key) for key in (files or builder.info.splits or {})]
    part = next((key for key in SPLIT_NAMES.get(split, (split,)) if key in known), None)
    if part is None:
        raise DataError(f"{repo} has no {split} part; it has {', '.join(known) or 'none'}")
    kind = type(builder).__module__.split(".")[-1]
    urls = [str(url) for url in files.get(part, [])]
    tables = [url for url in urls if url.endswith(TEXT_TABLES)]
    if tables and kind in ("imagefolder", "csv", "json"):
        # metadata.jsonl, or a table of any name beside its pictures
        examples = (e for n, e in enumerate(_remote_examples(tables)) if n % shard[1] == shard[0])
        return _guarded(examples, repo)
    if kind in ("parquet", "webdataset"):
        return _guarded(_examples(_rows(kind, urls, shard), picture_finder(Path())), repo)
    stream = _undecoded(builder.as_streaming_dataset(split=part))
    return _guarded(_examples(_stream_rows(stream, repo, shard), picture_finder(Path())), repo)
