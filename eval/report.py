"""The report of a run: one JSON file, the items beside it as JSON lines, and a page for people.

REPORT.json            scores, intervals, controls, hashes, decoding
REPORT.items.jsonl     id, question, references, answer and scores of every item
REPORT.answers.jsonl   the run's raw answers (and REPORT.answers.CONTROL.jsonl)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.conversation import Conversation
from vlm.data.convert.common import parse_json, read_text
from vlm.data.example import Example
from vlm.data.splits import image_key
from vlm.errors import DataError
from vlm.eval import outputs
from vlm.eval.predictions import Prediction
from vlm.eval.task import Scores, Task, official_id, question

VERSION = 1
_FIELDS = {"task": str, "split": str, "main_metric": str, "metrics": dict, "hashes": dict}
NEAR_TIE = 1e-3  # margin, in natural-log probability, below which the last bits of a sum may decide


def siblings(report: Path, kind: str) -> Path:
    """REPORT.json -> REPORT.`kind`.jsonl beside it."""
    return report.with_name(f"{report.stem}.{kind}.jsonl")


def write_json(path: Path, value: Any) -> None:
    """Writes a file whole or not at all; NaN becomes null."""
    partial = path.with_name(f".{path.name}.partial")
    with outputs.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(partial, path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        # 12 digits: sums in another order differ in the last ones, reports should not.
        return None if math.isnan(value) else round(value, 12)
    return value


def scores_block(scores: Scores) -> dict[str, Any]:
    """A report's part about one list of answers; `metrics` is null where there is a reason."""
    return {
        "metrics": None if scores.reason else scores.metrics,
        "reason": scores.reason,
        "intervals": {name: list(ends) for name, ends in scores.intervals.items()},
        "breakdown": scores.breakdown,
        "skipped": scores.skipped,
    }


def rates(
    task: Task, examples: Sequence[Example], answers: Sequence[str], finishes: Sequence[str] = ()
) -> dict[str, float]:
    """Percent of empty answers, of those that cannot be read, and of those that the length limit cut."""
    found = {"empty": 100 * sum(not answer.strip() for answer in answers) / len(answers)}
    if task.unparsed is not None:
        unread = sum(map(task.unparsed, answers, examples))
        found["unparsed"] = 100 * unread / len(answers)
    if finishes:
        found["cut"] = 100 * sum(finish == "length" for finish in finishes) / len(finishes)
    return found


def items(
    examples: Sequence[Example],
    answers: Sequence[str],
    scores: Scores,
    predictions: Sequence[Prediction] = (),
) -> list[dict[str, Any]]:
    """A row for every item, in the examples' order; where the answers are a run's own, with what it was sure
    of."""
    rows = []
    for number, (example, answer) in enumerate(zip(examples, answers, strict=True)):
        row: dict[str, Any] = {
            "id": example.id,
            "key": official_id(example),
            "images": [_spelled(image) for image in example.images if isinstance(image, str | Path)],
            "question": question(example),
            "references": list(example.answers),
            "answer": answer,
            "scores": {name: float(values[number]) for name, values in scores.per_item.items()},
        }
        if scores.groups:  # items of one group are resampled together
            row["group"] = scores.groups[number]
        if "confidences" in example.meta:  # of VizWiz's annotators; other harnesses score by them
            row["confidences"] = example.meta["confidences"]
        if predictions:
            said = predictions[number]
            row |= {"logprob": said.logprob, "confidence": said.confidence, "margin": said.margin}
        rows.append(_plain(row))
    return rows


