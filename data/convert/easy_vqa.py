"""easy-VQA: 5,000 pictures of one shape each, 48,248 questions, 13 answers (V. Zhou, 2019).

    answers.txt
    train/questions.json  train/images/N.png      (rows of [question, answer, picture number])
    test/questions.json   test/images/N.png

The `easy_vqa` package carries the set, so no folder need be given. The set has no dev part: `dev` is a tenth
of the training pictures, set aside by a hash of the picture's name; `train` is the full official training
part, `train-rest` what `dev` leaves of it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from vlm.data.convert.common import make_example, parse_json, picture_files, read_text
from vlm.data.example import Example
from vlm.data.splits import canonical_split, is_held_out
from vlm.errors import DataError, NoPartError

DEV_FRACTION = 0.1


def package_root() -> Path:
    """The folder of the installed package's data (the package's code is not run).

    Raises:
        DataError: the package is not installed.
    """
    spec = importlib.util.find_spec("easy_vqa")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "easy-VQA is not here: run `pip install easy-vqa==1.0`, or name the folder that holds it"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "data"


def looks_like(root: Path, pictures: bool = True) -> bool:
    """Whether `root` is the set's data folder; without `pictures` its questions will do."""
    return any(
        (root / part / "questions.json").is_file() and (not pictures or (root / part / "images").is_dir())
        for part in ("train", "test")
    )


def read_answers(root: Path) -> list[str]:
    """The closed list of answers, in the file's order."""
    return [line.strip() for line in read_text(root / "answers.txt").splitlines() if line.strip()]


def question_type(question: str, answer: str) -> str:
    """`yes/no`, `colour` or `object` (which shape)."""
    if answer in ("yes", "no"):
        return "yes/no"
    return "colour" if "color" in question.lower() else "object"


def read(root: Path | None, split: str, pictures: bool = True) -> list[Example]:
    """One example per question of a split, which needs only its own pictures.

    Without `pictures` none is looked for, and a picture's number stands for it.

    Raises:
        NoPartError: the questions of the split are missing.
        DataError: a picture is missing, or a row is not [question, answer, number].
    """
    split = canonical_split(split)
    root = root or package_root()
    part = "test" if split == "test" else "train"
    path = root / part / "questions.json"
    if not path.exists():
        raise NoPartError(f"{path} is missing")
    rows = parse_json(read_text(path), path)
    if not isinstance(rows, list):
        raise DataError(f"{path}: a list of [question, answer, picture number] is expected")
    there = picture_files(root / part / "images") if pictures else {}
    examples = []
    for index, row in enumerate(rows):
        if not (
            isinstance(row, list) and len(row) == 3 and isinstance(row[0], str) and isinstance(row[1], str)
        ):
            raise DataError(
                f"{path}, entry {index}: expected [question, answer, picture number], got {row!r}"
            )
        question, answer, image = row[0], row[1], str(row[2])
        if split in ("dev", "train-rest") and is_held_out(image, DEV_FRACTION, "easy-vqa") != (
            split == "dev"
        ):
            continue
        if pictures and image not in there:
            raise DataError(f"{path}, entry {index}: picture {image} is not in {root / part / 'images'}")
        meta = {"task": "vqa", "question_type": question_type(question, answer), "image": image}
        shown = there.get(image, image)
        examples.append(make_example(shown, question, [answer], f"easy-vqa/{part}/{index}", meta))
    return examples
