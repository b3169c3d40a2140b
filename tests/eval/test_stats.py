"""Intervals and comparisons against what is known in closed form."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from vlm.errors import DataError
from vlm.eval import stats
from vlm.eval.compare import compare
from vlm.eval.main import main
from vlm.eval.metrics.captions import bleu, score_captions
from vlm.eval.predictions import export
from vlm.eval.tasks import get

FIXTURES = Path(__file__).parent / "fixtures"


def test_interval_is_the_normal_one_for_many_items() -> None:
    values = np.random.default_rng(0).normal(50, 10, 2000)
    low, high = stats.interval(values)
    width = 2 * 1.96 * values.std() / np.sqrt(2000)
    assert high - low == pytest.approx(width, rel=0.1)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.05)
    assert stats.interval(values) == (low, high)
    assert stats.interval(np.full(5, 3.0)) == (3.0, 3.0)


def test_intervals_cover_as_often_as_they_say() -> None:
    chance = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        low, high = stats.interval(chance.binomial(1, 0.3, 200).astype(float), resamples=300, seed=trial)
        hits += low <= 0.3 <= high
    assert 0.89 <= hits / 200 <= 0.99


def test_corpus_interval_of_a_mean_is_the_interval_of_the_mean() -> None:
    values = np.random.default_rng(2).normal(0, 1, (400, 1))
    counts = np.concatenate([values, np.ones_like(values)], axis=1)
    found = stats.corpus_interval(counts, lambda sums: sums[:, :1] / sums[:, 1:])
    assert found[0] == pytest.approx(stats.interval(values[:, 0]), abs=0.02)


def test_corpus_interval_of_bleu_holds_bleu() -> None:
    texts = [f"a {word} runs on the wide green field" for word in ("dog", "man", "cat", "cow", "boy") * 8]
    references = [
        [f"the {word} is running on a green field"] for word in ("dog", "man", "cat", "cow", "girl") * 8
    ]
    scores = score_captions(texts, references, java=False)
    ends = stats.corpus_interval(scores.bleu_counts, bleu)
    for n, (low, high) in enumerate(ends):
        assert low <= scores.metrics[f"bleu_{n + 1}"] <= high


def test_comparison_sees_a_difference_and_none() -> None:
    chance = np.random.default_rng(3)
    first = chance.normal(50, 10, 300)
    better = stats.compare(first, first + chance.normal(3, 5, 300))
    assert better.interval[0] > 1.5
    assert better.p_value < 0.01
    same = stats.compare(first, first + np.where(np.arange(300) % 2 == 0, 1.0, -1.0))
    assert same.difference == pytest.approx(0.0)
    assert same.p_value > 0.9
    assert len(same.better) == len(same.worse) == 150


def test_an_interval_of_groups_is_that_of_their_means() -> None:
    chance = np.random.default_rng(4)
    alike = chance.binomial(1, 0.6, 100) * 100.0
    drawn, groups = np.repeat(alike, 6), [str(n // 6) for n in range(600)]
    low, high = stats.interval(drawn, groups=groups)
    assert (low, high) == pytest.approx(stats.interval(alike))
    narrow = stats.interval(drawn)
    assert (high - low) / (narrow[1] - narrow[0]) == pytest.approx(6**0.5, rel=0.1)
    mixed = chance.permutation(600)
    assert stats.interval(drawn[mixed], groups=[groups[n] for n in mixed]) == pytest.approx(
        (low, high), abs=2
    )
    assert stats.interval(alike, groups=[str(n) for n in range(100)]) == pytest.approx(stats.interval(alike))


def test_a_comparison_of_groups_is_that_of_their_means() -> None:
    chance = np.random.default_rng(5)
    first, second = chance.normal(50, 10, 40), chance.normal(53, 10, 40)
    groups = [str(n // 6) for n in range(240)]
    whole = stats.compare(first, second)
    found = stats.compare(np.repeat(first, 6), np.repeat(second, 6), groups=groups)
    assert found.difference == pytest.approx(whole.difference)
    assert found.interval == pytest.approx(whole.interval)
    assert found.p_value == whole.p_value
    assert stats.compare(np.repeat(first, 6), np.repeat(second, 6)).p_value < found.p_value
    assert len(found.better) == 6 * len(whole.better), "items are counted one by one"


def test_drawings_of_one_sentence_are_resampled_together(tmp_path: Path) -> None:
    task, data = get("nlvr"), FIXTURES / "nlvr"
    examples = task.examples(data)
    paths = []
    for name, answers in (("a", ["yes"] * 24), ("b", ["no"] * 24)):
        results, out = tmp_path / f"{name}.csv", tmp_path / f"{name}.json"
        results.write_text(str(export(task, examples, answers)), encoding="utf-8")
        arguments = ["score", "nlvr", "--data", str(data), "--predictions", str(results), "--out", str(out)]
        assert main([*arguments, "--no-html"]) == 0
        paths.append(out)
    report = json.loads(paths[0].read_text(encoding="utf-8"))
    sentences = [str(example.meta["sentence"]) for example in examples]
    values = np.array([100.0 * (example.answers[0] == "yes") for example in examples])
    expected = stats.interval(values, groups=sentences)
    assert report["intervals"]["accuracy"] == pytest.approx(expected)
    assert expected != pytest.approx(stats.interval(values))
    difference = compare(*paths)["metrics"]["accuracy"]
    again = stats.compare(values, 100 - values, groups=sentences)
    assert difference["interval"] == pytest.approx(again.interval)
    assert difference["p_value"] == again.p_value


def scored(tmp_path: Path, name: str, answer: str, data: Path = FIXTURES / "vqav2") -> Path:
    task = get("vqav2")
    examples = task.examples(data)
    results = tmp_path / f"{name}.results.json"
    results.write_text(json.dumps(export(task, examples, [answer] * 12)), encoding="utf-8")
    out = tmp_path / f"{name}.json"
    arguments = ["score", "vqav2", "--data", str(data), "--predictions", str(results), "--out", str(out)]
    assert main([*arguments, "--no-html"]) == 0
    return out


def test_compare_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = scored(tmp_path, "a", "yes"), scored(tmp_path, "b", "no")
    found = compare(a, b)
    row = found["metrics"]["accuracy_strict"]
    assert row["difference"] == pytest.approx(row["b"] - row["a"])
    assert {flip["id"] for flip in found["flipped"]} == {"42000", "136004", "192008"}
    assert main(["compare", str(a), str(b)]) == 0
    assert "Is this a farm?" in capsys.readouterr().out


def test_differing_answers_that_were_near_ties_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = scored(tmp_path, "a", "yes"), scored(tmp_path, "b", "no")
    assert compare(a, b)["near_ties"] is None  # answers from a file carry no margins
    for path, margins in ((a, [2e-4, 0.5]), (b, [0.3, 0.5])):
        items = path.with_name(f"{path.stem}.items.jsonl")
        rows = [json.loads(line) for line in items.read_text(encoding="utf-8").splitlines()]
        for number, row in enumerate(rows):
            row["margin"] = margins[number % 2]
        rows[4]["answer"] = "yes"  # no difference, so no near tie either
        items.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = compare(a, b)
    assert (found["answers_differ"], found["near_ties"]) == (11, 5)
    assert main(["compare", str(a), str(b)]) == 0
    assert "11 answers differ, 5 of them near ties" in capsys.readouterr().out


def test_reports_of_other_data_are_not_compared(tmp_path: Path) -> None:
    a, b = scored(tmp_path, "a", "yes"), scored(tmp_path, "b", "no")
    changed = json.loads(b.read_text(encoding="utf-8"))
    changed["hashes"]["data"] = "0"
    b.write_text(json.dumps(changed), encoding="utf-8")
    with pytest.raises(DataError, match="different data"):
        compare(a, b)
