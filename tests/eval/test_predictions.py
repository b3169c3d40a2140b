"""Files of answers: every form that is taken, and one clear error for every other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlm.errors import DataError
from vlm.eval import tasks
from vlm.eval.main import main
from vlm.eval.predictions import AnswerFile, Prediction, export, read_predictions
from vlm.eval.report import read_items

FIXTURES = Path(__file__).parent / "fixtures"
IDS = [e.id for e in tasks.get("vqav2").examples(FIXTURES / "vqav2", pictures=False)]
ROWS = [{"question_id": int(id), "answer": "yes"} for id in IDS]


def score(text: str, name: str, tmp_path: Path, task: str = "vqav2", root: Path | None = None) -> list[str]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    chosen = tasks.get(task)
    return read_predictions(path, chosen, chosen.examples(root or FIXTURES / task, pictures=False))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("wrapped.json", json.dumps({"results": ROWS})),
        ("wrapped.json", json.dumps({"results": dict.fromkeys(IDS, "yes")})),
        ("plain.json", json.dumps(dict.fromkeys(IDS, "yes"))),
        ("lines.json", "\n".join(map(json.dumps, ROWS))),
        ("lines.jsonl", "\r\n".join(map(json.dumps, ROWS)) + "\n"),
        ("listed.jsonl", json.dumps(ROWS)),
        ("headed.csv", "question_id,answer\n" + "".join(f"{id},yes\n" for id in IDS)),
        ("bare.csv", "".join(f"{id},yes\n" for id in IDS)),
        ("bare.csv", "".join(f'"{id}","yes"\n' for id in IDS)),
        ("headed.tsv", "question_id\tanswer\r\n" + "".join(f"{id}\tyes\r\n" for id in IDS)),
        ("bare.tsv", "".join(f"{id}\tyes\n" for id in IDS)),
        ("UPPER.TSV", "question_id\tanswer\n" + "".join(f"{id}\tyes\n" for id in IDS)),
        ("UPPER.JSON", json.dumps(ROWS, indent=1)),
        ("lines.txt", "yes\n" * 12),
    ],
)
def test_every_form(name: str, text: str, tmp_path: Path) -> None:
    assert score(text, name, tmp_path) == ["yes"] * 12


def test_commas_in_a_tsv_are_the_answers_own(tmp_path: Path) -> None:
    for head in ("", "question_id\tanswer\n"):
        said = score(head + "".join(f"{id}\tred, blue\n" for id in IDS), "p.tsv", tmp_path)
        assert said == ["red, blue"] * 12


@pytest.mark.parametrize("mark", ["\u2028", "\x85", "\x0c"])
@pytest.mark.parametrize("name", ["lines.jsonl", "lines.txt"])
def test_only_a_line_feed_ends_a_line(mark: str, name: str, tmp_path: Path) -> None:
    said = f"a{mark}b"
    lines = [json.dumps(row | {"answer": said}, ensure_ascii=False) for row in ROWS]
    text = "\n".join(lines if name.endswith("jsonl") else [said] * 12)
    assert score(text, name, tmp_path) == [said] * 12


def test_a_run_whose_answers_hold_line_marks_goes_on(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "a.jsonl", {"task": "x"})
    file.load()
    said = [Prediction(str(n), f"a{mark}b", -1.0, 2, "stop") for n, mark in enumerate("\u2028\u2029\x85\x1e")]
    file.append(said)
    assert list(file.load().values()) == said


@pytest.mark.parametrize(
    "text", ['{"question_id": 1}', '{"run": 5}', '{"run": {}}\n{"id": "1", "said": "yes"}']
)
def test_a_file_that_no_run_wrote_is_not_continued(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="is no file of a run's answers; --restart"):
        AnswerFile(tmp_path / "a.jsonl", {}).load()


def test_items_that_hold_line_marks_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps([row | {"answer": "a\u2028b"} for row in ROWS]), encoding="utf-8")
    out = tmp_path / "r.json"
    data = str(FIXTURES / "vqav2")
    assert main(["score", "vqav2", "--data", data, "--predictions", str(path), "--out", str(out)]) == 0
    assert [row["answer"] for row in read_items(out)] == ["a\u2028b"] * 12
    assert out.with_suffix(".html").is_file()


def with_last(answer: str) -> str:
    rows = [json.dumps(row) for row in ROWS]
    return f"[{', '.join(rows[:-1])}, " + f'{{"question_id": {IDS[-1]}, "answer": {answer}}}]'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", with_last('"\\ud800x"'), "half a character"),
        ("p.json", with_last("NaN"), "must be text, got 'nan'"),
        ("p.json", with_last("Infinity"), "must be text, got 'inf'"),
        ("p.json", with_last("true"), "must be text, got 'True'"),
        ("p.json", with_last('{"answer": false}'), "must be text, got 'False'"),
        ("p.json", with_last("null"), "'question_id' and 'answer' are expected"),
        ("p.json", with_last('"a", "answer": "b"'), "the key 'answer' stands twice"),
        ("p.json", f'{{"{IDS[0]}": "a", "{IDS[0]}": "b"}}', f"the key '{IDS[0]}' stands twice"),
        ("p.json", json.dumps({"main_metric": "x"}), r"is a report of vlm eval.*give .*p\.answers\.jsonl"),
        ("p.json", json.dumps({"results": 5}), "1 ids are not in vqav2, the first is results"),
        ("p.json", "[" * 100_000, "nested too deeply"),
        ("p.jsonl", "\n".join([json.dumps(ROWS[0]), "[" * 100_000]), "line 2.*nested too deeply"),
        ("p.jsonl", "\n".join([json.dumps(ROWS[0]), "[1]"]), "each line must hold an object"),
        ("p.jsonl", "{oops\n{oops", "line 1 is not JSON"),
        ("p.csv", "question_id;answer\n1;yes\n", "1 ids are not in vqav2, the first is 1"),
        ("p.csv", f"question_id,answer\n{IDS[0]}\n", "p.csv:2: wrong number of cells"),
        ("p.csv", f"{IDS[0]},yes\n{IDS[1]}\n", "p.csv:2: wrong number of cells"),
        ("p.txt", "", "0 lines for 12"),
    ],
)
def test_answers_that_cannot_be_scored(name: str, text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=message) as caught:
        score(text, name, tmp_path)
    assert name in str(caught.value)


def test_the_leaderboards_file_of_aokvqa_has_both_answers(tmp_path: Path) -> None:
    task = tasks.get("aokvqa-choice")
    examples = task.examples(FIXTURES / "aokvqa", pictures=False)
    both = {e.id: {"direct_answer": "zzz", "multiple_choice": e.answers[0]} for e in examples}
    text = json.dumps(both)
    answers = score(text, "p.json", tmp_path, "aokvqa-choice", FIXTURES / "aokvqa")
    assert task.scores(examples, answers).metrics["accuracy"] == 100.0
    assert score(text, "p.json", tmp_path, "aokvqa") == ["zzz"] * 12


def rewritten(tmp_path: Path, task: str, file: str, rows: Any) -> Path:
    root = tmp_path / "set"
    shutil.copytree(FIXTURES / task, root, ignore=shutil.ignore_patterns("*.jpg", "*.png"))
    (root / file).write_text(json.dumps(rows), encoding="utf-8")
    return root


def test_aokvqa_leaves_difficult_direct_answers_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = "aokvqa_v1p0_val.json"
    rows = json.loads((FIXTURES / "aokvqa" / file).read_text(encoding="utf-8"))
    rows[0]["difficult_direct_answer"] = True
    root = rewritten(tmp_path, "aokvqa", file, rows)
    text = json.dumps({row["question_id"]: {"direct_answer": "x", "multiple_choice": "y"} for row in rows})
    assert len(score(text, "p.json", tmp_path, "aokvqa", root)) == 11
    assert "1 answers to other questions than the 11 that aokvqa scores" in capsys.readouterr().err
    assert len(score(text, "p.json", tmp_path, "aokvqa-choice", root)) == 12


def test_scienceqa_results_hold_every_problem_by_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tasks.get("scienceqa-img")
    problems = json.loads((FIXTURES / "scienceqa-img" / "problems.json").read_text(encoding="utf-8"))
    asked = [id for id, row in problems.items() if row["split"] == "test" and row["image"]]
    # Choices that are numbers themselves: a result is always the place of one.
    problems[asked[0]] |= {"choices": ["1", "2", "0"], "answer": 1}
    problems[asked[1]] |= {"choices": ["-1", "1"], "answer": 0}
    root = rewritten(tmp_path, "scienceqa-img", "problems.json", problems)
    examples = task.examples(root, pictures=False)
    right = {id: row["answer"] for id, row in problems.items()}
    assert len(right) > len(examples)
    answers = score(json.dumps({"results": right}), "p.json", tmp_path, task.name, root)
    assert task.scores(examples, answers).metrics["accuracy"] == 100.0
    assert f"{len(right) - len(examples)} answers to other questions" in capsys.readouterr().err
    assert export(task, examples, answers) == {"results": {e.id: right[e.id] for e in examples}}
    assert score(json.dumps(right), "p.json", tmp_path, task.name, root) == answers, (
        "nor need they be wrapped"
    )
    unread = score(json.dumps({"results": dict.fromkeys(right, -1)}), "p.json", tmp_path, task.name, root)
    assert task.scores(examples, unread).metrics["accuracy"] == 0.0
    assert task.unparsed is not None and all(map(task.unparsed, unread, examples))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", '{"1": "2", "2": "2."}'),
        ("p.json", '[{"question_id": "1", "answer": "2"}, {"question_id": "2", "answer": "2."}]'),
        ("p.jsonl", '{"question_id": "1", "text": "2"}\n{"question_id": "2", "text": "2."}\n'),
        ("p.csv", "question_id,answer\n1,2\n2,2.\n"),
        ("p.txt", "2\n2.\n"),
    ],
)
def test_a_digit_that_was_said_is_a_word_and_no_place(name: str, text: str, tmp_path: Path) -> None:
    row = {"question": "How many?", "choices": ["one", "two", "three", "four"], "answer": 1, "hint": ""}
    row |= {"image": "image.png", "subject": "x", "split": "test"}
    root = rewritten(tmp_path, "scienceqa-img", "problems.json", {"1": row, "2": row})
    task = tasks.get("scienceqa-img")
    examples = task.examples(root, pictures=False)
    said = score(text, name, tmp_path, task.name, root)
    assert task.scores(examples, said).metrics["accuracy"] == 100.0
    assert export(task, examples, said) == {"results": {"1": 1, "2": 1}}
    assert task.scores(examples, ["5", "0"]).metrics["accuracy"] == 0.0


def test_gqa_results_may_go_beyond_the_balanced_questions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = tasks.get("gqa")
    examples = task.examples(FIXTURES / "gqa", pictures=False)
    rows = export(task, examples, ["yes"] * 12)
    more = [*rows, {"questionId": "999", "prediction": "no"}]
    assert score(json.dumps(more), "p.json", tmp_path, "gqa") == ["yes"] * 12
    assert "1 answers to other questions than the 12 that gqa scores" in capsys.readouterr().err
    with pytest.raises(DataError, match="1 of 12 examples have no answer"):
        score(json.dumps(more[1:]), "p.json", tmp_path, "gqa")
