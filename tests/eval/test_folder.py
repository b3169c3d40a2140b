"""Your own pictures: metadata in a folder, as CSV or JSON lines."""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from parrot import Parrot

from vlm.data.readers import read_source
from vlm.errors import DataError
from vlm.eval import session, tasks
from vlm.eval.main import _parser, main
from vlm.eval.report import read_items

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
    assert "has no training split: its one table is what is evaluated" in prior["reason"]
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
        ("folder-vqa", "metadata.csv", 'a.png,q?,"[oops"', r"metadata\.csv:2: list is not JSON"),
        ("folder-vqa", "metadata.csv", "a.png,q?,x,more", r"metadata\.csv:2: wrong number of cells"),
        ("folder-vqa", "metadata.csv", "a.png,q?,", r"metadata\.csv:2: empty answer"),
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
        (
            "folder-vqa",
            "metadata.jsonl",
            '{"file_name": "a.png", "question": "q", "answers": []}',
            "empty answer",
        ),
        (
            "folder-vqa",
            "metadata.jsonl",
            '{"file_name": ["a.png"]}',
            r"metadata\.jsonl:1: no text or question",
        ),
        ("folder-vqa", "metadata.jsonl", '{"file_name": "a", "file_name": "b"}', "'file_name' stands twice"),
        ("folder-vqa", "metadata.jsonl", "[" * 100_000, r"metadata\.jsonl:1: not JSON \(nested too deeply"),
        (
            "folder-vqa",
            "metadata.jsonl",
            '{"file_name": "a.png", "question": "q", "answers": [["a"]]}',
            r"metadata\.jsonl:1: no text",
        ),
        (
            "folder-vqa",
            "metadata.jsonl",
            '{"file_name": "a.png", "question": "\\ud83d", "answer": "x"}',
            r"metadata\.jsonl:1: half a character",
        ),
        ("folder-vqa", "metadata.jsonl", '{"file_name": "a.png", "question": "q"}', "no answer column"),
        (
            "folder-caption",
            "metadata.jsonl",
            '{"file_name": "a.png", "text": {}}',
            r"metadata\.jsonl:1: empty text",
        ),
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


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "\ufeffFile Name;Question;Answer\r\nsub\\a.png;Who?;me\r\n"),
        ("Metadata.CSV", "image,question,answer\nsub/a.png,Who?,me\n"),
        ("metadata.csv", "file_name,question,answer\n sub/a.png ,Who?, me\n"),
        ("metadata.csv", "file_name,question,answer\nsub/a.PNG,Who?,me\n"),
        ("metadata.jsonl", '{"image": "sub/a.png", "question": "Who?", "answer": ["me"]}\n'),
    ],
)
def test_whatever_training_reads_is_evaluated(
    name: str, text: str, tmp_path: Path, draw: Callable[..., Image.Image]
) -> None:
    (tmp_path / "sub").mkdir()
    draw(1).save(tmp_path / "sub" / "a.png")
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    (learnt,) = read_source(tmp_path).checked()
    (asked,) = tasks.get("folder-vqa").examples(tmp_path)
    assert (asked.images, asked.turns, asked.answers) == (learnt.images, learnt.turns, learnt.answers)
    assert asked.answers == ("me",)


def test_several_pictures_a_row(own: Path) -> None:
    row = {"images": ["0.png", "1.png"], "question": "Which?", "answer": "both", "caption": ["two", "a pair"]}
    (own / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (asked,) = tasks.get("folder-vqa").examples(own)
    (told,) = tasks.get("folder-caption").examples(own)
    assert asked.images == told.images == (own / "0.png", own / "1.png")
    assert (asked.id, told.id, told.answers) == ("test/0", "0.png,1.png", ("two", "a pair"))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_accents_of_a_name_may_be_composed_either_way(
    form: Any, tmp_path: Path, draw: Callable[..., Image.Image]
) -> None:
    draw(1).save(tmp_path / unicodedata.normalize("NFD", "B\u00fcro.png"))
    name = unicodedata.normalize(form, "B\u00fcro.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{name},x\n", encoding="utf-8")
    (example,) = tasks.get("folder-caption").examples(tmp_path)
    assert example.images[0].is_file()  # type: ignore[union-attr]


def test_a_name_that_is_no_utf_8(tmp_path: Path, draw: Callable[..., Image.Image]) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    try:
        draw(1).save(tmp_path / name)
    except OSError:
        pytest.skip("this file system has no such names")
    row = {"file_name": name, "question": "Who?", "answer": "me", "text": "a cafe"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row), encoding="utf-8")
    assert run(tmp_path, "--no-html")["n"] == 1
    (row,) = read_items(tmp_path / "o.json")
    assert row["images"] == [f"{tmp_path}/caf\\udce9.png"]
    (example,) = tasks.get("folder-caption").examples(tmp_path)
    assert example.id == "caf\\udce9.png"


@pytest.mark.parametrize(
    ("cell", "answers"),
    [
        ('["x","y"]', ("x", "y")),
        (' [ "x" ] ', ("x",)),
        ("[0.1, 0.2]", ("[0.1, 0.2]",)),
        ("[the red one]", ("[the red one]",)),
    ],
)
def test_a_list_in_a_cell_is_what_training_makes_of_it(
    cell: str, answers: tuple[str, ...], own: Path
) -> None:
    (own / "metadata.jsonl").unlink()
    with (own / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("file_name", "question", "answer"), ("0.png", "Who?", cell)])
    (asked,) = tasks.get("folder-vqa").examples(own)
    assert asked.answers == read_source(own).checked()[0].answers == answers


