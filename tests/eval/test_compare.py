"""Two reports side by side: corpus scores, scores that one lacks, damaged reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlm.conversation import Conversation
from vlm.data.convert.common import make_example
from vlm.errors import DataError
from vlm.eval import report, stats
from vlm.eval.compare import compare
from vlm.eval.main import main
from vlm.eval.metrics.answers import POPE, pope_counts, pope_scores
from vlm.eval.metrics.captions import bleu, score_captions
from vlm.eval.task import Task
from vlm.eval.tasks import get

FIXTURES = Path(__file__).parent / "fixtures"
WORDS = ("dog", "man", "cat", "cow", "boy")


def write(out: Path, task: Task, examples: list[Any], answers: list[str], **more: Any) -> Path:
    scores = task.scores(examples, answers, **({"java": False} if task.captions else {}))
    block = {"task": task.name, "split": "all", "main_metric": scores.main, "hashes": {}} | more
    report.write_json(out, block | report.scores_block(scores))
    report.write_items(report.siblings(out, "items"), report.items(examples, answers, scores))
    return out


def captioned(out: Path, words: tuple[str, ...], **more: Any) -> Path:
    examples = [
        make_example(
            f"{n}.jpg", "Describe.", [f"the {word} is running on a green field", f"one {word}"], str(n)
        )
        for n, word in enumerate(WORDS * 4)
    ]
    answers = [f"a {word} runs on the wide green field" for word in words * 4]
    return write(out, get("folder-caption"), examples, answers, **more)


def yes_no(out: Path, answers: list[str]) -> Path:
    examples = [make_example("x.jpg", f"q{n}?", ["yes" if n % 3 else "no"], str(n)) for n in range(30)]
    return write(out, get("pope"), examples, answers)


def test_bleu_is_the_corpus_figure_of_the_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = captioned(tmp_path / "a.json", ("dog", "bus", "cat", "bus", "boy"))
    b = captioned(tmp_path / "b.json", WORDS)
    found = compare(a, b)
    figures = [report.read_report(path)["metrics"] for path in (a, b)]
    for name in ("bleu_1", "bleu_4"):
        row = found["metrics"][name]
        assert [row["a"], row["b"]] == [each[name] for each in figures]
        assert row["difference"] == pytest.approx(row["b"] - row["a"])
        assert row["interval"][0] <= row["difference"] <= row["interval"][1]
        assert "better" not in row
    assert found["metrics"]["bleu_1"]["interval"][0] > 0
    assert found["metrics"]["bleu_1"]["p_value"] < 0.05
    assert found["metrics"]["rouge_l"]["better"] == 8
    assert list(found["metrics"]) == list(figures[0])
    assert main(["compare", str(a), str(b)]) == 0
    assert "nan" not in capsys.readouterr().out


def test_pope_has_intervals_and_all_its_scores_are_compared(tmp_path: Path) -> None:
    answers = [["yes"] * 30, ["yes" if n % 3 else "no" for n in range(30)]]
    a, b = (yes_no(tmp_path / f"{n}.json", said) for n, said in enumerate(answers))
    block = report.read_report(a)
    assert set(block["intervals"]) == set(block["metrics"]) == set(POPE)
    low, high = block["intervals"]["precision"]
    assert low < block["metrics"]["precision"] < high
    assert block["intervals"]["recall"] == [100.0, 100.0]
    found = compare(a, b)["metrics"]
    assert set(found) == set(POPE)
    assert found["f1"]["difference"] == pytest.approx(100 - block["metrics"]["f1"])
    assert found["yes_rate"]["interval"][1] < 0
    assert (found["accuracy"]["better"], found["unparsed"]["difference"]) == (10, 0.0)


def test_the_interval_of_pope_accuracy_is_that_of_the_mean() -> None:
    chance = np.random.default_rng(4)
    said, true = (chance.choice(["yes", "no"], 200).tolist() for _ in range(2))
    ends = stats.corpus_interval(pope_counts(said, true), pope_scores)[0]
    right = np.array([100.0 * (one == other) for one, other in zip(said, true, strict=True)])
    assert tuple(ends) == pytest.approx(stats.interval(right))


def test_corpus_comparison_of_a_mean_is_the_comparison_of_the_mean() -> None:
    chance = np.random.default_rng(5)
    first = chance.normal(50, 10, 200)
    second = first + chance.normal(1, 8, 200)
    whole = stats.compare(first, second)
    rows = [np.stack([each, np.ones(200)], axis=1) for each in (first, second)]
    (found,) = stats.compare_corpus(*rows, lambda sums: sums[:, :1] / sums[:, 1:])
    assert found.difference == pytest.approx(whole.difference)
    assert found.interval == pytest.approx(whole.interval, abs=0.15)
    assert found.p_value == pytest.approx(whole.p_value, abs=0.05)


def test_corpus_comparison_of_equal_runs_sees_nothing() -> None:
    texts = [f"a {word} runs on the wide green field" for word in WORDS]
    counts = score_captions(texts, [["the dog is running on a green field"]] * 5, java=False).bleu_counts
    for row in stats.compare_corpus(counts, counts, bleu):
        assert (row.difference, row.interval, row.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_what_cannot_be_compared_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, outs = get("daquar"), []
    examples = [make_example("x.jpg", f"q{n}?", ["a, b"], str(n), {"answer_count": 2}) for n in range(9)]
    for name in ("a", "b"):
        outs.append(write(tmp_path / f"{name}.json", task, examples, [name] * 9, main_metric="accuracy_all"))
    block = report.read_report(outs[0])
    report.write_json(outs[0], block | {"metrics": block["metrics"] | {"meteor": 1.0, "spice": 2.0}})
    block = report.read_report(outs[1])
    report.write_json(outs[1], block | {"metrics": block["metrics"] | {"meteor": 1.0}})
    found = compare(*outs)
    assert found["left_out"] == {
        "meteor": "a figure of the whole set alone",
        "spice": "B has no such score",
        "accuracy_single": "no item counts for it",
    }
    assert "accuracy_all" in found["metrics"]
    assert main(["compare", *map(str, outs)]) == 0
    shown = capsys.readouterr().out
    assert "no item counts for it" in shown
    assert "nan" not in shown


def test_other_pictures_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = [captioned(tmp_path / f"{n}.json", WORDS, hashes={"pictures": str(n)}) for n in range(2)]
    bare = captioned(tmp_path / "bare.json", WORDS)
    assert not compare(*seen)["same_pictures"]
    assert compare(seen[0], bare)["same_pictures"]
    assert main(["compare", *map(str, seen)]) == 0
    assert "the pictures differ" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"task": "pope", "metrics": {}}, "no report of vlm eval: it has no 'split'"),
        ({"task": "pope", "split": "all", "metrics": [], "hashes": {}}, "it has no 'main_metric'"),
        (
            {"task": "pope", "split": "all", "main_metric": "f1", "metrics": {}, "hashes": {}},
            "it has no score of 'f1'",
        ),
        ([], "no report of vlm eval"),
    ],
)
def test_what_is_no_report_is_refused(block: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(block), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        compare(path, path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "1", ', r"items\.jsonl, line 2 is not JSON"),
        ("[1]", r"items\.jsonl, line 2 is no item of a report"),
        ('{"id": "1", "scores": {}}', r"line 2: the item 1 has no 'question'"),
    ],
)
def test_damaged_items_are_refused(line: str, message: str, tmp_path: Path) -> None:
    path = yes_no(tmp_path / "r.json", ["yes"] * 30)
    items = report.siblings(path, "items")
    lines = items.read_text(encoding="utf-8").splitlines()
    lines[1] = line
    items.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        compare(path, path)
    items.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="holds no items"):
        compare(path, path)


def test_an_answer_may_hold_a_line_separator(tmp_path: Path) -> None:
    path = yes_no(tmp_path / "r.json", ["yes\u2028no\x85"] * 30)
    assert compare(path, path)["n"] == 30


def test_the_pictures_hash_is_of_contents(tmp_path: Path) -> None:
    names = [tmp_path / "a.png", tmp_path / "b.png"]
    for name in names:
        name.write_bytes(b"one")
    both = [report.picture_hash([Conversation.ask([name], "q")]) for name in names]
    assert both[0] == both[1] == report.picture_hash([Conversation.ask([b"one"], "q")])
    assert report.picture_hash([Conversation.ask([b"two"], "q")]) != both[0]
    names[0].unlink()
    with pytest.raises(DataError, match=r"a\.png cannot be read"):
        report.picture_hash([Conversation.ask([names[0]], "q")])
