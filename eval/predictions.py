"""Answers on disk: the append-only file of a run, and the official results formats of the challenges."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlm.answer import confidence
from vlm.config import flat
from vlm.data.convert.common import parse_json, parse_json_lines, read_text
from vlm.data.example import Example
from vlm.data.tables import mark_of, whole_csv
from vlm.errors import ConfigError, DataError
from vlm.eval import outputs
from vlm.eval.scorers import options
from vlm.eval.task import Task, official_id

KEPT = "; the answers that it holds are kept: make room and run the same command again"
ID_KEYS = ("question_id", "questionId", "image_id", "image", "id", "pid", "key")
ANSWER_KEYS = ("answer", "caption", "prediction", "text", "direct_answer", "multiple_choice")


@dataclass(frozen=True)
class Prediction:
    """One answer of a run. `logprob` is natural, of the whole answer with its end; `tokens` their number.

    `margin` is how near another answer was (`vlm.answer.Answer`); of choices, how far the second is behind.
    """

    id: str
    text: str
    logprob: float
    tokens: int
    finish: str
    margin: float | None = None

    @property
    def confidence(self) -> float:
        """As `vlm.answer.Answer.confidence`."""
        return confidence(self.logprob, self.tokens)


class AnswerFile:
    """A run's answers as JSON lines: a header that names the run, then one line for each answer.

    A process that is killed loses at most the line it was writing; starting again continues after the last
    whole one.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self.header = path, dict(header)

    def load(self) -> dict[str, Prediction]:
        """The answers that are there already, by id; makes the file if there is none.

        Raises:
            ConfigError: the file holds another run's answers; the first difference is named.
            DataError: a line in the middle cannot be read, or the file cannot be written.
        """
        rows = _json_lines(self._whole_lines(), self.path)
        if not rows:
            self._write([json.dumps({"run": self.header}, sort_keys=True)], "w")
            return {}
        try:
            header = dict(rows[0]["run"])
            done = {row["id"]: Prediction(**row) for row in rows[1:]}
        except (KeyError, TypeError, ValueError):
            raise DataError(f"{self.path} is no file of a run's answers; --restart drops it") from None
        self._same_run(header)
        return done

    def _whole_lines(self) -> str:
        """What the file holds, without a last line that a kill or a full disk cut short; that is dropped."""
        with outputs.writing(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            raw = self.path.read_bytes() if self.path.exists() else b""
            whole = raw[: raw.rfind(b"\n") + 1]
            if len(whole) < len(raw):
                os.truncate(self.path, len(whole))
        try:
            return whole.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{self.path} is not UTF-8 text (byte {error.start}); --restart drops it"
            ) from None

    def _same_run(self, there: Mapping[str, Any]) -> None:
        wanted, found = flat(json.loads(json.dumps(self.header))), flat(there)
        for key in sorted({*wanted, *found}):
            if wanted.get(key) != found.get(key):
                raise ConfigError(
                    f"{self.path} holds the answers of another run ({key} was {str(found.get(key))[:16]}, is "
                    f"{str(wanted.get(key))[:16]}); give another --out, or --restart to drop them"
                )

    def append(self, predictions: Iterable[Prediction]) -> None:
        """Adds answers and sees them on the disk before it returns.

        Raises:
            DataError: they cannot be written; those that are there stay, as `load` drops half a line.
        """
        self._write([json.dumps(asdict(each), ensure_ascii=False) for each in predictions], "a")

    def _write(self, lines: Sequence[str], mode: str) -> None:
        with outputs.writing(self.path, KEPT), self.path.open(mode, encoding="utf-8") as file:
            file.write("".join(f"{line}\n" for line in lines))
            file.flush()
            os.fsync(file.fileno())


def _json_lines(text: str, path: Path) -> list[dict[str, Any]]:
    rows = parse_json_lines(text, path)
    for row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}: each line must hold an object, got {str(row)[:80]}")
    return rows


def read_predictions(path: Path, task: Task, examples: Sequence[Example]) -> list[str]:
    """Anyone's answers to a task, in the order of its examples.

    Taken: the official JSON list of objects (`question_id` and `answer`, `image_id` and `caption`, ...), a
    JSON object id -> answer, either of them under "results", JSON lines of the same objects (a run's own file
    too), a CSV or TSV with such columns or with ids and answers alone, and for `.txt` one answer a line, in
    the order of the examples.

    Raises:
        DataError: unreadable; an id twice, unknown or without answer.
    """
    if path.suffix == ".txt":
        lines = read_text(path).split("\n")
        lines = lines if lines[-1] else lines[:-1]
        if len(lines) != len(examples):
            raise DataError(f"{path} has {len(lines)} lines for {len(examples)} examples of {task.name}")
        return [line.strip() for line in lines]
    rows, numbered = _pairs(path, task)
    if rows and all(id is None for id, _ in rows):  # POPE's results carry no ids: the order tells
        if len(rows) != len(examples):
            raise DataError(f"{path} has {len(rows)} answers for {len(examples)} examples of {task.name}")
        return [text for _, text in rows]
    answers: dict[str, str] = {}
    for id, text in rows:
        if id is None:
            raise DataError(f"{path}: an answer has no {task.id_key!r}, others have: {text[:60]!r}")
        if id in answers:
            raise DataError(f"{path}: the id {id} stands twice")
        answers[id] = text
    _check_ids(answers, path, task, examples)
    found = [answers.get(official_id(example), answers.get(example.id)) for example in examples]
    if missing := [e.id for e, answer in zip(examples, found, strict=True) if answer is None]:
        raise DataError(
            f"{path}: {len(missing)} of {len(examples)} examples have no answer, the first is {missing[0]}"
        )
    said = [answer for answer in found if answer is not None]
    return [_numbered(*pair) for pair in zip(said, examples, strict=True)] if numbered else said


