"""Benchmarks as the hub has them: the same examples as from the official files, whatever holds the rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hubrows import (
    Row,
    aokvqa,
    flickr30k,
    gqa,
    nocaps,
    okvqa,
    pope,
    read,
    scienceqa,
    textvqa,
    vizwiz,
    vqa_rad,
    vqav2,
    write,
)

from vlm.errors import DataError, VLMError
from vlm.eval import tasks
from vlm.eval.main import main
from vlm.eval.tasks import hub

pa = pytest.importorskip("pyarrow")
datasets = pytest.importorskip("datasets")

FIXTURES = Path(__file__).parent / "fixtures"


# task, its fixture, its split, the file in the repository, its rows
CASES: list[tuple[str, str, str, str, Callable[[], list[Row]]]] = [
    ("vqav2", "vqav2", "dev", "data/validation-00000-of-00001.parquet", vqav2),
    ("okvqa", "okvqa", "test", "data/val2014-00000-of-00002.parquet", okvqa),
    ("textvqa", "textvqa", "dev", "data/validation-00000-of-00003.parquet", textvqa),
    ("vizwiz", "vizwiz", "dev", "data/val-00000-of-00005-7775fd61bc6a3d98.parquet", vizwiz),
    ("aokvqa", "aokvqa", "dev", "data/validation-00000-of-00001-b2bd0de231b6326a.parquet", aokvqa),
    ("aokvqa-choice", "aokvqa", "dev", "validation.parquet", aokvqa),
    ("pope", "pope", "popular", "Full/popular-00000-of-00001.parquet", pope),
    ("pope", "pope", "popular", "data/test-00000-of-00003.parquet", pope),
    ("nocaps", "nocaps", "dev", "data/validation-00000-of-00003.parquet", nocaps),
    ("flickr30k", "flickr30k", "test", "TEST/test/0000.parquet", flickr30k),
]
IDS = [f"{case[0]}-{Path(case[3]).name}" for case in CASES]
UNKNOWN = {"confidences", "domain"}
"""What the official files say and the hub's do not."""


def told(examples: list[Any]) -> list[Any]:
    return [
        (e.id, e.turns[-1].text, e.answers, {k: v for k, v in e.meta.items() if k not in UNKNOWN})
        for e in examples
    ]


@pytest.mark.parametrize(("name", "fixture", "split", "file", "rows"), CASES, ids=IDS)
def test_the_same_examples_as_from_the_official_files(
    name: str, fixture: str, split: str, file: str, rows: Callable[[], list[Row]], tmp_path: Path
) -> None:
    path = write(tmp_path / file, rows())
    task = tasks.get(name)
    official = task.examples(FIXTURES / fixture, split)
    found = task.examples(tmp_path, split)
    assert told(found) == told(official)
    assert [e.images[0] for e in found] == [Path(str(e.images[0])).read_bytes() for e in official]
    # Words alone: the pictures are not even read.
    write(path, [{key: value for key, value in row.items() if key != "image"} for row in rows()])
    assert told(task.examples(tmp_path, split, pictures=False)) == told(official)
    with pytest.raises(DataError, match=rf"{path.name} row 0 has no column 'image'; it has "):
        task.examples(tmp_path, split)


def test_vizwiz_keeps_confidences_where_they_are(tmp_path: Path) -> None:
    said = [row["answers"] for row in read("vizwiz/val.json")]
    rows = [row | {"answers": answers} for row, answers in zip(vizwiz(), said, strict=True)]
    write(tmp_path / "val.parquet", rows)
    task = tasks.get("vizwiz")
    official = [example.meta for example in task.examples(FIXTURES / "vizwiz")]
    assert [example.meta for example in task.examples(tmp_path / "val.parquet")] == official


def test_scienceqa_counts_the_rows_without_picture(tmp_path: Path) -> None:
    rows = scienceqa()
    bare = [number for number, row in enumerate(rows) if row["image"] is None]
    write(tmp_path / "data" / "test-00000-of-00001.parquet", rows)
    task = tasks.get("scienceqa-img")
    official, found = task.examples(FIXTURES / "scienceqa-img"), task.examples(tmp_path)
    assert bare
    assert [e.id for e in found] == [str(n) for n in range(len(rows)) if n not in bare]
    assert [(e.turns, e.answers, e.meta["options"], e.meta["question_type"]) for e in found] == [
        (e.turns, e.answers, e.meta["options"], e.meta["question_type"]) for e in official
    ]
    assert [e.images[0] for e in found] == [Path(str(e.images[0])).read_bytes() for e in official]
    assert told(task.examples(tmp_path, pictures=False)) == told(found)
    write(tmp_path / "ScienceQA-FULL" / "test-00000-of-00001.parquet", rows)
    with pytest.raises(DataError, match="test part in ScienceQA-FULL, data: name one of the folders"):
        task.examples(tmp_path)