def test_a_list_as_python_prints_it_is_refused(own: Path) -> None:
    (own / "metadata.jsonl").unlink()
    (own / "metadata.csv").write_text("file_name,question,answer\n0.png,Who?,\"['x', 'y']\"\n")
    with pytest.raises(DataError, match=r"metadata\.csv:2: list is not JSON \(\['x', 'y'\]\)"):
        tasks.get("folder-vqa").examples(own)


# --- a folder with one part ------------------------------------------------------------------------------


@pytest.fixture
def one_part(tmp_path: Path, draw: Callable[..., Image.Image]) -> Path:
    """Ten pictures, the last a copy of the first, with two questions and a caption each."""
    root = tmp_path / "one"
    root.mkdir()
    rows: list[dict[str, str]] = []
    for n in range(10):
        draw(n % 9).save(root / f"{n}.png")
        rows += [{"file_name": f"{n}.png", "question": f"{q}?", "answer": f"a{n}"} for q in "xy"]
        rows.append({"file_name": f"{n}.png", "text": f"picture {n}"})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return root


@pytest.mark.parametrize("task", ["folder-vqa", "folder-caption"])
@pytest.mark.parametrize("pictures", [True, False])
def test_dev_is_what_training_sets_aside(task: str, pictures: bool, one_part: Path) -> None:
    def seen(split: str) -> set[object]:
        return {e.images for e in tasks.get(task).examples(one_part, split, pictures=pictures)}

    for split in ("dev", "train-rest", "train"):
        assert seen(split) == {e.images for e in read_source(one_part, split).examples}
    assert seen("val") == seen("validation") == seen("dev")
    assert len(seen("dev")) == 3, "two pictures of nine, and the copy of one of them"
    assert not seen("dev") & seen("train-rest")
    assert seen("test") == seen("all") == seen("train") == seen("dev") | seen("train-rest")


def test_an_id_is_a_rows_own_however_the_folder_is_divided(one_part: Path) -> None:
    task = tasks.get("folder-vqa")
    whole = {e.meta["key"]: (e.images, e.turns) for e in task.examples(one_part)}
    assert list(whole)[:4] == ["0", "1", "3", "4"]
    for split in ("dev", "train-rest"):
        assert all(whole[e.meta["key"]] == (e.images, e.turns) for e in task.examples(one_part, split))


def test_a_report_says_what_was_read_and_the_prior_never_saw_it(one_part: Path) -> None:
    block = run(one_part)
    assert (block["split"], block["n"]) == ("all", 20)
    assert "has no training split" in block["controls"]["prior"]["reason"]
    block = run(one_part, "--split", "dev", "--restart")
    assert (block["split"], block["n"]) == ("dev", 6)
    assert block["controls"]["prior"]["metrics"]["exact_match"] == 0.0
    assert run(one_part, "--split", "train", "--restart")["split"] == "all"


def test_a_training_folder_alone_is_divided_too(one_part: Path, tmp_path: Path) -> None:
    root = tmp_path / "parts"
    root.mkdir()
    one_part.rename(root / "train")
    task = tasks.get("folder-vqa")
    dev = task.examples(root, "dev")
    assert {e.images for e in dev} == {e.images for e in read_source(root, "dev").examples}
    assert len(task.examples(root, "train")) == len(dev) + len(task.examples(root, "train-rest")) == 20
    with pytest.raises(DataError, match="no part called test; it has train"):
        task.examples(root)


@pytest.mark.parametrize(("split", "told"), [((), "all"), (("--split", "dev"), "dev")])
def test_answers_from_a_file_are_known_by_their_rows(
    split: tuple[str, ...], told: str, one_part: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    examples = tasks.get("folder-vqa").examples(one_part, split[-1] if split else None)
    answers = [{"question_id": e.meta["key"], "answer": e.answers[0]} for e in reversed(examples)]
    file = one_part / "said.json"
    file.write_text(json.dumps(answers), encoding="utf-8")
    argv = ["score", "folder-vqa", "--data", str(one_part), "--predictions", str(file), "--no-html", *split]
    assert main(argv) == 0
    assert capsys.readouterr().out.startswith(f"folder-vqa, {told}, {len(examples)} examples")
    report = json.loads((one_part / "said.report.json").read_text(encoding="utf-8"))
    assert (report["split"], report["metrics"]["exact_match"]) == (told, 100.0)


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        (
            "folder-vqa",
            {"text": "a dog"},
            "holds captions only, in split test: score them with folder-caption",
        ),
        ("folder-caption", {"question": "q", "answer": "a"}, "questions only, .* score them with folder-vqa"),
    ],
)
def test_rows_of_the_other_kind_are_said_to_be_so(
    task: str, row: dict[str, str], message: str, own: Path
) -> None:
    (own / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", **row}), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        tasks.get(task).examples(own)


def test_a_wrong_folder_is_never_another_set(tmp_path: Path) -> None:
    argv = ["score", "easy-vqa", "--data", str(tmp_path / "absent"), "--predictions", "none.json"]
    with pytest.raises(DataError, match="absent is missing; --data says where the data of easy-vqa lie"):
        main(argv)
