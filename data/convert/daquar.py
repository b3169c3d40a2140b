"""DAQUAR: questions about photographs of rooms (Malinowski and Fritz, NIPS 2014; NYU Depth v2 pictures).

    qa.894.raw.train.txt  qa.894.raw.test.txt   a question line and an answer line in turn
    images/imageN.jpg or .png                   (or nyu_depth_images/)

Copies that call the full files qa.37.raw.*.txt are read too, where no qa.894.raw.*.txt lies beside them.

"... in the image3 ?" is the file's way to name the picture; it is removed from the question. Underscores
are spaces, several answers are separated by commas. The set has no dev part: `dev` is set aside from the
training pictures. Neighbouring numbers are often frames of one room, and the official split never divides a
room, so a whole run of consecutive training numbers goes to one side, chosen by a hash of its first name.
`train` is the full official training part, `train-rest` what `dev` leaves of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from vlm.data.convert.common import first_existing, make_example, picture_files, read_text
from vlm.data.example import Example
from vlm.data.splits import canonical_split, is_held_out
from vlm.errors import DataError, NoPartError

DEV_FRACTION = 0.1
QA_FILES = ("qa.894.raw.{part}.txt", "qa.37.raw.{part}.txt")
IMAGE_FOLDERS = ("images", "nyu_depth_images", "Images")
_IMAGE = re.compile(r"\s*(?:\b(?:in|of|on)\s+)?(?:(?:the|this)\s+)?\bimage\s*(\d+)\s*(?=\?|$)", re.IGNORECASE)
_ANY_IMAGE = re.compile(r"\bimage\s*(\d+)\b", re.IGNORECASE)


def looks_like(root: Path, pictures: bool = True) -> bool:
    """Whether `root` holds a DAQUAR question file; pictures are looked for when they are read."""
    return any((root / name).is_file() for part in ("train", "test") for name in question_files(part))


def question_files(part: str) -> list[str]:
    """The names that the question file of `train` or `test` goes by, the official one first."""
    return [name.format(part=part) for name in QA_FILES]


def clean_question(line: str) -> tuple[str, str]:
    """(question, image name) of a question line: "what is on the desk in the image3 ?" -> ("what is on the
    desk?", "image3").

    Where the picture is part of a place ("on the left side of the image4 ?"), "the image" stays.

    Raises:
        ValueError: the line names no picture.
    """
    numbers = _ANY_IMAGE.findall(line)
    if not numbers:
        raise ValueError("no picture is named")
    text = line.strip()
    if re.search(
        r"\b(?:side|corner|front|most side|part|middle|center|centre) of (?:the |this )?image\s*\d+", text
    ):
        text = _ANY_IMAGE.sub("image", text)
    else:
        text = _IMAGE.sub(" ", text)
        text = _ANY_IMAGE.sub("image", text)
    text = re.sub(r"\s+", " ", text.replace("_", " ")).strip().rstrip("? ").strip()
    return f"{text}?", f"image{int(numbers[-1])}"


def clean_answers(line: str) -> list[str]:
    """The answers of an answer line: lower case, underscores as spaces, no empty ones, order kept."""
    parts = (re.sub(r"\s+", " ", part.replace("_", " ")).strip().lower() for part in line.split(","))
    return list(dict.fromkeys(part for part in parts if part))


def question_type(question: str) -> str:
    """`count`, `colour` or `object`, by the question's first words."""
    if question.startswith("how many"):
        return "count"
    return "colour" if re.match(r"(what|which) (is|are)?( ?the)? ?colou?rs?\b", question) else "object"


def held_out_images(names: Iterable[str]) -> set[str]:
    """Those of the training pictures that make the dev part: whole runs of consecutive numbers."""
    held: set[str] = set()
    previous, chosen = -2, False
    for number in sorted({int(name.removeprefix("image")) for name in names}):
        if number != previous + 1:
            chosen = is_held_out(f"image{number}", DEV_FRACTION, "rooms")
        if chosen:
            held.add(f"image{number}")
        previous = number
    return held


def read_pairs(path: Path) -> list[tuple[str, str, list[str]]]:
    """(image name, question, answers) of every pair of lines.

    Raises:
        DataError: an odd number of lines, a question without picture, an empty answer; the line is named.
    """
    # Blank lines at the end say nothing; elsewhere to leave one out would pair answers with other questions.
    lines = [line.strip() for line in read_text(path).rstrip().splitlines()]
    pairs = []
    for index in range(0, len(lines) - 1, 2):
        try:
            question, image = clean_question(lines[index])
        except ValueError as error:
            raise DataError(f"{path}, line {index + 1}: {error}: {lines[index]!r}") from None
        answers = clean_answers(lines[index + 1])
        if not answers:
            raise DataError(f"{path}, line {index + 2}: empty answer")
        pairs.append((image, question, answers))
    if len(lines) % 2:
        raise DataError(
            f"{path}: {len(lines)} lines; a question line and an answer line in turn are expected"
        )
    return pairs


def read(root: Path, split: str, pictures: bool = True) -> list[Example]:
    """One example per question of a split, which needs only its own pictures.

    `answers` holds one string, the answers joined by ", " (the official scorers take the list as a whole);
    `meta["answer_list"]` the same joined by "|", `meta["answer_count"]` their number. Without `pictures` none
    is looked for, and a picture's name stands for it.

    Raises:
        NoPartError: the question file is missing.
        DataError: a picture is missing, or the question file is malformed.
    """
    split = canonical_split(split)
    part = "test" if split == "test" else "train"
    pairs = read_pairs(first_existing(root, question_files(part), f"{part} questions", NoPartError))
    keep = {name for name, _, _ in pairs}
    if split in ("dev", "train-rest"):
        held = held_out_images(keep)
        keep = held if split == "dev" else keep - held
    there = picture_files(first_existing(root, IMAGE_FOLDERS, "picture folder")) if pictures else {}
    missing = sorted(keep - there.keys()) if pictures else []
    if missing:
        raise DataError(
            f"{len(missing)} pictures of {split} are missing below {root}, the first is {missing[0]}"
        )
    return [
        make_example(
            there.get(image, image),
            question,
            [", ".join(answers)],
            f"daquar/{part}/{index}",
            {
                "task": "vqa",
                "question_type": question_type(question),
                "answer_list": "|".join(answers),
                "answer_count": len(answers),
                "image": image,
            },
        )
        for index, (image, question, answers) in enumerate(pairs)
        if image in keep
    ]
