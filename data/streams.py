"""Parquet, WebDataset shards and hub data sets through `datasets`, row by row, without decoding a picture.

`datasets` guesses types: left alone it reads "007" as 7.0, "true" as a boolean and "N/A" as nothing. So its
text tables (CSV, JSON, an image folder's metadata) are found by it and read by `vlm.data.tables`; from the
typed formats every value is taken as text; and pictures stay bytes for `vlm/images.py`.
"""

from __future__ import annotations

import json
import tarfile
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Self, TypeVar

from vlm.data.rows import IMAGE_COLUMNS, BadRow, Item, RowError, as_text, load_json
from vlm.data.shards import Part, Shard, parts_of
from vlm.data.tables import Rows, text_rows, to_examples
from vlm.errors import DataError, NoPartError

T = TypeVar("T")
HubPart = tuple[Any, str, str, list[str]]
"""(builder, kind, part, URLs of its files) of a part of a hub data set."""

SPLIT_NAMES = {
    "train": ("train", "training"),
    "dev": ("dev", "validation", "val", "valid"),
    "test": ("test",),
}
"""What folders, files and hub data sets call a split, the best name first."""
TEXT_TABLES = (".csv", ".tsv", ".jsonl")
PARQUET_BATCH = 64
"""Rows that are read at a time."""
PATIENCE = 60.0
"""Seconds without a byte after which a remote shard counts as lost."""


def _parquet(file: str, without: Sequence[str] = ()) -> Any:
    import datasets

    # With a batch of its own size: the default one is the first row group's, and an empty file has none.
    stream = datasets.load_dataset(
        "parquet",
        data_files={"train": [file]},
        split="train",
        streaming=True,
        batch_size=PARQUET_BATCH,
        columns=_other_columns(file, without) if without else None,
    )
    return _undecoded(stream)


def _other_columns(file: str, without: Sequence[str]) -> list[str]:
    """The columns of a Parquet file but these; only its footer is read."""
    import fsspec
    import pyarrow.parquet

    with fsspec.open(file, "rb") as opened:
        return [name for name in pyarrow.parquet.read_schema(opened).names if name not in without]


def _undecoded(stream: Any) -> Any:
    import datasets

    if stream.features is None:
        stream = stream._resolve_features()
    for name, feature in (stream.features or {}).items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(name, datasets.Image(decode=False))
    return stream


def _open(url: str) -> Any:
    """A context that opens a local or remote file for reading from its beginning to its end."""
    if url.startswith(("http://", "https://")):
        return urllib.request.urlopen(url, timeout=PATIENCE)
    import fsspec

    return fsspec.open(url, "rb")


class _Header(tarfile.TarInfo):
    """A member's header; one that is cut off or damaged is an error.

    `tarfile` takes it for the archive's end, and the rest of a broken download would be lost in silence.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if buf == bytes(tarfile.BLOCKSIZE):
                raise  # the mark of the end
            raise tarfile.ReadError(f"it is cut off or damaged ({error})") from error


def _tar_samples(url: str, part: Part, start: int) -> Iterator[tuple[int, str, dict[str, Any] | BadRow]]:
    """(number, key, row) of a WebDataset shard: neighbours `KEY.jpg`, `KEY.txt`, `KEY.json` make a row.

    `datasets` guesses one type for each JSON field and gives the whole shard up for one broken member; here
    a broken member is a bad row and every value is text. Rows that are not wanted are passed over unread.
    """
    key, problem, number = "", "", -1
    row: dict[str, Any] = {}
    with _open(url) as file, tarfile.open(fileobj=file, mode="r|*", tarinfo=_Header) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            if not member.isfile() or not stem or not dot:
                continue
            if (new := f"{folder}/{stem}".lstrip("/")) != key:
                if row or problem:
                    yield number, key, BadRow(key, problem) if problem else row
                key, row, problem, number = new, {}, "", number + 1
            if number < start or not part.holds(number):
                continue
            content = tar.extractfile(member)
            try:
                row.update(_member(suffix.lower(), content.read() if content else b""))
            except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
                problem = f"member .{suffix} is damaged"
    if row or problem:
        yield number, key, BadRow(key, problem) if problem else row


def _member(suffix: str, content: bytes) -> dict[str, Any]:
    """The columns that one member of a sample brings: a picture, a text, or a JSON object's.

    As in the `webdataset` library everything after a name's first dot is the column: the picture is
    `KEY.jpg`, `KEY.question.txt` the column `question`, and `KEY.seg.jpg` is no picture to ask about.
    """
    column, _, kind = suffix.rpartition(".")
    if kind in IMAGE_COLUMNS:
        return {column or kind: content}
    if kind in ("txt", "text", "caption"):
        return {column or "text": content.decode("utf-8")}
    if kind == "json":
        found = load_json(content.decode("utf-8"))
        return found if isinstance(found, dict) else {column or "text": found}
    return {}


def file_rows(
    kind: str, file: str, part: Part, start: int = 0, without: Sequence[str] = ()
) -> Iterator[tuple[int, str, Mapping[str, Any] | BadRow]]:
    """(number, place, row) of a part of one Parquet file or tar shard.

    Args:
        kind: `parquet` or `webdataset`.
        file: a path or a URL.
        part: which rows.
        start: rows before this number are passed over. A row's place is the same whoever reads it.
        without: columns of Parquet files that are not read at all.
    """
    name = PurePosixPath(file).name
    if kind == "webdataset":
        for number, key, row in _tar_samples(file, part, start):
            place = f"{name}/{key}"
            yield number, place, BadRow(place, row.cause, row.detail) if isinstance(row, BadRow) else row
        return
    stream = _parquet(file, without)
    for number, row in enumerate(stream.skip(start) if start else stream, start=start):
        if part.holds(number):
            yield number, f"{name} row {number}", row


def shard_rows(kind: str, files: Sequence[str], shard: Shard = (0, 1), without: Sequence[str] = ()) -> Rows:
    """(place, row) of one reader's parts of Parquet files or tar shards, but for the columns `without`."""
    for part in parts_of(range(len(files)), shard):
        for _, place, row in file_rows(kind, files[part.file], part, without=without):
            yield place, row


