"""Every task on its fixture: a dozen hand-made examples in the layout that people download."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from vlm.data.convert.common import make_example
from vlm.errors import DataError
from vlm.eval import tasks
from vlm.eval.main import main
from vlm.eval.predictions import export, read_predictions, write_submission
from vlm.eval.prompts import with_options
from vlm.eval.task import Task

HERE = Path(__file__).parent
FIXTURES = HERE / "fixtures"

# task, fixture folder, split, examples, chance in percent, score of the first reference, main metric
CASES = [
    ("vqav2", "vqav2", "dev", 12, None, 99.17, "accuracy_strict"),
    ("okvqa", "okvqa", "test", 12, None, 99.17, "accuracy_strict"),
    ("aokvqa", "aokvqa", "dev", 12, None, 100.0, "accuracy"),
    ("aokvqa-choice", "aokvqa", "dev", 12, 25.0, 100.0, "accuracy"),
    ("textvqa", "textvqa", "dev", 12, None, 100.0, "accuracy_strict"),
    ("vizwiz", "vizwiz", "dev", 12, None, 100.0, "accuracy_strict"),
    ("gqa", "gqa", "testdev", 12, 100 / 9, 100.0, "accuracy"),
    ("vqa-rad", "vqa-rad", "test", 12, 100 / 9, 100.0, "exact_match"),
    ("scienceqa-img", "scienceqa-img", "test", 12, 39.8611, 100.0, "accuracy"),
    ("pope", "pope", "random", 12, 50.0, 100.0, "accuracy"),
    ("pope", "pope", "popular", 12, 50.0, 100.0, "accuracy"),
    ("pope", "pope", "adversarial", 12, 50.0, 100.0, "accuracy"),
    ("nlvr", "nlvr", "dev", 24, 50.0, 100.0, "accuracy"),
    ("coco-captions", "coco-captions", "test", 11, None, None, "cider"),
    ("coco-captions", "coco-captions", "dev", 1, None, None, "cider"),
    ("flickr30k", "flickr30k", "test", 11, None, None, "cider"),
    ("nocaps", "nocaps", "dev", 12, None, None, "cider"),
    ("daquar", "daquar", "test", 12, 100 / 12, 100.0, "accuracy_single"),
    ("daquar-reduced", "daquar", "test", 12, 100 / 11, 100.0, "accuracy_single"),
    ("daquar-random", "daquar", "test", 12, 100 / 12, 100.0, "accuracy_single"),
    ("flickr8k", "flickr8k", "dev", 12, None, None, "cider"),
    ("flickr8k-pope", "flickr8k", "dev", 156, 50.0, 100.0, "accuracy"),
    ("flickr8k-yesno", "flickr8k", "dev", 48, 50.0, 100.0, "exact_match"),
    ("flickr8k-questions", "flickr8k", "dev", 99, 100 / 32, 100.0, "exact_match"),
    ("easy-vqa", "easy-vqa", "test", 12, 12.5, 100.0, "exact_match"),
    ("folder-vqa", "folder", "all", 3, None, 100.0, "exact_match"),
    ("folder-caption", "folder", "all", 2, None, None, "cider"),
]
NAMES = [f"{case[0]}-{case[2]}" for case in CASES]


def load(name: str, folder: str, split: str, **rest: bool) -> tuple[Task, list]:
    task = tasks.get(name)
    return task, task.examples(FIXTURES / folder, split, **rest)


@pytest.mark.parametrize(
    ("name", "folder", "split", "count", "chance", "first", "main_metric"), CASES, ids=NAMES
)
def test_reads_and_scores(
    name: str,
    folder: str,
    split: str,
    count: int,
    chance: float | None,
    first: float | None,
    main_metric: str,
) -> None:
    task, examples = load(name, folder, split)
    assert len(examples) == count
    assert all(Path(image).is_file() for example in examples for image in example.images)
    right = task.scores(examples, [example.answers[0] for example in examples], java=False)
    wrong = task.scores(examples, ["zzz"] * count, java=False)
    assert right.main == main_metric == task.main
    if first is not None:
        assert right.metrics[main_metric] == pytest.approx(first, abs=0.1)
    assert right.metrics[main_metric] > wrong.metrics[main_metric] or count == 1
    low, high = right.intervals[main_metric]
    assert low <= right.metrics[main_metric] <= high or right.metrics[main_metric] == pytest.approx(low)
    found = task.chance(examples)
    assert found == (pytest.approx(chance, abs=1e-3) if chance is not None else found)
    assert (chance is None) or found is not None


@pytest.mark.parametrize(("name", "folder", "split"), [case[:3] for case in CASES], ids=NAMES)
def test_without_pictures_the_words_are_the_same(name: str, folder: str, split: str, tmp_path: Path) -> None:
    _, with_pictures = load(name, folder, split)
    for path in (FIXTURES / folder).rglob("*"):
        if path.suffix in (".json", ".jsonl", ".csv", ".txt"):
            copy = tmp_path / path.relative_to(FIXTURES / folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    bare = tasks.get(name).examples(tmp_path, split, pictures=False)
    key = [(e.id, e.turns[-1].text, e.answers, e.meta.get("options")) for e in with_pictures]
    assert [(e.id, e.turns[-1].text, e.answers, e.meta.get("options")) for e in bare] == key


def test_prompts_have_not_drifted() -> None:
    """A changed prompt changes every score: change the snapshot on purpose or not at all."""
    found = {}
    for name, folder, split, *_ in CASES:
        task, examples = load(name, folder, split)
        texts = [example.turns[-1].text for example in examples[:2]]
        if task.choices:
            texts.append(with_options(examples[0]).turns[-1].text)
        found[f"{name} {split}"] = texts
    assert found == json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("name", "folder", "split"), [case[:3] for case in CASES], ids=NAMES)
def test_official_results_format_comes_back(name: str, folder: str, split: str, tmp_path: Path) -> None:
    task, examples = load(name, folder, split)
    answers = [f"{number} {example.answers[0]}" for number, example in enumerate(examples)]
    if name == "nlvr":  # its format has no other words than true and false
        answers = [example.answers[0] for example in examples]
    if name == "aokvqa-choice":  # said by letter, written down in words
        answers = ["ABCD"[json.loads(e.meta["options"]).index(e.answers[0])] for e in examples]
    exported = export(task, examples, answers)
    if isinstance(exported, list):
        exported.reverse()
    path = tmp_path / ("results.csv" if isinstance(exported, str) else "results.json")
    write_submission(path, exported)
    if name == "scienceqa-img":
        assert exported == {
            "results": {e.id: json.loads(e.meta["options"]).index(e.answers[0]) for e in examples}
        }
    elif name == "aokvqa-choice":
        assert read_predictions(path, task, examples) == [example.answers[0] for example in examples]
    elif name == "nlvr":
        words = {"yes": "true", "no": "false"}
        assert path.read_text(encoding="utf-8").startswith("dev-100-0-0.png,false\n")
        assert read_predictions(path, task, examples) == [words[answer] for answer in answers]
    else:
        assert read_predictions(path, task, examples) == answers


def test_score_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task, examples = load("vqav2", "vqav2", "dev")
    results = tmp_path / "results.json"
    results.write_text(json.dumps(export(task, examples, ["yes"] * 12)), encoding="utf-8")
    out = tmp_path / "report.json"
    data = str(FIXTURES / "vqav2")
    assert main(["score", "vqav2", "--data", data, "--predictions", str(results), "--out", str(out)]) == 0
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["metrics"]["accuracy_strict"] == pytest.approx(100 * (1.0 + 1.0) / 12)
    assert report["breakdown"]["answer_type=yes/no"]["n"] == 3
    assert "accuracy_strict" in capsys.readouterr().out
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    assert page.count("<h2>") >= 3
    assert 'src="http' not in page


def test_strict_and_normalised_differ_where_they_should() -> None:
    task, examples = load("vqav2", "vqav2", "dev")
    scores = task.scores(examples, ["the red" if "color" in e.turns[-1].text else "-" for e in examples])
    assert scores.metrics["accuracy_strict"] == 0.0  # unanimous references: "the red" stays as it is
    assert scores.metrics["accuracy_normalised"] == pytest.approx(100 / 12)


def broken(tmp_path: Path, folder: str, change: dict[str, str | None]) -> Path:
    """A copy of a fixture with files rewritten (or removed)."""
    copy = tmp_path / folder
    shutil.copytree(FIXTURES / folder, copy)
    for name, text in change.items():
        if text is None:
            (copy / name).unlink()
        else:
            (copy / name).write_text(text, encoding="utf-8")
    return copy


VQA_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
VQA_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"


def test_missing_picture_is_one_clear_error(tmp_path: Path) -> None:
    root = broken(tmp_path, "vqav2", {"val2014/COCO_val2014_000000000074.jpg": None})
    with pytest.raises(DataError, match=r"COCO_val2014_000000000074\.jpg is missing"):
        tasks.get("vqav2").examples(root)


def test_malformed_json_names_the_line(tmp_path: Path) -> None:
    root = broken(tmp_path, "vqav2", {VQA_QUESTIONS: '{"questions": [\n{"a": 1,}]}'})
    with pytest.raises(DataError, match=r"questions\.json is not JSON.*line 2"):
        tasks.get("vqav2").examples(root)


def test_duplicate_id(tmp_path: Path) -> None:
    rows = json.loads((FIXTURES / "vqav2" / VQA_QUESTIONS).read_text(encoding="utf-8"))
    rows["questions"].append(rows["questions"][0])
    root = broken(tmp_path, "vqav2", {VQA_QUESTIONS: json.dumps(rows)})
    with pytest.raises(DataError, match="42000 stands twice"):
        tasks.get("vqav2").examples(root)


def test_unknown_answer_type(tmp_path: Path) -> None:
    text = (FIXTURES / "vqav2" / VQA_ANNOTATIONS).read_text(encoding="utf-8")
    root = broken(tmp_path, "vqav2", {VQA_ANNOTATIONS: text.replace('"number"', '"poem"', 1)})
    with pytest.raises(DataError, match="unknown answer type 'poem'"):
        tasks.get("vqav2").examples(root)


@pytest.mark.parametrize(
    ("answer", "reference", "single", "every"),
    [
        ("tape_dispenser", "tape dispenser", 100.0, 100.0),
        ("Tape_Dispenser, tape dispenser.", "tape dispenser", 100.0, 100.0),
        ("chair, chair", "chair", 100.0, 100.0),
        ("cup, tape_dispenser", "tape dispenser, cup", None, 100.0),
        ("cup", "tape dispenser, cup", None, 0.0),
        ("cup, chair", "cup", 0.0, 0.0),
    ],
)
def test_daquar_compares_sets_of_words(
    answer: str, reference: str, single: float | None, every: float
) -> None:
    count = reference.count(",") + 1
    example = make_example("a.png", "what is it?", [reference], "1", {"answer_count": str(count)})
    found = tasks.get("daquar").scores([example], [answer])
    assert (found.metrics.get("accuracy_single"), found.metrics["accuracy_all"]) == (single, every)


def test_nocaps_bleu_of_a_domain_is_that_of_its_own_captions() -> None:
    task, examples = load("nocaps", "nocaps", "dev")
    answers = [example.answers[number % 2] for number, example in enumerate(examples)]
    answers[0], answers[1] = "a dog", f"{answers[1]} or so"
    scores = task.scores(examples, answers, java=False)
    domains = {str(example.meta["domain"]) for example in examples}
    assert len(domains) > 1 and {f"domain={name}" for name in domains} == set(scores.breakdown)
    for domain in domains:
        part = [(e, a) for e, a in zip(examples, answers, strict=True) if e.meta["domain"] == domain]
        alone = task.scores(*map(list, zip(*part, strict=True)), java=False)
        row = scores.breakdown[f"domain={domain}"]
        assert row["n"] == len(part)
        for name in ("bleu_4", "rouge_l"):
            assert row[name] == pytest.approx(alone.metrics[name])


def test_vqa_rads_test_questions_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    rows = json.loads((FIXTURES / "vqa-rad" / "VQA_RAD Dataset Public.json").read_text(encoding="utf-8"))
    (tmp_path / "trainset.json").write_text(json.dumps(rows[:5]), encoding="utf-8")
    (tmp_path / "testset.json").write_text(
        json.dumps([{**row, "phrase_type": "freeform"} for row in rows[5:]]), encoding="utf-8"
    )
    task = tasks.get("vqa-rad")
    assert [e.id for e in task.examples(tmp_path, "test", pictures=False)] == [
        str(r["qid"]) for r in rows[5:]
    ]
    (tmp_path / "trainset.json").write_text(
        json.dumps([{**row, "phrase_type": "para"} for row in rows[:5]]), encoding="utf-8"
    )
    assert [e.id for e in task.examples(tmp_path, "train", pictures=False)] == [
        str(r["qid"]) for r in rows[:5]
    ]


def test_nlvr_counts_drawings_and_whole_sentences() -> None:
    task, examples = load("nlvr", "nlvr", "dev")
    answers = ["True" if example.answers[0] == "yes" else "False." for example in examples]
    answers[3] = "perhaps"  # one drawing of the first of three sentences, which has two structures
    scores = task.scores(examples, answers)
    assert scores.metrics["accuracy"] == pytest.approx(100 * 23 / 24)
    assert scores.metrics["consistency"] == pytest.approx(100 * 2 / 3)
    assert task.unparsed is not None
    assert [task.unparsed(*pair) for pair in zip(answers, examples, strict=True)].count(True) == 1
    assert export(task, examples, answers).splitlines()[3] == "dev-100-0-3.png,"


def test_the_reduced_set_has_files_of_its_own(tmp_path: Path) -> None:
    name = "qa.37.raw.reduced.test.txt"
    root = broken(tmp_path, "daquar", {name: None})
    with pytest.raises(DataError, match="file of the reduced test part; looked for qa.37.raw.reduced.test"):
        tasks.get("daquar-reduced").examples(root)
    # The full set goes by its official name where both lie in one folder.
    (root / "qa.894.raw.test.txt").write_text("what is on the chair in the image6 ?\nbox\n", encoding="utf-8")
    assert [e.answers for e in tasks.get("daquar").examples(root, "test")] == [("box",)]
    (root / "reduced").mkdir()
    shutil.copy(FIXTURES / "daquar" / name, root / "reduced" / name)
    assert len(tasks.get("daquar-reduced").examples(root)) == 12
    (root / "images" / "image6.jpg").unlink()
    with pytest.raises(DataError, match="line 21: picture image6 is missing"):
        tasks.get("daquar-reduced").examples(root)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "12 of 12 examples have no answer"),
        ([{"question_id": 42000, "answer": "a"}] * 2, "42000 stands twice"),
        ([{"question_id": 5, "answer": "a"}], "the first is 5"),
        ([{"question_id": 42000}], "'question_id' and 'answer' are expected"),
        ([{"question_id": 42000, "answer": ["a"]}], "must be text"),
        ("words", "a list of answers or an object"),
    ],
)
def test_predictions_that_cannot_be_scored(rows: object, message: str, tmp_path: Path) -> None:
    task, examples = load("vqav2", "vqav2", "dev")
    path = tmp_path / "p.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_predictions(path, task, examples)


def test_csv_metadata_stays_text() -> None:
    _, examples = load("folder-vqa", "folder", "all")
    assert [example.answers[0] for example in examples] == ["007", "true", "N/A"]


def test_other_formats_of_answers(tmp_path: Path) -> None:
    task, examples = load("scienceqa-img", "scienceqa-img", "test")
    wrapped = tmp_path / "wrapped.json"
    wrapped.write_text(json.dumps({"results": {e.id: 1 for e in examples}}), encoding="utf-8")
    answers = read_predictions(wrapped, task, examples)
    assert task.scores(examples, answers).metrics["accuracy"] == pytest.approx(100 / 3)
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(["x"] * 12) + "\n", encoding="utf-8")
    assert read_predictions(lines, task, examples) == ["x"] * 12
    lines.write_text("x\n", encoding="utf-8")
    with pytest.raises(DataError, match="1 lines for 12 examples"):
        read_predictions(lines, task, examples)


def test_pope_results_without_ids_go_by_order(tmp_path: Path) -> None:
    task, examples = load("pope", "pope", "random")
    path = tmp_path / "answers.jsonl"
    rows = [{"question": e.turns[-1].text, "answer": "Yes, there is."} for e in examples]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    scores = task.scores(examples, read_predictions(path, task, examples))
    assert (scores.metrics["accuracy"], scores.metrics["yes_rate"]) == (50.0, 100.0)
    path.write_text(json.dumps(rows[:1]), encoding="utf-8")
    with pytest.raises(DataError, match="1 answers for 12 examples"):
        read_predictions(path, task, examples)


def test_list_shows_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    for name in tasks.TASKS:
        assert name in shown
        assert tasks.get(name).main in shown
    for chance in ("50", "100 / own choices", "100 / all answers"):
        assert f" {chance} " in shown
    assert "Tanti et al. 2018" in shown


def test_every_published_figure_says_where_it_stands() -> None:
    for name in tasks.TASKS:
        task = tasks.get(name)
        for figure in task.published:
            assert any(word in figure.source for word in ("arXiv:", "ACL ", "victorzhou", "computed")), figure
            splits = (" test", " val", " Test-P", "random", "adversarial")
            assert any(word in figure.source for word in splits), figure
            assert 0 < figure.value < 150
