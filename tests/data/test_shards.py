"""Whatever the number of readers and files: every row once, from any row on, and no file read for nothing."""

from __future__ import annotations

import functools
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.data.example import Example
from vlm.data.laps import Laps, Place, find_laps
from vlm.data.readers import read_source, shards_in
from vlm.data.rows import BadRow
from vlm.data.shards import expand, parts_of
from vlm.errors import ConfigError, DataError

UNEVEN = {1: [5], 2: [4, 1], 3: [3, 0, 2], 5: [1, 4, 2, 3, 2]}
"""Rows of each shard, by the number of shards; some hold none."""


def said(items: Iterator[Any] | list[Any]) -> list[str]:
    """The captions of examples, in order."""
    return [item.answers[0] for item in items if isinstance(item, Example)]


START = Place()


def lap_of(laps: Laps, place: Place = START) -> list[tuple[Place, str]]:
    return [(after, said(found)[0]) for after, found in laps.rows(place)]


# --- which files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("split", "wanted"),
    [("train", ["train-0", "trainset"]), ("dev", ["val"]), ("test", ["test_1"])],
)
def test_files_are_named_after_their_part(split: str, wanted: list[str], tmp_path: Path) -> None:
    for name in ("train-0", "trainset", "val", "valuable", "test_1", "testdev-0", "trainer"):
        (tmp_path / f"{name}.parquet").touch()
    found = shards_in(tmp_path, split)
    assert found is not None
    kind, files, named = found
    assert (kind, [file.stem for file in files], named) == ("parquet", wanted, True)


# --- who reads what -----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 7), max_size=9), st.integers(1, 15))
def test_readers_together_read_every_row_once(sizes: list[int], world: int) -> None:
    read: list[tuple[int, int]] = []
    for rank in range(world):
        parts = parts_of(range(len(sizes)), (rank, world))
        read += [(part.file, row) for part in parts for row in range(sizes[part.file]) if part.holds(row)]
    assert sorted(read) == [(file, row) for file, size in enumerate(sizes) for row in range(size)]


@given(st.integers(0, 12), st.integers(1, 6))
def test_whole_files_go_to_one_reader_and_the_rest_is_halved_fairly(files: int, world: int) -> None:
    parts = [parts_of(range(files), (rank, world)) for rank in range(world)]
    whole = [[part.file for part in mine if part.every == 1] for mine in parts]
    assert {len(mine) for mine in whole} == {files // world} or world == 1
    assert len(sum(whole, [])) == len(set(sum(whole, [])))
    # Of 10 rows of each file left over, nobody gets more than one more than another, a file.
    left = [sum(sum(map(part.holds, range(10))) for part in mine if part.every > 1) for mine in parts]
    assert max(left) - min(left) <= max(1, files % world)


def test_readers_that_are_not_there() -> None:
    for shard in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ConfigError):
            parts_of([0], shard)


def test_ranges_of_names() -> None:
    assert expand("x.tar") == ["x.tar"]
    assert expand("a/{098..101}.tar") == ["a/098.tar", "a/099.tar", "a/100.tar", "a/101.tar"]
    assert expand("{0..1}-{2..3}") == ["0-2", "0-3", "1-2", "1-3"]


# --- real shards --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("count", UNEVEN)
def test_one_two_and_three_processes(
    count: int, kind: str, tmp_path: Path, write_shards: Callable[..., list[Path]]
) -> None:
    write_shards(tmp_path, UNEVEN[count], kind)
    whole = said(read_source(tmp_path).examples)
    assert len(whole) == len(set(whole)) == sum(UNEVEN[count])
    for world in (1, 2, 3):
        for lap in (0, 1):
            shares = [lap_of(find_laps(str(tmp_path), "train", (r, world)), Place(lap)) for r in range(world)]
            assert sorted(text for share in shares for _, text in share) == sorted(whole)
        parts = [said(read_source(tmp_path, shard=(r, world), divide=False).examples) for r in range(world)]
        assert sorted(sum(parts, [])) == sorted(whole)


def test_a_reader_opens_its_own_files_only(tmp_path: Path, write_shards: Callable[..., list[Path]]) -> None:
    files = write_shards(tmp_path, [2, 2, 2, 2])
    laps = find_laps(str(tmp_path), "train", (1, 2))
    for file in (files[part.file] for part in find_laps(str(tmp_path), "train", (0, 2)).share(0)):
        file.write_bytes(b"not a tar")
    assert len(lap_of(laps)) == 4


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_from_any_row_on(kind: str, tmp_path: Path, write_shards: Callable[..., list[Path]]) -> None:
    write_shards(tmp_path, UNEVEN[5], kind)
    for shard in ((0, 1), (0, 2), (1, 2), (2, 3)):
        laps = find_laps(str(tmp_path), "train", shard, seed=3)
        rows = lap_of(laps, Place(2))
        assert all(one < other for (one, _), (other, _) in pairwise(rows))
        for number, (after, _) in enumerate(rows):
            assert lap_of(laps, after) == rows[number + 1 :]


