"""Places to write to are looked at before anything is asked or scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm.errors import ConfigError, DataError
from vlm.eval import outputs, report
from vlm.eval.main import main

FIXTURES = Path(__file__).parent / "fixtures"
DATA = ["--data", str(FIXTURES / "vqav2")]


def places(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x", encoding="utf-8")
    return {
        str(tmp_path / "folder"): "is a folder: name a file in it",
        str(tmp_path / "file" / "r.json"): "cannot be written: ",
        str(tmp_path / ("n" * 250 + ".json")): "cannot be written: ",
        "/proc/nowhere/r.json": "cannot be written: ",
    }


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("command", ["run", "submission", "score", "audit", "compare"])
def test_a_place_that_cannot_be_written(command: str, number: int, tmp_path: Path) -> None:
    out, message = list(places(tmp_path).items())[number]
    arguments = {
        "run": ["vqav2", *DATA, "--out", out],
        "submission": ["vqav2", *DATA, "--out", str(tmp_path / "r.json"), "--submission", out],
        "score": ["score", "vqav2", *DATA, "--predictions", "none.json", "--out", out],
        "audit": ["audit", "vqav2", *DATA, "--predictions", "none.json", "--out", out],
        "compare": ["compare", "a.json", "b.json", "--out", out],
    }[command]
    with pytest.raises(ConfigError, match=message):
        main(arguments)


@pytest.mark.parametrize("command", [["vqav2"], ["score", "vqav2", "--predictions", "none.json"]])
def test_the_page_does_not_replace_the_report(command: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"replaced by the page.*give .*r\.json"):
        main([*command, *DATA, "--out", str(tmp_path / "r.html")])


@pytest.mark.parametrize(
    "name", ["r.json", "r.html", "r.items.jsonl", "r.answers.jsonl", "r.answers.blank.jsonl"]
)
def test_a_submission_does_not_replace_what_the_run_itself_writes(name: str, tmp_path: Path) -> None:
    words = ["vqav2", *DATA, "--out", str(tmp_path / "r.json"), "--submission", str(tmp_path / name)]
    with pytest.raises(ConfigError, match=r"--submission .* would replace a file that is read or written"):
        main(words)


@pytest.mark.parametrize("name", ["absent", "file"])
def test_training_pictures_are_looked_for_before_the_run(name: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    words = ["vqav2", *DATA, "--out", str(tmp_path / "r.json"), "--train-data", str(tmp_path / name)]
    with pytest.raises(ConfigError, match=f"--train-data .*{name} is no folder"):
        main(words)


@pytest.mark.parametrize(("read", "out"), [("p.json", "p.json"), ("r.items.jsonl", "r.json")])
def test_what_is_read_is_not_replaced(read: str, out: str, tmp_path: Path) -> None:
    predictions = tmp_path / read
    predictions.write_text("[]", encoding="utf-8")
    with pytest.raises(ConfigError, match="would replace a file that is read"):
        main(["score", "vqav2", *DATA, "--predictions", str(predictions), "--out", str(tmp_path / out)])
    assert predictions.read_text(encoding="utf-8") == "[]"


def test_the_check_leaves_nothing_but_the_folder(tmp_path: Path) -> None:
    outputs.check(tmp_path / "new" / "r.json", page=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]


def test_a_disk_that_fails_afterwards_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    for write in (report.write_json, report.write_items):
        with pytest.raises(DataError, match=r"r\.json cannot be written: "):
            write(tmp_path / "file" / "r.json", [json.loads("{}")])  # type: ignore[operator]


@pytest.mark.parametrize(
    ("flag", "value"), [("--limit", "0"), ("--limit", "²"), ("--shots", "²"), ("--beams", "x")]
)
def test_a_number_that_is_none(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["vqav2", *DATA, flag, value])
    assert f"{flag}: '{value}' is not a whole number of at least" in capsys.readouterr().err
