"""Tables, shards and data sets of the hub: every value text in every layout; what is damaged is named."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm.config import CAPTION_PROMPT
from vlm.conversation import ImageSlot
from vlm.data.example import Example
from vlm.data.readers import read_source
from vlm.data.rows import BadRow
from vlm.data.sources import read_dataset
from vlm.data.streams import read_webdataset
from vlm.errors import DataError

TRICKY = ["007", "true", "N/A", "1e5", "nan", "1.50", "NULL", "3", "None", "yes"]


def png(draw: Callable[..., Image.Image], seed: int) -> bytes:
    buffer = io.BytesIO()
    draw(seed).save(buffer, format="PNG")
    return buffer.getvalue()


def answers(examples: list[Example]) -> list[tuple[str, ...]]:
    return [example.answers for example in examples]


def tricky_rows() -> list[dict[str, str]]:
    return [{"question": f"what is {n}?", "answer": word} for n, word in enumerate(TRICKY)]


@pytest.fixture
def shapes(tmp_path: Path, save: Callable[..., Path]) -> Path:
    """A folder `images/` with a picture per tricky answer."""
    for n in range(len(TRICKY)):
        save(tmp_path / "images" / f"{n}.png", n)
    return tmp_path


@pytest.mark.parametrize(
    "layout", ["metadata.csv", "metadata.jsonl", "csv", "tsv", "jsonl", "json", "parquet", "tar"]
)
def test_every_value_stays_the_text_it_is(
    layout: str, shapes: Path, draw: Callable[..., Image.Image]
) -> None:
    source = write_layout(layout, shapes, draw)
    examples = read_source(source, "train").checked()
    assert sorted(answers(examples)) == sorted((word,) for word in TRICKY)
    assert all(e.turns[0].parts[0] == ImageSlot(0) for e in examples)


def write_layout(layout: str, root: Path, draw: Callable[..., Image.Image]) -> Path:
    """The tricky rows in one layout; returns what to read."""
    rows = [{"file_name": f"{n}.png", **row} for n, row in enumerate(tricky_rows())]
    below = [{**row, "file_name": f"images/{row['file_name']}"} for row in rows]
    table = "file_name,question,answer\n"
    if layout == "metadata.csv":
        text = table + "".join(",".join(row.values()) + "\n" for row in rows)
        (root / "images" / layout).write_text(text)
        return root / "images"
    if layout == "metadata.jsonl":
        (root / "images" / layout).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return root / "images"
    path = root / f"data.{layout}"
    if layout in ("csv", "tsv"):
        comma = "," if layout == "csv" else "\t"
        lines = [table.replace(",", comma), *(comma.join(row.values()) + "\n" for row in below)]
        path.write_text("".join(lines))
    elif layout == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in below))
    elif layout == "json":
        path.write_text(json.dumps(below))
    elif layout == "parquet":
        datasets = pytest.importorskip("datasets")
        columns = [
            {"image": {"bytes": png(draw, n), "path": None}, **row} for n, row in enumerate(tricky_rows())
        ]
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "question": datasets.Value("string"),
                "answer": datasets.Value("string"),
            }
        )
        datasets.Dataset.from_list(columns, features=features).to_parquet(str(path))
    else:
        write_tar(path, [(f"{n:04}", png(draw, n), row) for n, row in enumerate(tricky_rows())])
    return path


def write_tar(path: Path, samples: list[tuple[str, bytes, dict[str, Any]]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, image, row in samples:
            for suffix, content in (("png", image), ("json", json.dumps(row).encode())):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def shards(tmp_path: Path, draw: Callable[..., Image.Image], count: int) -> list[Path]:
    paths = []
    for shard in range(count):
        samples = [
            (f"{shard}{n:03}", png(draw, 10 * shard + n), {"caption": f"{shard}-{n}"}) for n in range(5)
        ]
        paths.append(tmp_path / f"train-{shard:05}.tar")
        write_tar(paths[-1], samples)
    return paths


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_are_read_once_by_several_readers(
    count: int, tmp_path: Path, draw: Callable[..., Image.Image]
) -> None:
    pytest.importorskip("datasets")
    files = shards(tmp_path, draw, count)
    everything = [e.answers[0] for e in good(read_webdataset(files))]
    assert len(everything) == len(set(everything)) == 5 * count
    for world in (2, 3):
        parts = [[e.answers[0] for e in good(read_webdataset(files, (rank, world)))] for rank in range(world)]
        assert sorted(sum(parts, [])) == sorted(everything)


def good(items: Iterator[Example | BadRow]) -> list[Example]:
    return [item for item in items if isinstance(item, Example)]


def test_webdataset_folder_with_text_members(tmp_path: Path, draw: Callable[..., Image.Image]) -> None:
    pytest.importorskip("datasets")
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for n in range(3):
            for suffix, content in (("jpg", png(draw, n)), ("txt", f"caption {n}".encode())):
                info = tarfile.TarInfo(f"{n}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    examples = read_dataset(tmp_path, split="train")
    assert answers(examples) == [("caption 0",), ("caption 1",), ("caption 2",)]
    assert examples[0].images == (png(draw, 0),), "pictures stay bytes"
    assert examples[0].turns[0].text == CAPTION_PROMPT
    with pytest.raises(DataError, match="no part called dev, validation, val or valid; it has "):
        read_dataset(tmp_path, split="dev")


def test_one_damaged_sample_does_not_cost_the_shard(tmp_path: Path, draw: Callable[..., Image.Image]) -> None:
    rows: list[tuple[str, bytes]] = [
        ("json", b'{"caption": "007"}'),
        ("json", b"{broken"),
        ("txt", b"\xff\xfe"),
    ]
    rows += [("json", b'{"question": "what?", "answers": ["a", 7]}'), ("cls", b"3"), ("json", b"[1]")]
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for n, (suffix, content) in enumerate(rows):
            for name, data in ((f"d/{n}.seg.{suffix}", content), (f"d/{n}.png", png(draw, n))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    reading = read_source(tmp_path / "x.tar")
    assert answers(reading.examples) == [("007",), ("a", "7")]
    assert [str(row) for row in reading.bad] == [
        "x.tar/d/1: member .seg.json is damaged",
        "x.tar/d/2: member .seg.txt is damaged",
        "x.tar/d/4: no text or question column (png; wanted: text, or question and answer)",
        "x.tar/d/5: no text or question column (seg, png; wanted: text, or question and answer)",
    ]


@pytest.mark.parametrize("beyond", [0, 100, 700])
def test_a_shard_that_is_cut_off_is_not_taken_for_a_short_one(
    tmp_path: Path, draw: Callable[..., Image.Image], beyond: int
) -> None:
    """Between two samples, in a header, in a picture."""
    write_tar(tmp_path / "x.tar", [(f"{n}", png(draw, n), {"text": "a box"}) for n in range(3)])
    whole = (tmp_path / "x.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as tar:
        end = tar.getmembers()[2].offset
    (tmp_path / "x.tar").write_bytes(whole[: end + beyond])
    with pytest.raises(DataError, match=r"x\.tar cannot be read: .*(cut off|end of data)"):
        read_source(tmp_path / "x.tar")


def test_damaged_shards_are_one_clear_error(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    (tmp_path / "a.tar").write_bytes(b"not a tar" * 100)
    for name in ("a.parquet", "a.tar"):
        with pytest.raises(DataError, match="cannot be read"):
            read_source(tmp_path / name)


@pytest.mark.parametrize("layout", ["metadata.csv", "metadata.jsonl", "parquet"])
def test_a_hub_data_set_is_read_as_text_too(
    layout: str, shapes: Path, draw: Callable[..., Image.Image], tmp_path: Path
) -> None:
    """`datasets` finds a local folder as it finds a hub repository; its guesses of types are not used."""
    pytest.importorskip("datasets")
    from vlm.data.streams import read_hub

    repository = tmp_path / "owner" / "name"
    (repository / "train").mkdir(parents=True)
    source = write_layout(layout, shapes, draw)
    for path in sorted(source.iterdir()) if source.is_dir() else [source]:
        path.rename(repository / "train" / path.name)
    examples = good(read_hub(str(repository), "train"))
    assert sorted(answers(examples)) == sorted((word,) for word in TRICKY)
    halves = [good(read_hub(str(repository), "train", (rank, 2))) for rank in range(2)]
    assert sorted(e.id for half in halves for e in half) == sorted(e.id for e in examples)
    with pytest.raises(DataError, match="has no part called test; it has "):
        list(read_hub(str(repository), "test"))
