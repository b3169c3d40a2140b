"""Confidence, the threshold that is fitted to it, and answers that are not given."""

from __future__ import annotations

import csv
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm.answer import CANNOT_TELL, Answer, Usage, confidence
from vlm.cli import main
from vlm.errors import DataError
from vlm.eval import report
from vlm.eval.abstain import LEAST, fit

if TYPE_CHECKING:
    from vlm.model import VLM

BLOCK: dict[str, Any] = {
    "task": "folder-vqa", "split": "all", "main_metric": "m", "metrics": {"m": 50.0},
    "decoding": {"choices": None},
}  # fmt: skip


def items(pairs: list[tuple[float, float]]) -> list[dict[str, Any]]:
    return [{"confidence": sure, "scores": {"m": score}} for sure, score in pairs]


def test_confidence_is_the_probability_of_a_token() -> None:
    answer = Answer("yes", "stop", Usage(9, 2, 1), {}, math.log(0.9 * 0.4), "x")
    assert answer.confidence == pytest.approx(math.sqrt(0.36))
    assert confidence(0.0, 0) == 1.0
    assert confidence(1e-7, 3) == 1.0
    assert confidence(-50.0, 25) == pytest.approx(math.exp(-2))


def test_as_many_answers_as_are_right_enough() -> None:
    # 30 sure and right, 30 half sure and half right, 30 unsure and wrong.
    sure = [(0.9 + n / 1000, 100.0) for n in range(30)]
    half = [(0.5 + n / 1000, 100.0 * (n % 2)) for n in range(30)]
    unsure = [(0.1 + n / 1000, 0.0) for n in range(30)]
    rows = items([*unsure, *sure, *half])
    random.Random(0).shuffle(rows)
    all_right = fit(BLOCK, rows, 1.0)
    assert all_right.coverage == pytest.approx(31 / 90, abs=1e-6)  # the surest of the half sure is right, too
    assert 0.528 < all_right.threshold < 0.529
    some = fit(BLOCK, rows, 0.75)
    assert some.accuracy == 0.75
    assert some.coverage == pytest.approx(60 / 90, abs=1e-6)
    assert 0.129 < some.threshold < 0.5
    everything = fit(BLOCK, rows, 0.5)
    assert (everything.threshold, everything.coverage, everything.accuracy) == (0.0, 1.0, 0.5)
    assert (some.task, some.split, some.target) == ("folder-vqa", "all", 0.75)


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0.0, 30.0, 100.0])), min_size=LEAST, max_size=80),
    st.sampled_from([0.3, 0.5, 0.8]),
)
def test_a_threshold_keeps_its_promise_on_what_it_was_fitted_to(
    pairs: list[tuple[int, float]], target: float
) -> None:
    rows = items([(sure / 12, score) for sure, score in pairs])
    try:
        found = fit(BLOCK, rows, target)
    except DataError:
        for least in {sure for sure, _ in pairs}:
            kept = [score for sure, score in pairs if sure >= least]
            assert len(kept) < LEAST or np.mean(kept) < 100 * target
        return
    kept = [row["scores"]["m"] for row in rows if row["confidence"] >= found.threshold]
    assert len(kept) >= LEAST
    assert np.mean(kept) >= 100 * target - 1e-9
    assert found.coverage == pytest.approx(len(kept) / len(rows), abs=1e-6)


def test_items_without_a_score_count_for_nothing() -> None:
    rows = items([(0.5 + n / 100, 100.0) for n in range(LEAST)])
    rows += [{"confidence": 0.99, "scores": {"m": None}}] * 5
    assert fit(BLOCK, rows, 0.9).coverage == 1.0


@pytest.mark.parametrize(
    ("change", "rows", "word"),
    [
        ({}, items([(0.5, 0.0)] * 40), "the most is 0.0 %"),
        ({}, items([(0.5, 100.0)] * (LEAST - 1)), "too few"),
        ({"task": "folder-caption"}, items([(0.5, 100.0)] * 40), "captions"),
        ({"decoding": {"choices": "likelihood"}}, items([(0.5, 100.0)] * 40), "--choices generation"),
        ({}, [{"scores": {"m": 100.0}}] * 40, "evaluate again"),
    ],
)
def test_what_cannot_be_fitted(change: dict[str, Any], rows: list[dict[str, Any]], word: str) -> None:
    with pytest.raises(DataError, match=word):
        fit(BLOCK | change, rows, 0.8)


def test_the_page_and_the_fit_read_one_curve() -> None:
    sure = np.array([0.2, 0.9, 0.5, 0.7])
    scores = np.array([0.0, 100.0, 50.0, 0.0])
    ordered, running = report.risk_coverage(sure, scores)
    assert ordered.tolist() == [0.9, 0.7, 0.5, 0.2]
    assert running.tolist() == pytest.approx([100.0, 50.0, 50.0, 37.5])


# --- from a report to an answer that is not given --------------------------------------------------------


