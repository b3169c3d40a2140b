"""Splits whose answers only the benchmark's server has: they are answered and written down, not scored."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hubrows
import pytest
from parrot import Parrot

from vlm.errors import DataError
from vlm.eval import session, tasks
from vlm.eval.main import main
from vlm.eval.task import UNPUBLISHED

if TYPE_CHECKING:
    from PIL import Image

FIXTURES = Path(__file__).parent / "fixtures"
KEPT = {
    "answers",
    "answer",
    "answer_type",
    "answerable",
    "direct_answers",
    "correct_choice_idx",
    "rationales",
}
KEPT |= {"types", "sentences", "fullAnswer"}
Change = Callable[[Any], Any]


def asked(row: dict[str, Any]) -> dict[str, Any]:
    """A row of an official test file: what it asks, without what would answer it."""
    return {key: value for key, value in row.items() if key not in KEPT}


def rows(found: Any) -> Any:
    return [asked(row) for row in found]


def table(name: str) -> Change:
    return lambda found: {name: rows(found[name])}


def by_id(found: Any) -> Any:
    return {id: asked(row) for id, row in found.items()}


def pictures(found: Any) -> Any:
    """COCO's list of a part's pictures, out of Karpathy's file or NoCaps' own."""
    return {
        "images": [
            {"id": row.get("cocoid", row.get("id")), "file_name": row.get("filename", row.get("file_name"))}
            for row in found["images"]
        ]
    }


VQA = "v2_OpenEnded_mscoco_{}_questions.json"
GQA = "{}_questions.json"
# task, split; the fixture's file, the official test file, what makes the one out of the other; where the
# fixture's pictures lie and where the official ones do (a name's start); an entry of the submission
CASES: list[tuple[str, str, str, str, Change, tuple[str, str], Any]] = [
    (
        "vqav2",
        "test",
        VQA.format("val2014"),
        VQA.format("test2015"),
        table("questions"),
        ("val2014/COCO_val2014_", "test2015/COCO_test2015_"),
        {"question_id", "answer"},
    ),
    (
        "vqav2",
        "testdev",
        VQA.format("val2014"),
        f"Questions/{VQA.format('test-dev2015')}",
        table("questions"),
        ("val2014/COCO_val2014_", "Images/mscoco/test2015/COCO_test2015_"),
        {"question_id", "answer"},
    ),
    (
        "aokvqa",
        "test",
        "aokvqa_v1p0_val.json",
        "aokvqa_v1p0_test.json",
        rows,
        ("val2017/", "test2017/"),
        {"direct_answer"},
    ),
    (
        "aokvqa-choice",
        "test",
        "aokvqa_v1p0_val.json",
        "aokvqa_v1p0_test.json",
        rows,
        ("val2017/", "test2017/"),
        {"multiple_choice"},
    ),
    (
        "textvqa",
        "test",
        "TextVQA_0.5.1_val.json",
        "TextVQA_0.5.1_test.json",
        table("data"),
        ("train_images/", "test_images/"),
        {"question_id", "answer"},
    ),
    ("vizwiz", "test", "val.json", "Annotations/test.json", rows, ("val/", "test/"), {"image", "answer"}),
    *(
        (
            "gqa",
            split,
            GQA.format("testdev_balanced"),
            f"questions1.2/{GQA.format(part)}",
            by_id,
            ("images/", "images/"),
            {"questionId", "prediction"},
        )
        for split, part in (
            ("test", "test_balanced"),
            ("challenge", "challenge_balanced"),
            ("submission", "submission_all"),
        )
    ),
    (
        "nocaps",
        "test",
        "nocaps_val_4500_captions.json",
        "annotations/nocaps_test_image_info.json",
        pictures,
        ("val/", "test/"),
        {"image_id", "caption"},
    ),
    (
        "coco-captions",
        "test2014",
        "dataset_coco.json",
        "annotations/image_info_test2014.json",
        pictures,
        ("val2014/", "test2014/"),
        {"image_id", "caption"},
    ),
]
IDS = [f"{case[0]}-{case[1]}" for case in CASES]
FOLDERS = {"aokvqa-choice": "aokvqa"}


def official(root: Path, case: tuple[Any, ...]) -> Path:
    """The test part of a benchmark as people download it: its questions and pictures, nothing else."""
    name, _, source, target, change, (before, after), _ = case
    fixture = FIXTURES / FOLDERS.get(name, name)
    found = change(json.loads((fixture / source).read_text(encoding="utf-8")))
    (root / target).parent.mkdir(parents=True, exist_ok=True)
    (root / target).write_text(json.dumps(found), encoding="utf-8")
    for path in fixture.rglob("*.jpg"):
        place = root / path.relative_to(fixture).as_posix().replace(before, after, 1)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return root


@pytest.fixture
def parrot(monkeypatch: pytest.MonkeyPatch) -> Parrot:
    """The model that `vlm eval` loads."""
    model = Parrot()
    monkeypatch.setattr(session, "apply_common", lambda args: None)
    monkeypatch.setattr(session, "_model", lambda args: model)
    return model


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_every_official_test_part_becomes_a_submission(
    case: tuple[Any, ...], tmp_path: Path, parrot: Parrot, capsys: pytest.CaptureFixture[str]
) -> None:
    name, split, *_, entry = case
    root, out = official(tmp_path / "set", case), tmp_path / "r.json"
    assert main([name, "--data", str(root), "--split", split, "--out", str(out)]) == 0
    task = tasks.get(name)
    examples = task.examples(root, split)
    assert len(examples) >= 11 and not any(example.answers for example in examples)
    block = json.loads(out.read_text(encoding="utf-8"))
    assert (block["split"], block["n"]) == (task.canonical(split), len(examples))
    assert (block["metrics"], block["reason"], block["main_metric"]) == (None, UNPUBLISHED, task.main)
    assert {row["metrics"] for row in block["controls"].values()} == {None}
    assert {row["reason"] for row in block["controls"].values()} == {UNPUBLISHED}
    assert (block["text_only"], block["calibration"]) == (None, None)
    submission = json.loads((tmp_path / "r.submission.json").read_text(encoding="utf-8"))
    entries = submission.values() if isinstance(submission, dict) else submission
    assert len(submission) == len(examples) and all(set(each) == entry for each in entries)
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    assert html.escape(UNPUBLISHED) in page and "data:image/jpeg" in page and "Without looking" not in page
    said = capsys.readouterr().out
    assert said.count(UNPUBLISHED) == 1 and f"submission: {tmp_path / 'r.submission.json'}" in said


def test_only_the_run_itself_asks_the_model(
    tmp_path: Path, parrot: Parrot, capsys: pytest.CaptureFixture[str]
) -> None:
    root = official(tmp_path / "set", CASES[0])
    words = ["vqav2", "--data", str(root), "--split", "test", "--out", str(tmp_path / "r.json")]
    assert main([*words, "--submission", str(tmp_path / "mine.json"), "--limit", "3"]) == 0
    assert len(parrot.asked) == 3
    assert "(limited to 3: not all that the server wants)" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "mine.json").read_text(encoding="utf-8"))) == 3
    assert not (tmp_path / "r.submission.json").exists()


@pytest.mark.parametrize("command", ["score", "audit"])
def test_answers_to_it_cannot_be_scored(command: str, tmp_path: Path) -> None:
    root = official(tmp_path / "set", CASES[0])
    words = [command, "vqav2", "--data", str(root), "--split", "test2015", "--predictions", "p.json"]
    with pytest.raises(
        DataError, match=r"^vqav2, split test2015, cannot be scored: the answers .* published"
    ):
        main(words)


@pytest.mark.parametrize("command", ["compare", "audit", "calibrate"])
def test_its_report_says_why_it_has_no_scores(command: str, tmp_path: Path, parrot: Parrot) -> None:
    root, out = official(tmp_path / "set", CASES[0]), str(tmp_path / "r.json")
    assert main(["vqav2", "--data", str(root), "--split", "test", "--out", out, "--no-html"]) == 0
    more = {"compare": [out], "audit": [], "calibrate": ["--target", "0.5"]}[command]
    with pytest.raises(DataError, match=rf"r\.json holds no scores: {UNPUBLISHED}"):
        main([command, out, *more])


def test_training_pictures_are_looked_for_all_the_same(
    tmp_path: Path, parrot: Parrot, draw: Callable[..., Image.Image], capsys: pytest.CaptureFixture[str]
) -> None:
    root = official(tmp_path / "set", CASES[0])
    (tmp_path / "train").mkdir()
    seen = next((root / "test2015").iterdir())
    draw(1).save(seen)  # the others are alike
    shutil.copy(seen, tmp_path / "train" / "a.jpg")
    words = ["vqav2", "--data", str(root), "--split", "test", "--out", str(tmp_path / "r.json")]
    assert main([*words, "--train-data", str(tmp_path / "train")]) == 0
    said = capsys.readouterr().out
    assert "1 pictures of 1 examples are among 1 training pictures" in said and "left to score" not in said


@pytest.mark.parametrize("part", ["dev", "test"])
def test_answers_to_some_questions_alone_are_refused(part: str, tmp_path: Path) -> None:
    """A published split must have every answer; one that is kept has all of them, once it is out, or none."""
    source = json.loads((FIXTURES / "textvqa" / "TextVQA_0.5.1_val.json").read_text(encoding="utf-8"))
    del source["data"][3]["answers"]
    name = f"TextVQA_0.5.1_{'val' if part == 'dev' else part}.json"
    (tmp_path / name).write_text(json.dumps(source), encoding="utf-8")
    message = {
        "dev": r"val\.json: an entry has no 'answers'",
        "test": r"textvqa, split test: 1 of 12 examples have no answers, the first is",
    }[part]
    with pytest.raises(DataError, match=message):
        tasks.get("textvqa").examples(tmp_path, part, pictures=False)


def test_answers_that_are_there_are_scored(tmp_path: Path) -> None:
    shutil.copy(FIXTURES / "textvqa" / "TextVQA_0.5.1_val.json", tmp_path / "TextVQA_0.5.1_test.json")
    examples = tasks.get("textvqa").answered(tmp_path, "test")
    assert all(len(example.answers) == 10 for example in examples)


@pytest.mark.parametrize(
    ("task", "split", "file", "made", "kept"),
    [
        ("vqav2", "test-dev", "data/testdev-00000-of-00036.parquet", "vqav2", {"answers": None}),
        ("vqav2", "test", "data/test-00000-of-00145.parquet", "vqav2", {"answers": []}),
        ("textvqa", "test", "data/test-00000-of-00002.parquet", "textvqa", {"answers": [""] * 10}),
        ("vizwiz", "test", "data/test-00000-of-00009.parquet", "vizwiz", {"answers": None, "category": None}),
        ("aokvqa", "test", "data/test-00000-of-00001.parquet", "aokvqa", {"direct_answers": None}),
        ("aokvqa", "test", "data/test-00000-of-00001.parquet", "aokvqa", {"direct_answers": "[]"}),
        ("aokvqa-choice", "test", "test.parquet", "aokvqa", {"correct_choice_idx": None}),
        ("nocaps", "test", "data/test-00000-of-00010.parquet", "nocaps", {"annotations_captions": []}),
    ],
)
def test_the_hubs_rows_say_nothing_where_answers_are_kept(
    task: str, split: str, file: str, made: str, kept: dict[str, Any], tmp_path: Path
) -> None:
    found = getattr(hubrows, made)()
    if task == "vqav2":
        kept = kept | {"answer_type": None, "question_type": None}
    path = hubrows.write(tmp_path / file, [row | kept for row in found])
    examples = tasks.get(task).examples(tmp_path, split)
    assert len(examples) == 12 and not any(example.answers for example in examples)
    # The same rows in a part whose answers are published are an error still.
    published = path.with_name("validation.parquet")
    path.rename(published)
    with pytest.raises(DataError, match=r"validation\.parquet row 0"):
        tasks.get(task).examples(tmp_path, "dev")


def test_gqas_tables_of_the_submission(tmp_path: Path) -> None:
    found, stored = hubrows.gqa()
    for table, held in (("instructions", [asked(row) for row in found]), ("images", stored)):
        hubrows.write(tmp_path / f"submission_all_{table}" / "submission-00000-of-00001.parquet", held)
    examples = tasks.get("gqa").examples(tmp_path, "submission")
    assert len(examples) == 12 and not any(example.answers for example in examples)