def _check_ids(answers: Iterable[str], path: Path, task: Task, examples: Sequence[Example]) -> None:
    known = {official_id(example) for example in examples} | {example.id for example in examples}
    strange = [id for id in answers if id not in known]
    if strange and not task.surplus:
        raise DataError(f"{path}: {len(strange)} ids are not in {task.name}, the first is {strange[0]}")
    if strange:
        print(
            f"{path}: {len(strange)} answers to other questions than the {len(examples)} that {task.name} "
            f"scores are left out, the first is {strange[0]}",
            file=sys.stderr,
        )


def _numbered(answer: str, example: Example) -> str:
    """The choice that ScienceQA's results name by its number; -1, and any that there is not, is no answer."""
    listed = options(example)
    if not answer.removeprefix("-").isdecimal():
        return answer
    return listed[int(answer)] if answer.isdecimal() and int(answer) < len(listed) else ""


def _pairs(path: Path, task: Task) -> tuple[list[tuple[str | None, str]], bool]:
    """(id, answer) of every entry, and whether numbers among the answers are places of choices."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return [_pair(row, path, task) for row in _csv_rows(path, task)], False
    text = read_text(path)
    if _is_lines(text, path):
        rows = [row for row in _json_lines(text, path) if "run" not in row]
        return [_pair(row, path, task) for row in rows], False
    found = parse_json(text, path)
    if isinstance(found, dict) and "main_metric" in found:
        answers = path.with_name(f"{path.stem}.answers.jsonl")
        raise DataError(f"{path} is a report of vlm eval, no file of answers: give {answers}")
    wrapped = isinstance(found, dict) and isinstance(found.get("results"), dict | list)
    found = found["results"] if wrapped else found
    if isinstance(found, dict):
        places = task.choices and (wrapped or all(isinstance(answer, int) for answer in found.values()))
        return [(id, _said(answer, path, task)) for id, answer in found.items()], places
    if not isinstance(found, list):
        raise DataError(f"{path}: a list of answers or an object of them is expected")
    return [_pair(row, path, task) for row in found], False


def _is_lines(text: str, path: Path) -> bool:
    """Whether each line is an object of its own, whatever the file is called (POPE calls them .json)."""
    lines = [line for line in map(str.strip, text.split("\n")) if line][:2]
    if path.suffix == ".jsonl":
        return bool(lines) and lines[0][0] != "["
    return len(lines) == 2 and all(line[0] == "{" and line[-1] == "}" for line in lines)


def _csv_rows(path: Path, task: Task) -> Sequence[Mapping[str, Any]]:
    """A CSV's or TSV's rows; where its first row names no known column, it is an id and an answer already."""
    head = [cell.strip(' "\r') for cell in read_text(path).partition("\n")[0].split(mark_of(path))]
    bare = len(head) > 1 and not {task.answer_key, *ANSWER_KEYS} & set(head)
    return whole_csv(path, (task.id_key, task.answer_key) if bare else ())


def _pair(row: Any, path: Path, task: Task) -> tuple[str | None, str]:
    if isinstance(row, Mapping):
        id = next((row[key] for key in (task.id_key, *ID_KEYS) if key in row), None)
        said = next((row[key] for key in (task.answer_key, *ANSWER_KEYS) if key in row), None)
        if said is not None:
            return None if id is None else str(id), _said(said, path, task)
    raise DataError(
        f"{path}: entries with {task.id_key!r} and {task.answer_key!r} are expected, got {str(row)[:80]!r}"
    )


def _said(answer: Any, path: Path, task: Task) -> str:
    if isinstance(answer, dict):
        answer = next((answer[key] for key in (task.answer_key, *ANSWER_KEYS) if key in answer), None)
    number = isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer)
    if not isinstance(answer, str) and not number:
        raise DataError(f"{path}: an answer must be text, got {str(answer)[:80]!r}")
    return str(answer)


def write_submission(path: Path, found: Any) -> None:
    """Writes what `export` made: a text as it stands (NLVR's CSV), anything else as JSON."""
    from vlm.eval.report import write_json

    if isinstance(found, str):
        with outputs.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(found, encoding="utf-8")
    else:
        write_json(path, found)


def export(task: Task, examples: Sequence[Example], answers: Sequence[str]) -> Any:
    """The answers in the challenge's results format, a text where that is no JSON: ids are numbers where the
    benchmark's are."""
    if task.submission is not None:
        return task.submission(examples, answers)
    numbers = task.id_key in ("question_id", "image_id")
    return [
        {task.id_key: int(key) if numbers and str(key).isdecimal() else key, task.answer_key: answer}
        for key, answer in zip(map(official_id, examples), answers, strict=True)
    ]