def test_vqa_rad_is_closed_by_its_answers(tmp_path: Path) -> None:
    write(tmp_path / "data" / "test-00000-of-00001-e5bc3d208bb4deeb.parquet", vqa_rad())
    task = tasks.get("vqa-rad")
    official, found = task.examples(FIXTURES / "vqa-rad"), task.examples(tmp_path)
    assert [e.id for e in found] == [str(n) for n in range(len(official))]
    assert [(e.turns, e.answers, e.meta["answer_type"]) for e in found] == [
        (e.turns, e.answers, e.meta["answer_type"]) for e in official
    ]


def test_gqa_joins_its_two_tables(tmp_path: Path) -> None:
    rows, stored = gqa()
    write(tmp_path / "testdev_balanced_instructions" / "testdev-00000-of-00001.parquet", rows)
    task = tasks.get("gqa")
    official = task.examples(FIXTURES / "gqa")
    assert told(task.examples(tmp_path, pictures=False)) == told(official)
    with pytest.raises(DataError, match="no Parquet file in a folder testdev_balanced_images"):
        task.examples(tmp_path)
    write(tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", stored)
    found = task.examples(tmp_path)
    assert told(found) == told(official)
    assert [e.images[0] for e in found] == [Path(str(e.images[0])).read_bytes() for e in official]
    write(tmp_path / "testdev_balanced_images" / "testdev-00000-of-00001.parquet", stored[1:])
    with pytest.raises(DataError, match=rf"row 0: testdev_balanced_images has no picture {stored[0]['id']}"):
        task.examples(tmp_path)


def test_pope_takes_a_setting_out_of_the_whole(tmp_path: Path) -> None:
    write(tmp_path / "data" / "test-00000-of-00002.parquet", [*pope("random"), *pope("popular")[:5]])
    write(tmp_path / "data" / "test-00001-of-00002.parquet", [*pope("popular")[5:], *pope("adversarial")])
    for split in ("random", "popular", "adversarial"):
        official = tasks.get("pope").examples(FIXTURES / "pope", split)
        assert told(tasks.get("pope").examples(tmp_path, split)) == told(official)


def test_features_that_datasets_stores_are_read_too(tmp_path: Path) -> None:
    rows = vqav2()
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    table.to_parquet(str(tmp_path / "data" / "validation-00000-of-00001.parquet"))
    task = tasks.get("vqav2")
    official = task.examples(FIXTURES / "vqav2")
    assert told(task.examples(tmp_path)) == told(official)
    assert told(task.examples(tmp_path, pictures=False)) == told(official)
    assert task.examples(tmp_path)[3].images[0] == rows[3]["image"]["bytes"]


VQA_FILE = "validation-00000-of-00001.parquet"


@pytest.mark.parametrize(
    ("name", "rows", "change", "message"),
    [
        ("vqav2", vqav2, {"question": None}, r"parquet row 2: an entry has no 'question'"),
        ("vqav2", vqav2, {"answer_type": "poem"}, r"parquet row 2: question 74002 has the .* type 'poem'"),
        ("vqav2", vqav2, {"image": None}, r"parquet row 2, column 'image': no picture named"),
        ("textvqa", textvqa, {"answers": None}, r"parquet row 2: an entry has no 'answers'"),
        ("vizwiz", vizwiz, {"category": "poem"}, r"row 2: question VizWiz.*\.jpg has the unknown .* 'poem'"),
        ("aokvqa", aokvqa, {"direct_answers": "['a'"}, r"row 2: 'direct_answers' is no list: \['a'"),
        ("aokvqa", aokvqa, {"direct_answers": "{'a'}"}, r"row 2: 'direct_answers' is no list"),
        ("aokvqa", aokvqa, {"correct_choice_idx": 4}, r"row 2: 'correct_choice_idx' is 4 of 4 choices"),
        ("aokvqa", aokvqa, {"correct_choice_idx": None}, r"row 2: an entry has no 'correct_choice_idx'"),
        ("nocaps", nocaps, {"annotations_captions": None}, r"row 2: an entry has no 'annotations_captions'"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    name: str, rows: Callable[[], list[Row]], change: Row, message: str, tmp_path: Path
) -> None:
    table = rows()
    table[2] = table[2] | change
    write(tmp_path / VQA_FILE, table)
    with pytest.raises(DataError, match=message):
        tasks.get(name).examples(tmp_path)


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", [{k: v for k, v in row.items() if k != "split"} for row in flickr30k()])
    with pytest.raises(DataError, match=r"test\.parquet row 0: an entry has no 'split'"):
        tasks.get("flickr30k").examples(tmp_path)
    text = [row | {"answers": "stop"} for row in textvqa()]
    write(tmp_path / VQA_FILE, text)
    with pytest.raises(DataError, match=r"row 0: 'answers' is no list: stop"):
        tasks.get("textvqa").examples(tmp_path / VQA_FILE)


def test_a_part_that_is_not_there(tmp_path: Path) -> None:
    write(tmp_path / "data" / VQA_FILE, vqav2())
    with pytest.raises(DataError, match="has no part called train or training; it has validation$"):
        tasks.get("vqav2").examples(tmp_path, "train")
    (tmp_path / "data" / "train-00000-of-00001.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(DataError, match="cannot be read"):
        tasks.get("vqav2").examples(tmp_path, "train")


@pytest.mark.parametrize("name", ["dev", "validation", "val", "valid", "training"])
def test_parts_are_called_as_in_folders(name: str, tmp_path: Path) -> None:
    write(tmp_path / f"{name}-00000-of-00001.parquet", textvqa())
    asked = "train" if name == "training" else "val"
    assert len(tasks.get("textvqa").examples(tmp_path, asked)) == 12
    (tmp_path / f"{name}-00000-of-00001.parquet").rename(tmp_path / "x.parquet")
    with pytest.raises(DataError, match=rf"no part called .*\b{name}\b.*; it has x$"):
        tasks.get("textvqa").examples(tmp_path, asked)


def test_the_part_of_a_file() -> None:
    names = ("data/val2014-00000-of-00002", "default/validation/0000", "testdev-00000-of-00001", "Test")
    parts = [hub.part_of(Path(f"{name}.parquet")) for name in names]
    assert parts == ["val2014", "validation", "testdev", "test"]


def test_scores_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "Full" / "random-00000-of-00001.parquet", pope("random"))
    answers = [{"question_id": row["question_id"], "answer": row["answer"]} for row in pope("random")]
    (tmp_path / "p.json").write_text(json.dumps(answers), encoding="utf-8")
    words = ["score", "pope", "--data", str(tmp_path), "--split", "random", "--no-html"]
    assert main([*words, "--predictions", str(tmp_path / "p.json"), "--out", str(tmp_path / "r.json")]) == 0
    assert json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))["metrics"]["accuracy"] == 100.0
    assert "accuracy" in capsys.readouterr().out


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of `datasets` that holds owner/POPE and owner/GQA as it leaves them, and no network."""
    from datasets.packaged_modules.parquet.parquet import Parquet

    rows, stored = gqa()
    tables = {
        "pope/default": ("test", [*pope("random"), *pope("popular")]),
        "gqa/testdev_balanced_instructions": ("testdev", rows),
        "gqa/testdev_balanced_images": ("testdev", stored),
    }
    cache = tmp_path / "cache"
    for name, (part, table) in tables.items():
        file = write(tmp_path / name / f"{part}.parquet", table)
        set_name, config = name.split("/")
        builder = Parquet(
            cache_dir=str(tmp_path / "made"),
            dataset_name=set_name,
            config_name=config,
            data_files={part: [str(file)]},
        )
        builder.download_and_prepare(output_dir=str(cache / f"owner___{set_name}" / config / "0.0.0" / "abc"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return cache


def test_a_hub_id_offline_is_its_cached_copy(cached: Path) -> None:
    task = tasks.get("pope")
    official = task.examples(FIXTURES / "pope", "popular")
    found = task.examples(Path("owner/pope"), "popular")
    assert told(found) == told(official)
    assert [e.images[0] for e in found] == [Path(str(e.images[0])).read_bytes() for e in official]
    assert told(task.examples(Path("owner/pope"), "popular", pictures=False)) == told(official)
    with pytest.raises(DataError, match="owner/vqa is no file or folder, and no data set of the hub"):
        tasks.get("vqav2").examples(Path("owner/vqa"))
    with pytest.raises(
        DataError, match="owner/pope has no part called dev, validation, val or valid; it has t"
    ):
        tasks.get("vqav2").examples(Path("owner/pope"))


def test_a_hub_id_with_two_tables(cached: Path) -> None:
    task = tasks.get("gqa")
    official = task.examples(FIXTURES / "gqa")
    found = task.examples(Path("owner/gqa"))
    assert told(found) == told(official)
    assert [e.images[0] for e in found] == [Path(str(e.images[0])).read_bytes() for e in official]


def test_offline_holds_for_the_data_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in (["pope"], ["score", "pope", "--predictions", "p.json"]):
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        with pytest.raises(VLMError, match="holds no POPE file"):
            main([*words, "--data", str(tmp_path), "--offline"])
        assert os.environ["HF_HUB_OFFLINE"] == "1"
