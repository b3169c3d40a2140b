"""`vlm data check`: everything decoded, problems counted by cause, duplicates, leakage, words.

vlm data check FOLDER                        every part that the source has
vlm data check FOLDER --against OTHER:test   training pictures that stand in another set's part
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm.config import CAPTION_PROMPT
from vlm.conversation import ImageSource
from vlm.data.duplicates import Print, duplicate_groups, leaks, print_of
from vlm.data.example import Example
from vlm.data.readers import BAD_SHARE, Reading, dev_is_from_train, read_source, told_texts
from vlm.data.rows import BadRow
from vlm.data.splits import image_key
from vlm.data.text import all_spoken
from vlm.errors import DataError, NoPartError
from vlm.images import ImageError, open_picture

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
Progress = Callable[[str, int, int], None]


@dataclass
class PartReport:
    """What was found in one part of a source."""

    name: str
    problem: str | None = None
    """Why nothing of it can be read; None where it can."""
    examples: int = 0
    pictures: int = 0
    bad: list[BadRow] = field(default_factory=list)
    texts: int = 0
    """Rows that are about no picture and are left out."""
    sizes: Counter[str] = field(default_factory=Counter)
    """"WIDTHxHEIGHT" -> pictures."""
    answer_words: Counter[int] = field(default_factory=Counter)
    """Words of an answer -> answers."""
    vocabulary: Counter[str] = field(default_factory=Counter)
    answers: Counter[str] = field(default_factory=Counter)
    """Answer to a question (captions left out) -> how often."""
    question_types: Counter[str] = field(default_factory=Counter)
    duplicates: list[list[str]] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    """Examples with the same picture and question as one before."""
    samples: list[Example] = field(default_factory=list)

    @property
    def bad_share(self) -> float:
        """The share of rows that cannot be used."""
        total = self.examples + len(self.bad)
        return len(self.bad) / total if total else 0.0

    @property
    def causes(self) -> Counter[str]:
        """Unusable rows by cause."""
        return Counter(row.cause for row in self.bad)

    def lines(self) -> list[str]:
        """What the usable rows hold, in lines for people: answers, words, pictures that look alike."""
        lines = [f"  {told_texts(self.texts)}"] if self.texts else []
        if self.answer_words:
            total = sum(self.answer_words.values())
            once = sum(count == 1 for count in self.vocabulary.values())
            mean = sum(words * count for words, count in self.answer_words.items()) / total
            lines.append(
                f"  answers: {total}, {mean:.1f} words on average, {max(self.answer_words)} at most; "
                f"vocabulary {len(self.vocabulary)} words, {once} of them once"
            )
        if self.answers:
            common = ", ".join(f"{answer} ({count})" for answer, count in self.answers.most_common(5))
            lines.append(f"  commonest answers: {common}")
        if len(self.answers) == 1 < self.answers.total():
            lines.append("  WARNING: every question has the same answer: a model learns to say nothing else")
        if self.duplicates:
            lines.append(f"  {len(self.duplicates)} groups of pictures look alike, for example:")
            lines += ["    " + " = ".join(group[:4]) for group in self.duplicates[:3]]
        if self.repeated:
            lines.append(f"  {len(self.repeated)} examples repeat an earlier picture and question")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The report for programs."""
        return {
            "part": self.name, "problem": self.problem, "examples": self.examples, "pictures": self.pictures,
            "bad": len(self.bad), "bad_share": round(self.bad_share, 6), "causes": dict(self.causes),
            "bad_rows": [str(row) for row in self.bad], "without_picture": self.texts,
            "duplicates": self.duplicates, "repeated": self.repeated,
            "sizes": dict(self.sizes.most_common(20)),
            "answer_words": dict(sorted(self.answer_words.items())), "vocabulary": len(self.vocabulary),
            "answers": dict(self.answers.most_common(50)), "question_types": dict(self.question_types),
        }  # fmt: skip


@dataclass
class CheckReport:
    """What was found in a source."""

    source: str
    parts: list[PartReport]
    leaks: list[tuple[str, str]] = field(default_factory=list)
    """(held-out picture, training picture) pairs that look alike."""

    @property
    def ok(self) -> bool:
        """Whether a training run would start: every part can be read, at most 1 % of its rows are unusable,
        and no training picture is held out."""
        usable = all(
            part.problem is None and part.bad_share <= BAD_SHARE and part.examples for part in self.parts
        )
        return bool(self.parts) and usable and not self.leaks

    def to_json(self) -> dict[str, Any]:
        """The report for programs."""
        parts = [part.to_json() for part in self.parts]
        return {
            "source": self.source,
            "ok": self.ok,
            "parts": parts,
            "leaks": [list(pair) for pair in self.leaks],
        }


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def _label(image: ImageSource) -> str:
    return str(image) if isinstance(image, str | Path) else image_key(image)[:16]


