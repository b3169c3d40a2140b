"""Benchmark files that are JSON, but not what they should be: one clear error each, naming file and key."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vlm.errors import DataError
from vlm.eval import tasks

FIXTURES = Path(__file__).parent / "fixtures"

# task, split, file, the key of its rows (None: it is a list of rows itself, "": an object of them)
FILES = [
    ("vqav2", "dev", "v2_OpenEnded_mscoco_val2014_questions.json", "questions"),
    ("vqav2", "dev", "v2_mscoco_val2014_annotations.json", "annotations"),
    ("okvqa", "test", "mscoco_val2014_annotations.json", "annotations"),
    ("aokvqa", "dev", "aokvqa_v1p0_val.json", None),
    ("textvqa", "dev", "TextVQA_0.5.1_val.json", "data"),
    ("vizwiz", "dev", "val.json", None),
    ("gqa", "testdev", "testdev_balanced_questions.json", ""),
    ("vqa-rad", "test", "VQA_RAD Dataset Public.json", None),
    ("scienceqa-img", "test", "problems.json", ""),
    ("nocaps", "dev", "nocaps_val_4500_captions.json", "images"),
    ("nocaps", "dev", "nocaps_val_4500_captions.json", "annotations"),
    ("coco-captions", "test", "dataset_coco.json", "images"),
]


def changed(tmp_path: Path, task: str, file: str, content: Any) -> Path:
    """A copy of a task's fixture, words alone, with one file rewritten."""
    root = tmp_path / task
    shutil.copytree(FIXTURES / task, root, ignore=shutil.ignore_patterns("*.jpg", "*.png"))
    text = content if isinstance(content, str) else json.dumps(content)
    (root / file).write_text(text, encoding="utf-8")
    return root


def original(task: str, file: str) -> Any:
    return json.loads((FIXTURES / task / file).read_text(encoding="utf-8"))


@pytest.mark.parametrize(("task", "split", "file", "key"), FILES, ids=lambda value: str(value))
@pytest.mark.parametrize("wrong", [5, None, "words", {"a": 1}, [1], [None], [[]]], ids=repr)
def test_rows_that_are_none(
    task: str, split: str, file: str, key: str | None, wrong: Any, tmp_path: Path
) -> None:
    content = {**original(task, file), key: wrong} if key else wrong
    with pytest.raises(DataError) as caught:
        tasks.get(task).examples(changed(tmp_path, task, file, content), split, pictures=False)
    assert file in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "file", "key", "name", "value", "message"),
    [
        ("vqav2", FILES[0][2], "questions", "question", ["Is it?"], "'question' is no text"),
        ("vqav2", FILES[0][2], "questions", "question", {"a": 1}, "'question' is no text"),
        ("vqav2", FILES[0][2], "questions", "question_id", [1], "'question_id' is no text"),
        ("vqav2", FILES[0][2], "questions", "image_id", "zz", "'image_id' is no whole number: zz"),
        ("vqav2", FILES[0][2], "questions", "image_id", -1, "'image_id' is no whole number"),
        ("vqav2", FILES[1][2], "annotations", "question_id", {}, "'question_id' is no text"),
        ("vqav2", FILES[1][2], "annotations", "answers", [], "'answers' is empty"),
        ("vqav2", FILES[1][2], "annotations", "answers", [5.0, True], "'answer' is no text"),
        ("vqav2", FILES[1][2], "annotations", "answer_type", None, "no 'answer_type'"),
        ("aokvqa", FILES[3][2], None, "direct_answers", [], "'direct_answers' is empty"),
        ("aokvqa", FILES[3][2], None, "correct_choice_idx", True, "'correct_choice_idx' is True of"),
        ("textvqa", FILES[4][2], "data", "answers", [], "'answers' is empty"),
        ("vizwiz", "val.json", None, "answer_type", None, "no 'answer_type'"),
        ("vizwiz", "val.json", None, "answers", [], "'answers' is empty"),
        ("gqa", FILES[6][2], "", "types", [1], "an object of entries"),
        ("gqa", FILES[6][2], "", "question", ["Is it?"], "'question' is no text"),
        ("vqa-rad", FILES[7][2], None, "answer", float("nan"), "'answer' is no text"),
        ("nocaps", FILES[9][2], "images", "id", [1], "'id' is no text"),
        ("coco-captions", FILES[11][2], "images", "sentences", 5, "'sentences' is no list"),
    ],
)
def test_a_value_of_the_wrong_kind(
    task: str, file: str, key: str | None, name: str, value: Any, message: str, tmp_path: Path
) -> None:
    content = original(task, file)
    rows = content[key] if key else list(content.values()) if key == "" else content
    for row in rows:
        row[name] = value
    root = changed(tmp_path, task, file, content)
    with pytest.raises(DataError, match=message) as caught:
        tasks.get(task).examples(root, pictures=False)
    assert file in str(caught.value)


@pytest.mark.parametrize(
    ("task", "file"), [("gqa", FILES[6][2]), ("scienceqa-img", FILES[8][2])], ids=["gqa", "scienceqa"]
)
def test_a_question_that_stands_twice_in_an_object(task: str, file: str, tmp_path: Path) -> None:
    rows = original(task, file)
    id, row = next(iter(rows.items()))
    twice = f'{{"{id}": {json.dumps(row)}, ' + json.dumps(rows).removeprefix("{")
    with pytest.raises(DataError, match=f"the key '{id}' stands twice"):
        tasks.get(task).examples(changed(tmp_path, task, file, twice), pictures=False)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('[{"question": "\\ud800x"}]', "half a character"),
        ("[" + "1" * 5000 + "]", "too many digits"),
    ],
)
def test_json_that_cannot_be_held(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"val\.json.*{message}"):
        tasks.get("vizwiz").examples(changed(tmp_path, "vizwiz", "val.json", text), pictures=False)


@pytest.mark.parametrize("task", ["vqav2", "okvqa"])
@pytest.mark.parametrize(
    ("questions", "annotations", "pictures"),
    [
        ("Questions", "Annotations", "Images/mscoco/val2014"),
        ("questions", "annotations", "images/val2014"),
        ("annotations", "annotations", "Images/val2014"),
    ],
)
def test_the_layouts_that_people_unpack(
    task: str, questions: str, annotations: str, pictures: str, tmp_path: Path
) -> None:
    folders = {"questions.json": questions, "annotations.json": annotations}
    for path in sorted((FIXTURES / task).rglob("*.*")):
        folder = tmp_path / folders.get(path.name.rpartition("_")[2], pictures)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.name)
    there, usual = (tasks.get(task).examples(root) for root in (tmp_path, FIXTURES / task))
    assert [(e.id, e.answers) for e in there] == [(e.id, e.answers) for e in usual]
