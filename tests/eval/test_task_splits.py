"""Tasks find their splits and their data, or say what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from vlm.errors import ConfigError, DataError, VLMError
from vlm.eval import tasks

FIXTURES = Path(__file__).parent / "fixtures"
VQA_QUESTIONS = "v2_OpenEnded_mscoco_val2014_questions.json"


@pytest.mark.parametrize(
    ("name", "split", "train"),
    [("flickr8k", "dev", "train"), ("daquar", "test", "train"), ("daquar", "dev", "train-rest")]
    + [("easy-vqa", None, "train"), ("easy-vqa", "val", "train-rest")],
)
def test_the_prior_never_sees_what_is_evaluated(name: str, split: str | None, train: str) -> None:
    assert tasks.get(name).train_for(split) == train


def test_no_prior_where_training_is_evaluated() -> None:
    for name, split in (
        ("daquar", "train"),
        ("daquar", "train-rest"),
        ("pope", "random"),
        ("folder-vqa", "all"),
    ):
        with pytest.raises(DataError, match="training split"):
            tasks.get(name).train_for(split)


def test_unknown_task_and_split_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean vqav2"):
        tasks.get("vqa2")
    with pytest.raises(ConfigError, match=r"no split 'tset'; it has train, dev \(or val\), test-dev, test$"):
        tasks.get("vqav2").examples(FIXTURES / "vqav2", "tset")
    with pytest.raises(VLMError, match="--data"):
        tasks.get("vqav2").examples(None)


@pytest.mark.parametrize("name", ["val", "VAL", "valid", "Validation", "val2014", "val_2017", "dev", " Dev"])
def test_split_names(name: str) -> None:
    task = tasks.get("vqav2")
    assert task.canonical(name) == "dev"
    assert len(task.examples(FIXTURES / "vqav2", name)) == 12
    assert task.canonical("train2014") == task.canonical("Training") == "train"


@pytest.mark.parametrize("task", ["vqav2", "pope", "gqa", "folder-vqa", "daquar", "flickr8k", "nocaps"])
def test_data_that_are_not_there(task: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"absent is missing; --data says where the data of {task} lie"):
        tasks.get(task).examples(tmp_path / "absent")


def test_a_file_where_a_folder_is_needed() -> None:
    with pytest.raises(DataError, match=r"questions\.json is a file; the folder that it lies in is needed"):
        tasks.get("vqav2").examples(FIXTURES / "vqav2" / VQA_QUESTIONS)


def test_a_table_of_one_part_says_how_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("file_name,question,answer\na.png,what?,cat\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv has one part only, so no test: ask for train, which is"):
        tasks.get("folder-vqa").examples(tmp_path / "a.csv")


@pytest.mark.parametrize("name", ["val", "val2014", "testdev", "x"])
def test_an_unknown_split_is_called_what_was_typed(name: str) -> None:
    with pytest.raises(ConfigError, match=f"okvqa has no split '{name}'; it has train, test$"):
        tasks.get("okvqa").examples(FIXTURES / "okvqa", name)