def _spelled(path: str | Path) -> str:
    """A path; bytes of it that are no UTF-8 are spelled out, as the file of items holds text."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def write_items(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the rows as JSON lines."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    with outputs.writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def ends(rows: Sequence[Mapping[str, Any]], main: str, count: int) -> tuple[list[int], list[int]]:
    """Places of the `count` worst and the `count` best items by a metric, each end first; none is in both."""
    ranked = [n for n, row in enumerate(rows) if row["scores"].get(main) is not None]
    ranked.sort(key=lambda n: (rows[n]["scores"][main], rows[n]["id"]))
    worst = ranked[: min(count, len(ranked) // 2)]
    return worst, ranked[::-1][: min(count, len(ranked) - len(worst))]


def shown(rows: Sequence[Mapping[str, Any]], main: str, count: int) -> dict[str, list[int]]:
    """Title -> places of the items that a page shows: both `ends`, or the first ones where none is scored."""
    worst, best = ends(rows, main, count)
    if not worst and not best:
        return {"The first answers": list(range(min(count, len(rows))))}
    return {f"Worst by {main}": worst, f"Best by {main}": best}


def near_ties(predictions: Sequence[Prediction]) -> int | None:
    """How many answers another batch size or number of processes may change; None where nobody measured."""
    margins = [each.margin for each in predictions if each.margin is not None]
    return sum(margin < NEAR_TIE for margin in margins) if margins else None


def calibration(
    scores: np.ndarray | None, answers: Sequence[Prediction], bins: int = 10
) -> dict[str, Any] | None:
    """Do likely answers score higher? From each answer's probability per token, geometric mean.

    Returns:
        `curve`: equal-sized bins of items from unsure to sure, [confidence, score] in percent; `risk`: the
        mean score of the surest share of items, [share, score] in percent; None where there is no score.
    """
    if scores is None or len(answers) < bins:
        return None
    sure = np.array([answer.confidence for answer in answers])
    kept = ~np.isnan(scores)
    # Rounded: equal questions about equal pictures are equally sure, whatever batch they were answered in.
    sure = np.round(100 * sure[kept], 3)
    order = np.argsort(sure, kind="stable")
    sure, scores = sure[order], scores[kept][order]
    parts = np.array_split(np.arange(len(sure)), bins)
    curve = [[float(sure[part].mean()), float(scores[part].mean())] for part in parts if len(part)]
    shares = [round(len(sure) * share / bins) for share in range(1, bins + 1)]
    _, running = risk_coverage(sure, scores)
    risk = [
        [100.0 * share / bins, float(running[count - 1])] for share, count in enumerate(shares, 1) if count
    ]
    return {name: [[round(x, 1), round(y, 2)] for x, y in rows] for name, rows in
            (("curve", curve), ("risk", risk))}  # fmt: skip


def risk_coverage(sure: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What answering only where the model is sure gives (El-Yaniv and Wiener 2010).

    Args:
        sure, scores: (n,) confidence and score of each item.

    Returns:
        The confidences from the surest on, and at place i the mean score of the i + 1 surest items.
    """
    order = np.argsort(sure, kind="stable")[::-1]
    return sure[order], scores[order].cumsum() / np.arange(1, len(order) + 1)


def read_report(path: Path, *, scored: bool = True) -> dict[str, Any]:
    """A report that `vlm eval` wrote.

    Args:
        scored: False: one of a split whose answers are not published will do.

    Raises:
        DataError: it is missing, not JSON or no report; what it lacks is named.
    """
    try:
        found = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON: {error.msg} (line {error.lineno})") from None
    bare = isinstance(found, dict) and found.get("metrics") is None and found.get("reason")
    if bare and scored:
        raise DataError(f"{path} holds no scores: {found['reason']}")
    for name, kind in _FIELDS.items():
        if bare and name == "metrics":
            continue
        if not isinstance(found, dict) or not isinstance(found.get(name), kind):
            raise DataError(f"{path} is no report of vlm eval: it has no {name!r}")
    if not bare and found["main_metric"] not in found["metrics"]:
        raise DataError(f"{path} is no report of vlm eval: it has no score of {found['main_metric']!r}")
    return found


def read_items(report: Path, needed: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The items beside a report.

    Args:
        needed: what every item must have besides its id and scores.

    Raises:
        DataError: they are missing, a line cannot be read, or an item lacks something.
    """
    path = siblings(report, "items")
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):  # answers may hold other line ends
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        if not isinstance(row, dict) or not isinstance(row.get("scores"), dict) or "id" not in row:
            raise DataError(f"{path}, line {number} is no item of a report: an id and scores are needed")
        if lacking := [name for name in needed if name not in row]:
            raise DataError(f"{path}, line {number}: the item {row['id']} has no {lacking[0]!r}")
        rows.append(row)
    if not rows:
        raise DataError(f"{path} holds no items")
    return rows


def digest(texts: Iterable[str]) -> str:
    """SHA-256 of texts, in order, each ended."""
    total = hashlib.sha256()
    for text in texts:
        total.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return total.hexdigest()


def data_hash(examples: Sequence[Example]) -> str:
    """Of ids, questions and references: what was asked and what counts as right."""
    return digest(
        part for example in examples for part in (example.id, question(example), *example.answers, "")
    )


def picture_hash(examples: Iterable[Example | Conversation]) -> str:
    """Of the pictures' contents, in order: what was looked at. A file is read once.

    Raises:
        DataError: a file cannot be read.
    """
    files: dict[str, str] = {}
    held: dict[int, str] = {}  # by identity: neighbouring rows share one picture's bytes
    found = []
    for example in examples:
        for image in example.images:
            if not isinstance(image, str | Path):
                if id(image) not in held:
                    held[id(image)] = image_key(image)
                found.append(held[id(image)])
                continue
            name = str(image)
            if name not in files:
                files[name] = _file_hash(Path(image))
            found.append(files[name])
        found.append("")
    return digest(found)


def _file_hash(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"the picture {path} cannot be read: {error.strerror or error}") from None


def scorer_hash() -> str:
    """Of the source of everything that turns answers into scores."""
    from vlm.data import lexicon

    here, words = Path(__file__).parent, lexicon.PATH.parent
    files = [here / "scorers.py", here / "stats.py", *sorted((here / "metrics").glob("*.py"))]
    files += [words / f"{name}.{kind}" for name in ("grammar", "lexicon") for kind in ("py", "json")]
    files.append(words / "captions.py")  # these three say what CHAIR counts
    return digest(path.read_text(encoding="utf-8") for path in files)