@pytest.fixture
def place(
    make_tiny: Callable[..., VLM], draw: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with a tiny adapter and a set of 24 questions, half of whose references are its answers."""
    from vlm.checkpoint import save_adapter
    from vlm.model import VLM

    monkeypatch.setenv("VLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_adapter(make_tiny("flamingo", gate_init=2.0), tmp_path / "adapter")
    model = VLM.from_pretrained(tmp_path / "adapter", offline=True)
    data = tmp_path / "data"
    data.mkdir()
    for n in range(24):
        draw(n).save(data / f"{n}.png")
    answers = [model.ask([data / f"{n}.png"], "What?", max_new_tokens=4) for n in range(24)]
    ranked = sorted(answers, key=lambda answer: -answer.confidence)
    right = {id(answer) for answer in ranked[:21]}
    with open(data / "metadata.csv", "w", newline="", encoding="utf-8") as file:
        rows = [[f"{n}.png", "What?", a.text if id(a) in right else "never"] for n, a in enumerate(answers)]
        csv.writer(file).writerows([["file_name", "question", "answer"], *rows])
    return tmp_path


def test_evaluate_calibrate_abstain(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, out = place / "adapter", place / "report.json"
    ask = ["ask", str(place / "data" / "0.png"), "What?", "--adapter", str(adapter), "--max-tokens", "4"]
    assert main([*ask, "--abstain"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    assert "vlm eval calibrate" in said
    evaluate = ["eval", "folder-vqa", "--data", str(place / "data"), "--adapter", str(adapter), "--no-html"]
    evaluate += ["--controls", "none", "--max-new-tokens", "4", "--beams", "1", "--out", str(out)]
    assert main(evaluate) == 0, capsys.readouterr().err
    rows = report.read_items(out)
    assert all(0 < row["confidence"] < 1 for row in rows)
    before = (adapter / "adapter.safetensors").read_bytes()
    plain = json.loads((adapter / "config.json").read_text())
    assert main(["eval", "calibrate", str(out), "--target", "0.95"]) == 0, capsys.readouterr().err
    fitted = json.loads((adapter / "config.json").read_text())
    abstain = fitted.pop("abstain")
    assert fitted == plain
    assert (adapter / "adapter.safetensors").read_bytes() == before
    assert (abstain["task"], abstain["split"], abstain["target"]) == ("folder-vqa", "all", 0.95)
    assert 20 / 24 <= abstain["coverage"] < 1.0
    assert "of new pictures" not in capsys.readouterr().out
    block = json.loads(out.read_text())
    told = {"pictures": 3, "of": 24, "command": "vlm train answers"}
    out.write_text(json.dumps(block | {"guide": told}))
    assert main(["eval", "calibrate", str(out), "--target", "0.95"]) == 0
    assert "of new pictures less will be right: 3 of 24 pictures are among" in capsys.readouterr().out
    assert main([*ask, "--abstain", "--json"]) == 0
    given = json.loads(capsys.readouterr().out)
    assert given["abstained"] == (given["confidence"] < abstain["threshold"])
    assert (given["answer"] == CANNOT_TELL) == given["abstained"]
    table = place / "answers.csv"
    assert main(["ask", str(place / "data"), *ask[2:], "--abstain", "--out", str(table)]) == 0
    with open(table, newline="", encoding="utf-8") as file:
        written = [row["answer"] for row in csv.DictReader(file)]
    assert written.count(CANNOT_TELL) == round(24 * (1 - abstain["coverage"]))


def test_a_report_of_another_adapter_is_refused(
    place: Path, make_tiny: Callable[..., VLM], capsys: pytest.CaptureFixture[str]
) -> None:
    from vlm.checkpoint import save_adapter

    out = place / "report.json"
    out.write_text(json.dumps(BLOCK | {"adapter": str(place / "adapter"), "hashes": {"adapter": "0" * 64}}))
    report.siblings(out, "items").write_text(
        "\n".join(json.dumps({"id": str(n), **row}) for n, row in enumerate(items([(0.5, 100.0)] * 40)))
    )
    assert main(["eval", "calibrate", str(out), "--target", "0.8"]) == 1
    assert "another adapter" in capsys.readouterr().err
    save_adapter(make_tiny(), place / "other")
    assert main(["eval", "calibrate", str(out), "--target", "0.8", "--adapter", str(place / "other")]) == 1
    assert "abstain" not in json.loads((place / "other" / "config.json").read_text())
    for wrong in ("0", "1.5", "most"):
        with pytest.raises(SystemExit) as ended:
            main(["eval", "calibrate", str(out), "--target", wrong])
        assert ended.value.code == 2


@pytest.mark.parametrize("value", [3, {"threshold": "low"}, {"threshold": 0.5}, {"nonsense": 1}])
def test_a_damaged_threshold_is_one_line(value: object, place: Path) -> None:
    from vlm.checkpoint import load_model
    from vlm.errors import WeightsError

    path = place / "adapter" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"abstain": value}))
    with pytest.raises(WeightsError, match="not usable") as refused:
        load_model(place / "adapter", offline=True)
    assert "\n" not in str(refused.value)