def test_laps_differ_and_are_the_seeds(tmp_path: Path, write_shards: Callable[..., list[Path]]) -> None:
    write_shards(tmp_path, [2] * 8)
    orders = [[text for _, text in lap_of(find_laps(str(tmp_path), seed=1), Place(lap))] for lap in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert orders[1] == [text for _, text in lap_of(find_laps(str(tmp_path), seed=1), Place(1))]
    assert orders[1] != [text for _, text in lap_of(find_laps(str(tmp_path), seed=2), Place(1))]


def test_a_damaged_sample_is_a_bad_row_at_one_reader(
    tmp_path: Path, write_shards: Callable[..., list[Path]]
) -> None:
    (file,) = write_shards(tmp_path, [5])
    file.write_bytes(file.read_bytes().replace(b"picture number 2", b"picture \xff\xff\xff\xff number"[:16]))
    shares = [[found for _, found in find_laps(str(tmp_path), "train", (r, 2)).rows()] for r in range(2)]
    bad = [item for share in shares for found in share for item in found if isinstance(item, BadRow)]
    assert [str(row) for row in bad] == ["train-000.tar/00002: member .txt is damaged"]
    assert sum(len(said(found)) for share in shares for found in share) == 4


# --- from elsewhere -----------------------------------------------------------------------------------


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """(URL, folder, paths asked for) of a file server on this machine."""
    asked: list[str] = []

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            asked.append(self.path)

    folder = tmp_path / "served"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder, asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_shards_over_http(
    served: tuple[str, Path, list[str]],
    write_shards: Callable[..., list[Path]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    url, folder, asked = served
    write_shards(folder, UNEVEN[3])
    source = url + "/train-{000..002}.tar"
    local = [[text for _, text in lap_of(find_laps(str(folder), "train", (r, 2), seed=5))] for r in range(2)]
    for rank in range(2):
        laps = find_laps(source, "train", (rank, 2), seed=5)
        asked.clear()
        rows = lap_of(laps)
        assert [text for _, text in rows] == local[rank]
        assert len(asked) == len(laps.share(0)) == 2, "one whole shard, and its part of the one left over"
        assert lap_of(laps, rows[0][0]) == rows[1:]
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"train-00\d\.tar cannot be read: HTTP"):
        lap_of(find_laps(source))


def test_shards_of_another_file_system(tmp_path: Path, write_shards: Callable[..., list[Path]]) -> None:
    fsspec = pytest.importorskip("fsspec")
    for file in write_shards(tmp_path, [2, 1]):
        fsspec.filesystem("memory").pipe(f"/shards/{file.name}", file.read_bytes())
    laps = find_laps("memory://shards/train-{000..001}.tar", "train", (0, 1))
    assert sorted(text for _, text in lap_of(laps)) == [f"picture number {n}" for n in range(3)]


def test_a_hub_data_set(tmp_path: Path, write_shards: Callable[..., list[Path]]) -> None:
    """`datasets` finds a local folder as it finds a hub repository."""
    write_shards(tmp_path / "set" / "data", UNEVEN[3], "parquet")
    from vlm.data.streams import hub_part

    _, kind, part, urls = hub_part(str(tmp_path / "set"), "train")
    assert (kind, part, len(urls)) == ("parquet", "train", 3)
    shares = [lap_of(Laps(kind, tuple(urls), (rank, 2))) for rank in range(2)]
    assert sorted(text for share in shares for _, text in share) == [f"picture number {n}" for n in range(5)]


def test_what_cannot_be_streamed_says_so(tmp_path: Path, write_shards: Callable[..., list[Path]]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("file_name,text\n")
    for source in ("empty", "table.csv", "absent"):
        with pytest.raises(DataError, match="cannot be streamed"):
            find_laps(str(tmp_path / source))
    with pytest.raises(DataError, match=r"x-1.tar is missing"):
        find_laps(str(tmp_path / "x-{1..2}.tar"))
    write_shards(tmp_path / "shards", [1])
    with pytest.raises(DataError, match="has no part called dev, validation, val or valid; it has train"):
        find_laps(str(tmp_path / "shards"), "dev")
    before = find_laps(str(tmp_path / "shards")).fingerprint()
    assert before == find_laps(str(tmp_path / "shards"), shard=(1, 2)).fingerprint()
    write_shards(tmp_path / "shards", [30])
    assert before != find_laps(str(tmp_path / "shards")).fingerprint()