def _stream_rows(stream: Any, name: str, shard: Shard) -> Rows:
    for index, row in enumerate(stream):
        if index % shard[1] == shard[0]:
            yield f"{name} row {index}", row


def guarded(examples: Iterator[T], name: str) -> Iterator[T]:
    """The same, with what `datasets` and its readers raise turned into a message for the user."""
    import pyarrow as pa

    try:
        yield from examples
    except (pa.ArrowException, tarfile.TarError, ValueError, OSError, KeyError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise DataError(f"{name} cannot be read: {reason}") from error


def _read_files(kind: str, files: Sequence[Path], shard: Shard) -> Iterator[Item]:
    name = files[0].name if len(files) == 1 else f"{files[0].parent.name}/*{files[0].suffix}"
    rows = shard_rows(kind, [str(file) for file in files], shard)
    return guarded(to_examples(rows, files[0].parent), name)


def read_parquet(files: Sequence[Path], shard: Shard = (0, 1)) -> Iterator[Item]:
    """The rows of Parquet files, in order; a picture column holds {"bytes", "path"} or paths.

    `shard` = (rank, world): the part of one of `world` readers; together they read every row once.
    """
    return _read_files("parquet", files, shard)


def read_webdataset(files: Sequence[Path], shard: Shard = (0, 1)) -> Iterator[Item]:
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


def _remote_examples(urls: Sequence[str], shard: Shard) -> Iterator[Item]:
    """Text tables and the pictures that stand beside them, wherever `datasets` found them.

    Every reader reads the tables; each opens the pictures of its own rows alone.
    """
    import fsspec

    for part in parts_of(range(len(urls)), shard):
        url = urls[part.file]
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

        rows = (row for number, row in enumerate(_remote_rows(url)) if part.holds(number))
        yield from to_examples(rows, find)


def hub_name(source: str | Path) -> str | None:
    """`owner/name` (or `owner/name:config`) where a source is a data set of the hub, else None."""
    name = str(source).removeprefix("hub:")
    # A folder that is here, and what is not in it: a path with a slip, not an owner of data sets.
    path = name.startswith((".", "/", "~")) or Path(source).exists() or Path(name.split("/")[0]).is_dir()
    return None if path or name.count("/") != 1 else name


def no_part(where: str | Path, names: Sequence[str], known: Sequence[str]) -> NoPartError:
    """The error of a part that a source does not have: all its names, as any of them may have been typed."""
    wanted = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return NoPartError(f"{where} has no part called {wanted}; it has {', '.join(known) or 'none'}")


def hub_part(repo: str, split: str, names: Sequence[str] = ()) -> HubPart:
    """(builder, kind, part, URLs of its files) of a data set that `datasets` finds.

    `names`: what the part may be called, the best first; the usual names of the split where none is given.

    Raises:
        DataError: the data set is not there; NoPartError: it has no such split.
    """
    import datasets

    name, _, config = repo.partition(":")
    try:
        builder = datasets.load_dataset_builder(name, config or None)
    except (FileNotFoundError, ConnectionError, ValueError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{repo} is no file or folder, and no data set of the hub: {reason}") from error
    files = dict(builder.config.data_files or {})
    known = [str(key) for key in (files or builder.info.splits or {})]
    wanted = names or SPLIT_NAMES.get(split, (split,))
    part = next((key for key in wanted if key in known), None)
    if part is None:
        raise no_part(repo, wanted, known)
    kind = type(builder).__module__.split(".")[-1]
    urls = [str(url) for url in files.get(part, [])]
    return builder, kind, part, urls


def hub_rows(found: HubPart, name: str, shard: Shard = (0, 1), without: Sequence[str] = ()) -> Rows:
    """(place, row) of one reader's share of what `hub_part` found, but for the columns `without`."""
    builder, kind, part, urls = found
    if kind in ("parquet", "webdataset"):
        return shard_rows(kind, urls, shard, without)
    stream = _undecoded(builder.as_streaming_dataset(split=part))
    unread = [name for name in without if name in (stream.features or ())]
    return _stream_rows(stream.remove_columns(unread) if unread else stream, name, shard)


def read_hub(repo: str, split: str = "train", shard: Shard = (0, 1)) -> Iterator[Item]:
    """A data set of the hub (or a local folder in its layout), streamed.

    Args:
        repo: `owner/name`, or `owner/name:config`.
        split: `train`, `dev` or `test`; the data set may call dev validation.
        shard: (rank, world), as for Parquet.

    Raises:
        DataError: the data set or the split is not there.
    """
    found = hub_part(repo, split)
    _, kind, _, urls = found
    tables = [url for url in urls if url.lower().endswith(TEXT_TABLES)]
    if tables and kind in ("imagefolder", "csv", "json"):
        # metadata.jsonl, or a table of any name beside its pictures
        return guarded(_remote_examples(tables, shard), repo)
    return guarded(to_examples(hub_rows(found, repo, shard), Path()), repo)