def _decode(
    reading: Reading, report: PartReport, progress: Progress | None
) -> tuple[list[Example], list[Print]]:
    """Decode every picture once; examples with a broken one go to the report's bad rows."""
    prints: dict[str, Print] = {}
    broken: dict[str, tuple[str, str]] = {}
    usable = []
    for number, example in enumerate(reading.examples):
        for image in example.images:
            label = _label(image)
            if label in prints or label in broken:
                continue
            try:
                picture = open_picture(image, name=label)
            except ImageError as error:
                broken[label] = (f"picture {error.code}".replace("_", " "), str(error))
                continue
            report.sizes[f"{picture.pixels.width}x{picture.pixels.height}"] += 1
            prints[label] = print_of(label, picture.sha256, picture.pixels)
        bad = next((broken[_label(image)] for image in example.images if _label(image) in broken), None)
        if bad:
            report.bad.append(BadRow(example.id, *bad))
        else:
            usable.append(example)
        if progress:
            progress(f"decoding {report.name}", number + 1, len(reading.examples))
    return usable, list(prints.values())


def _count_words(examples: Sequence[Example], report: PartReport) -> None:
    seen: set[tuple[tuple[str, ...], str]] = set()
    for example in examples:
        question = example.turns[-1].text
        key = (
            tuple(_label(image) for image in example.images),
            "\n".join(turn.text for turn in example.turns),
        )
        if key in seen:
            report.repeated.append(example.id)
        seen.add(key)
        if question != CAPTION_PROMPT:
            report.answers.update(answer.lower() for answer in example.answers)
            report.question_types[str(example.meta.get("question_type", "question"))] += 1
        for answer in example.answers:
            found = words_of(answer)
            report.answer_words[len(found)] += 1
            report.vocabulary.update(found)


def check_reading(
    reading: Reading, name: str, progress: Progress | None = None
) -> tuple[PartReport, list[Print]]:
    """Check one part: decode, count, look for duplicates."""
    report = PartReport(name, bad=list(reading.bad), texts=len(reading.texts))
    decoded, prints = _decode(reading, report, progress)
    usable, silent = all_spoken(decoded)
    report.bad += silent
    report.samples = usable[:3]
    count(usable, prints, report)
    return report, prints


def count(examples: Sequence[Example], prints: Sequence[Print], report: PartReport) -> None:
    """Puts what usable examples and the prints of their pictures tell into a report."""
    report.examples = len(examples)
    report.pictures = len(prints)
    report.duplicates = [[item.name for item in group] for group in duplicate_groups(prints)]
    _count_words(examples, report)


def parts_of(source: str | Path) -> list[tuple[str, Reading | DataError]]:
    """The parts that a source has, each read or why it cannot be; a source without parts is one called "all".

    Raises:
        DataError: none can be read.
    """
    found: list[tuple[str, Reading | DataError]] = []
    absent: DataError | None = None
    # Where dev is set aside from the training part, the whole training part holds it.
    train = "train-rest" if dev_is_from_train(source) else "train"
    for split in (train, "dev", "test"):
        try:
            found.append((split, read_source(source, split, divide=False)))
        except NoPartError as error:
            absent = absent or error
        except DataError as error:
            found.append((split, error))
    read = [reading for _, reading in found if isinstance(reading, Reading)]
    if not read:
        problems = [error for _, error in found if isinstance(error, DataError)]
        raise (problems or [absent or DataError(f"{source} holds nothing")])[0]
    if len(found) == 1 and not read[0].has_part:
        return [("all", read[0])]
    return found


def check_source(
    source: str | Path, against: Sequence[str] = (), progress: Progress | None = None
) -> CheckReport:
    """Check every part of a source, and its training part against its own and other held-out parts.

    Args:
        source: anything that `read_source` takes.
        against: further held-out sources, each `SOURCE` or `SOURCE:SPLIT` (`test` if none is said).
        progress: called with what is done, how far, and of how much.

    Raises:
        DataError: the source cannot be read at all.
    """
    report = CheckReport(str(source), [])
    train: list[Print] = []
    held: list[Print] = []
    for name, reading in parts_of(source):
        if isinstance(reading, DataError):
            report.parts.append(PartReport(name, problem=str(reading)))
            continue
        part, prints = check_reading(reading, name, progress)
        report.parts.append(part)
        (held if name in ("dev", "test") else train).extend(prints)
    for other in against:
        place, _, split = other.rpartition(":")
        reading = read_source(place or other, split if place else "test")
        _, prints = check_reading(reading, other, progress)
        held.extend(prints)
    report.leaks = [(one.name, two.name) for one, two in leaks(train, held)]
    return report
