"""DAQUAR: questions about rooms (Malinowski and Fritz, NIPS 2014), with WUPS.

`daquar` is the official split; `daquar-reduced` its part about 37 kinds of things, with 25 test pictures and
files of its own (qa.37.raw.train.txt, qa.37.raw.reduced.test.txt); `daquar-random` the random split that
later papers use by mistake or habit (rows of data_train.csv and data_eval.csv: question, answer, image_id):
its scores are not comparable, as pictures stand on both sides.
"""

from __future__ import annotations

from pathlib import Path

from vlm.data.convert import daquar
from vlm.data.convert.common import first_existing, make_example, picture_files
from vlm.data.example import Example
from vlm.data.sources import read_dataset
from vlm.data.tables import whole_csv
from vlm.errors import DataError
from vlm.eval.scorers import daquar_scores, uniform_chance
from vlm.eval.task import Published, Task

REDUCED = {"train": "qa.37.raw.train.txt", "test": "qa.37.raw.reduced.test.txt"}


def _folder(root: Path) -> Path:
    return root / "daquar" if (root / "daquar").is_dir() else root


def _example(image: str | Path, question: str, answers: list[str], id: str) -> Example:
    meta = {"question_type": daquar.question_type(question), "answer_count": len(answers)}
    return make_example(image, question, [", ".join(answers)], id, meta)


def read(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """One example per question of the official split."""
    return read_dataset("daquar", root, split, pictures=pictures)


def read_reduced(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """One example per question about 37 kinds of things; the test part has 25 pictures.

    Raises:
        DataError: one of the reduced set's own files is missing.
    """
    assert root is not None
    name = REDUCED[split]
    folder = _folder(root)
    path = first_existing(folder, [name, f"reduced/{name}"], f"file of the reduced {split} part")
    images = picture_files(first_existing(folder, daquar.IMAGE_FOLDERS, "picture folder")) if pictures else {}
    found = []
    for index, (image, question, answers) in enumerate(daquar.read_pairs(path)):
        if pictures and image not in images:
            raise DataError(f"{path}, line {2 * index + 1}: picture {image} is missing")
        found.append(_example(images.get(image, image), question, answers, f"daquar-reduced/{split}/{index}"))
    return found


def read_random(root: Path | None, split: str, pictures: bool) -> list[Example]:
    """One example per row of the random split."""
    assert root is not None
    path = root / f"data_{'train' if split == 'train' else 'eval'}.csv"
    images = picture_files(first_existing(root, daquar.IMAGE_FOLDERS, "picture folder")) if pictures else {}
    found = []
    for index, row in enumerate(whole_csv(path)):
        try:
            question, answers, image = row["question"], daquar.clean_answers(row["answer"]), row["image_id"]
        except (KeyError, AttributeError):
            raise DataError(f"{path}, row {index + 2}: columns question, answer, image_id expected") from None
        if pictures and image not in images:
            raise DataError(f"{path}, row {index + 2}: picture {image} is missing")
        found.append(_example(images.get(image, image), question, answers, f"daquar-random/{split}/{index}"))
    return found


TASKS = (
    Task(
        name="daquar",
        about="objects, colours and numbers in rooms, official split",
        read=read,
        main="accuracy_single",
        score=daquar_scores,
        split="dev",
        splits=("train", "train-rest", "dev", "test"),
        chance=uniform_chance,
        generation={"max_new_tokens": 16},
        published=(
            Published("accuracy_single", 21.7, "Ask Your Neurons, arXiv:1505.01121, test"),
            Published("accuracy_single", 23.4, "IMG-CNN, Ma et al. 2016, arXiv:1506.00333, test"),
            Published("accuracy_single", 29.3, "SAN, Yang et al. 2016, arXiv:1511.02274, test"),
            Published("accuracy_all", 50.2, "people, Malinowski and Fritz 2014, arXiv:1410.0210, test"),
        ),
    ),
    Task(
        name="daquar-reduced",
        about="37 kinds of things in rooms, 25 test pictures",
        read=read_reduced,
        main="accuracy_single",
        score=daquar_scores,
        split="test",
        splits=("train", "test"),
        chance=uniform_chance,
        generation={"max_new_tokens": 16},
        published=(
            Published("accuracy_single", 39.7, "IMG-CNN, Ma et al. 2016, arXiv:1506.00333, test"),
            Published("accuracy_single", 46.2, "SAN(2, LSTM), Yang et al. 2016, arXiv:1511.02274, test"),
        ),
    ),
    Task(
        name="daquar-random",
        about="the random split of later papers, not comparable with the official one",
        read=read_random,
        main="accuracy_single",
        score=daquar_scores,
        split="test",
        splits=("train", "test"),
        chance=uniform_chance,
        generation={"max_new_tokens": 16},
    ),
)
