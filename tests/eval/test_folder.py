"""Your own pictures: metadata in a folder, as CSV or JSON lines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from parrot import Parrot

from vlm.errors import DataError
from vlm.eval import session, tasks
from vlm.eval.main import _parser, main

if TYPE_CHECKING:
    from PIL import Image

ROWS = [
    {"file_name": f"{n % 2}.png", "question": f"What is number {n}?", "answer": f"thing{n}", "id": n}
    for n in range(6)
]


@pytest.fixture
def own(tmp_path: Path, draw: Callable[..., Image.Image]) -> Path:
    """A folder whose one metadata file is all there is."""
    root = tmp_path / "own"
    root.mkdir()
    for n in range(2):
        draw(n).save(root / f"{n}.png")
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return root


def run(root: Path, *extra: str) -> dict[str, Any]:
    args = _parser().parse_args(["folder-vqa", "--data", str(root), "--out", str(root / "o.json"), *extra])
    task = tasks.get("folder-vqa")
    examples = task.examples(args.data, args.split)
    return session.Session(task, args, Parrot(), args.out, examples).evaluate()


def test_what_is_evaluated_is_never_the_training_split(own: Path) -> None:
    prior = run(own)["controls"]["prior"]
    assert prior["metrics"] is None
    assert "has no training split: its one metadata.jsonl is what is evaluated" in prior["reason"]
    with pytest.raises(DataError, match="--shots takes its examples .* has no training split"):
        run(own, "--shots", "2", "--restart")


def test_training_rows_in_a_folder_of_their_own(own: Path) -> None:
    (own / "train").mkdir()
    taught = [row | {"answer": "cat", "id": f"t{row['id']}"} for row in ROWS]
    (own / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, taught)), encoding="utf-8")
    assert [e.answers for e in tasks.get("folder-vqa").examples(own, "train", pictures=False)] == [
        ("cat",)
    ] * 6
    assert run(own)["controls"]["prior"]["metrics"]["exact_match"] == 0.0


@pytest.mark.parametrize("name", ["dev", "val", "validation", "valid"])
@pytest.mark.parametrize("task", ["folder-vqa", "folder-caption"])
def test_every_usual_name_of_the_dev_folder(name: str, task: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    row = {"file_name": "a.png", "question": "Who?", "answers": ["me", "you"], "text": ["a dog", "the dog"]}
    (tmp_path / name / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (example,) = tasks.get(task).examples(tmp_path, "dev", pictures=False)
    assert example.answers == (("me", "you") if task == "folder-vqa" else ("a dog", "the dog"))
    assert example.images == (tmp_path / name / "a.png",)


@pytest.mark.parametrize(
    ("row", "answers"),
    [
        ('"answer": 0', ("0",)),
        ('"answer": false', ("false",)),
        ('"answer": 1.50', ("1.50",)),
        ('"answers": [0, "none"]', ("0", "none")),
        ('"answer": "a\u2028b"', ("a\u2028b",)),
        ('"answer": "a\x85b"', ("a\x85b",)),
    ],
)
def test_json_lines_stay_as_they_are_written(row: str, answers: tuple[str, ...], tmp_path: Path) -> None:
    line = '{"file_name": "a.png", "question": "q", ' + row + "}\n"
    (tmp_path / "metadata.jsonl").write_text(line * 2, encoding="utf-8")
    found = tasks.get("folder-vqa").examples(tmp_path, pictures=False)
    assert [example.answers for example in found] == [answers] * 2


@pytest.mark.parametrize(
    ("task", "name", "text", "message"),
    [
        ("folder-vqa", "metadata.csv", 'a.png,q?,"[oops"', r"entry 1 is not JSON"),
        ("folder-vqa", "metadata.csv", "a.png,q?,x,more", r"metadata\.csv:2: wrong number of cells"),
        ("folder-vqa", "metadata.csv", "a.png,q?,", r"entry 1: no text in its column answers or answer"),
        ("folder-vqa", "metadata.csv", "a.png," + "b" * (1 << 24) + "b,c", r"not CSV \(field larger"),
        (
            "folder-vqa",
            "metadata.jsonl",
            '{"file_name": "a.png", "question": [1], "answer": "x"}',
            "question",
        ),
        (
            "folder-vqa",
            "metadata.jsonl",
            '{"file_name": "a.png", "question": "q", "answers": {"a": 1}}',
            "answ",
        ),
        ("folder-vqa", "metadata.jsonl", '{"file_name": "a.png", "question": "q", "answers": []}', "no text"),
        ("folder-vqa", "metadata.jsonl", '{"file_name": ["a.png"]}', "entry 1: no file_name"),
        ("folder-vqa", "metadata.jsonl", '{"file_name": "a", "file_name": "b"}', "'file_name' stands twice"),
        ("folder-vqa", "metadata.jsonl", "[" * 100_000, "line 1 is not JSON.*nested too deeply"),
        ("folder-caption", "metadata.jsonl", '{"file_name": "a.png", "text": {}}', "caption or text"),
    ],
)
def test_a_row_that_cannot_be_used_is_one_clear_error(
    task: str, name: str, text: str, message: str, tmp_path: Path
) -> None:
    header = "file_name,question,answers\n" if name.endswith("csv") else ""
    (tmp_path / name).write_text(header + text + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        tasks.get(task).examples(tmp_path, "all", pictures=False)


def test_long_cells_of_a_csv_are_read(tmp_path: Path) -> None:
    words = "long " * 40_000
    (tmp_path / "metadata.csv").write_text(f"file_name,question,answer\na.png,{words}?,c\n", encoding="utf-8")
    (example,) = tasks.get("folder-vqa").examples(tmp_path, pictures=False)
    assert example.turns[-1].text == f"{words}?"


@pytest.mark.parametrize("split", ["test", "dev", "all"])
def test_a_converted_set_is_scored_without_its_pictures(split: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{}", encoding="utf-8")
    for part, row in zip(("train", "validation", "test"), ROWS, strict=False):
        (tmp_path / part).mkdir()
        (tmp_path / part / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (example,) = tasks.get("folder-vqa").examples(tmp_path, split, pictures=False)
    assert example.answers == ({"all": "thing0", "dev": "thing1", "test": "thing2"}[split],)
    with pytest.raises(DataError, match=r"missing"):
        tasks.get("folder-vqa").examples(tmp_path, split)


def test_a_wrong_folder_is_never_another_set(tmp_path: Path) -> None:
    argv = ["score", "easy-vqa", "--data", str(tmp_path / "absent"), "--predictions", "none.json"]
    with pytest.raises(DataError, match="absent is missing; --data says where the data of easy-vqa lie"):
        main(argv)
