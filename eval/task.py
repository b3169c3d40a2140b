"""What a benchmark is: where its examples come from, how an answer is scored, what guessing gets.

Tasks stand in `vlm/eval/tasks`, one short file each; everything that runs them speaks only of `Task`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vlm.conversation import ImageSource
from vlm.data.example import Example
from vlm.data.splits import canonical_split, image_key
from vlm.data.streams import hub_name
from vlm.errors import DataError, UsageError

_YEAR = re.compile(r"[_-]?20\d\d$")  # COCO's parts go by theirs
UNPUBLISHED = "the answers of this split are not published; the benchmark's own server scores a submission"
LOWER_IS_BETTER = frozenset(("chair_i", "chair_s"))


@dataclass(frozen=True)
class Scores:
    """What a scorer makes of answers; every score is a percentage (CIDEr times 100).

    Attributes:
        metrics: by name, the main one first.
        intervals: 95 % bootstrap intervals of those that have one.
        per_item: (n,) scores of single items, NaN where an item does not count; for comparing runs.
        breakdown: subset -> {"n": items, metric: score}.
        skipped: metric -> why it is not here.
        groups: of each item, the group that is resampled whole; none where the items themselves are.
        reason: why there are no scores at all; None where there are.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    per_item: dict[str, np.ndarray]
    breakdown: dict[str, dict[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def main(self) -> str:
        """The name of the main metric."""
        return next(iter(self.metrics))


@dataclass(frozen=True)
class Published:
    """A figure from the literature, and where it stands."""

    metric: str
    value: float
    source: str


Reader = Callable[[Path | None, str, bool], list[Example]]
Scorer = Callable[..., Scores]  # (examples, answers), and java= for captions


@dataclass(frozen=True)
class Task:
    """One benchmark.

    Attributes:
        read: (folder or None, split, whether the pictures must be there) -> examples. An example's id is
            unique in its split; its last part, or `meta["key"]`, is the id in the official results format.
        main: the name of the main metric, the first of `score`'s.
        score: examples and their answers, in the same order -> scores.
        split: the split that is meant when none is named; `splits` all of them.
        part: (folder, split) -> what a report calls the split there; two splits of one name are one,
            as a folder of one's own need not have every part.
        hidden: those of `splits` whose answers the benchmark keeps: `read` may give examples without any,
            which are asked about and written down for its server, but not scored (see `unscored`).
        train: the split for the question-only prior and for shots; None where there is none.
        chance: score of guessing, in the main metric, in percent; None where it means nothing.
        generation: fields of `GenerationConfig` that this task decodes with.
        choices: multiple choice: `meta["options"]` is a JSON list of strings; answered by likelihood unless
            asked otherwise.
        captions: `score` takes `java=False`, which leaves METEOR and SPICE out.
        answer_key: the name of the answer in the official results format, next to `id_key`.
        data_optional: an installed package carries the data.
        surplus: official results answer more questions than the split scores: ids of no example are left out
            of a file of answers, and their number is said on stderr; elsewhere they are refused.
        unparsed: whether an answer cannot be read as one of those that are possible; its rate is reported.
        submission: examples and answers -> the results format, where it is no list of rows; text where it is
            no JSON.
    """

    name: str
    about: str
    read: Reader
    main: str
    score: Scorer
    split: str
    splits: tuple[str, ...]
    part: Callable[[Path | None, str], str] = lambda root, split: split
    hidden: tuple[str, ...] = ()
    train: str | None = "train"
    chance: Callable[[Sequence[Example]], float | None] = lambda examples: None
    generation: Mapping[str, Any] = field(default_factory=dict)
    choices: bool = False
    published: tuple[Published, ...] = ()
    captions: bool = False
    id_key: str = "question_id"
    answer_key: str = "answer"
    data_optional: bool = False
    surplus: bool = False
    submission: Callable[[Sequence[Example], Sequence[str]], Any] | None = None
    unparsed: Callable[[str, Example], bool] | None = None

    def examples(
        self, root: Path | None, split: str | None = None, *, pictures: bool = True
    ) -> list[Example]:
        """The examples of a split, checked.

        Raises:
            UsageError: a split that this task does not have.
            DataError: no such place, nothing to read, two examples with one id, or answers to some alone.
        """
        chosen = self.canonical(split)
        if chosen not in self.splits:
            known = ", ".join("dev (or val)" if each == "dev" else each for each in self.splits)
            raise UsageError(f"{self.name} has no split {split or chosen!r}; it has {known}")
        if root is None and not self.data_optional:
            raise DataError(f"say where the data of {self.name} lie: --data FOLDER")
        if root is not None and not root.expanduser().exists() and hub_name(root) is None:
            raise DataError(f"{root} is missing; --data says where the data of {self.name} lie")
        found = self.read(root, chosen, pictures)
        if not found:
            raise DataError(f"{self.name} has no examples in split {split or chosen} of {root}")
        seen: set[str] = set()
        for example in found:
            if example.id in seen:
                raise DataError(f"{self.name}, split {split or chosen}: the id {example.id} stands twice")
            seen.add(example.id)
        bare = [example.id for example in found if not example.answers]
        if 0 < len(bare) < len(found):
            raise DataError(
                f"{self.name}, split {split or chosen}: {len(bare)} of {len(found)} examples have no "
                f"answers, the first is {bare[0]}; a split has all of them or none"
            )
        return found

    def answered(self, root: Path | None, split: str | None = None) -> list[Example]:
        """The examples of a split, without pictures, for answers that are to be scored.

        Raises:
            UsageError, DataError: as `examples`, and where the split's answers are not published.
        """
        found = self.examples(root, split, pictures=False)
        if why := unscored(found):
            raise DataError(f"{self.name}, split {split or self.split}, cannot be scored: {why}")
        return found

    def canonical(self, split: str | None) -> str:
        """The split's name in this task: its default for None, "dev" for "val", "VAL" and "val2014".

        Hyphens make no difference: "testdev" is "test-dev". A name that means nothing comes back as it is.
        """
        chosen = split or self.split
        typed = chosen.strip().lower()
        plain = _YEAR.sub("", typed)
        for name in (typed, plain):
            for each in self.splits:
                if _letters(name) == _letters(each):
                    return each
        try:
            return canonical_split(plain)
        except DataError:
            return chosen

    def part_name(self, root: Path | None, split: str | None) -> str:
        """What a report calls the split of this folder."""
        return self.part(root, self.canonical(split))

    def train_for(self, split: str | None, root: Path | None = None) -> str:
        """The training split that shares nothing with the split that is evaluated, of this folder if any.

        Raises:
            DataError: there is none; the message is the reason that a report gives.
        """
        chosen = self.canonical(split)
        if self.train is None:
            raise DataError("the task has no training split")
        if chosen in (self.train, "train-rest", "all"):
            raise DataError("the training split itself is evaluated")
        # Where dev is set aside from the official training part, the whole part would hold its answers.
        train = "train-rest" if chosen == "dev" and "train-rest" in self.splits else self.train
        if root is not None and self.part(root, chosen) == self.part(root, train):
            raise DataError(
                f"{root} has no training split: its one table is what is evaluated; give training rows a "
                f"folder of their own, {root / 'train'}"
            )
        return train

    def scores(self, examples: Sequence[Example], answers: Sequence[str], *, java: bool = True) -> Scores:
        """What `answers`, in the examples' order, are worth; no scores but a reason where nobody can know."""
        if why := unscored(examples):
            return Scores({}, {}, {}, reason=why)
        if self.captions:
            return self.score(examples, answers, java=java)
        return self.score(examples, answers)


def unscored(examples: Sequence[Example]) -> str | None:
    """Why examples cannot be scored: their answers are not published; None where they can."""
    return None if any(example.answers for example in examples) else UNPUBLISHED


def official_id(example: Example) -> str:
    """The id that the official results format of its benchmark knows the example by."""
    return str(example.meta.get("key") or example.id.rpartition("/")[2])


def _letters(split: str) -> str:
    return split.replace("-", "").replace("_", "")


def picture_names(images: Sequence[ImageSource]) -> tuple[str, ...]:
    """What tells pictures apart: the paths of files, hashes of everything else."""
    return tuple(str(image) if isinstance(image, str | Path) else image_key(image) for image in images)


def question(example: Example) -> str:
    """The words of the question: the last user turn."""
    return example.turns[-1].text
