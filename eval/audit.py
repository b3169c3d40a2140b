"""`vlm eval audit`: one file of answers under the rules of several harnesses, and why they differ.

The rules are written from their description; where two harnesses normalise or count differently, the same
answers get scores that are tens of points apart.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm.conversation import Turn
from vlm.data.example import Example
from vlm.errors import ConfigError, DataError
from vlm.eval import outputs, report, tasks
from vlm.eval.main import add_data
from vlm.eval.metrics.vqa import normalise, punctuation, vqa_accuracy
from vlm.eval.predictions import read_predictions
from vlm.eval.task import Task, question
from vlm.options import add_offline, apply_offline, make_parser


@dataclass(frozen=True)
class Protocol:
    """One harness's rule.

    Attributes:
        about: what is particular about it.
        score: answer and example -> 0 to 1.
    """

    name: str
    about: str
    score: Callable[[str, Example], float]


def _agreement(answer: str, references: Sequence[str]) -> float:
    """Leave one out, by position."""
    same = [reference == answer for reference in references]
    return sum(min(1.0, (sum(same) - hit) / 3) for hit in same) / len(same)


def _by_equality(answer: str, references: Sequence[str], example: Example) -> float:
    """Leave out every annotation that equals the one left out: the same where annotations carry ids.

    VizWiz's carry only a confidence, so annotators who agree strike each other out.
    """
    if "confidences" not in example.meta:
        return _agreement(answer, references)
    rows = list(zip(references, str(example.meta["confidences"]).split("|"), strict=True))
    scores = [min(1.0, sum(other[0] == answer for other in rows if other != row) / 3) for row in rows]
    return sum(scores) / len(scores)


def _evalai(text: str) -> str:
    """The EvalAI answer processor: commas, question marks and 's go first, then the usual rules."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return normalise(text)


def _lmms_eval(answer: str, example: Example) -> float:
    said, given = _evalai(answer), list(example.answers)
    if len(set(given)) > 1:
        said, given = normalise(said), [normalise(reference) for reference in given]
    return _by_equality(said, given, example)


def _open_flamingo(answer: str, example: Example) -> float:
    first = re.split("Question|Answer|Short", answer, maxsplit=1)[0].split(", ", 1)[0]
    said, given = normalise(first), list(example.answers)
    if len(set(given)) > 1:
        given = [normalise(reference) for reference in given]
    return _by_equality(said, given, example)


def _lavis(answer: str, example: Example) -> float:
    given = list(example.answers)
    if len(set(given)) > 1:
        given = [punctuation(reference) for reference in given]
    return _by_equality(normalise(answer), given, example)


def _llava(answer: str, example: Example) -> float:
    return _agreement(_evalai(answer), [_evalai(reference) for reference in example.answers])


PROTOCOLS = (
    Protocol(
        "official", "nothing is normalised where references agree", lambda a, e: vqa_accuracy(a, e.answers)
    ),
    Protocol("normalised", "always normalised", lambda a, e: vqa_accuracy(a, e.answers, strict=False)),
    Protocol("lmms-eval", "the answer is always normalised, agreeing references never", _lmms_eval),
    Protocol(
        "open_flamingo", "the answer is cut at its first comma; equal annotations cancel", _open_flamingo
    ),
    Protocol("lavis", "references lose punctuation only: case, articles and numbers stay", _lavis),
    Protocol("llava", "commas, question marks and 's go first, on both sides", _llava),
)


def main(argv: list[str]) -> int:
    """Runs `vlm eval audit FILE` of a run of ours, or `vlm eval audit TASK --data DIR --predictions FILE`."""
    parser = make_parser("vlm eval audit", "Score one file of answers under several harnesses' rules.")
    parser.add_argument(
        "task",
        metavar="FILE|TASK",
        help="report, items or answers of `vlm eval`; or a task with VQA accuracy (vqav2, okvqa, vizwiz, "
        "textvqa, folder-vqa), with --data and --predictions",
    )
    parser.add_argument("--predictions", type=Path, metavar="FILE", help="anyone's answers to the task")
    parser.add_argument(
        "--show", type=int, default=20, metavar="N", help="differing items to print (default: 20)"
    )
    add_data(parser)
    add_offline(parser)
    args = parser.parse_args(argv)
    apply_offline(args)
    outputs.check(args.out, spare=[args.predictions or Path(args.task)])
    if args.predictions is None:
        task, examples, answers = recorded(Path(args.task))
    else:
        task = _with_accuracy(args.task)
        examples = task.answered(args.data, args.split)
        answers = read_predictions(args.predictions, task, examples)
    found = audit(examples, answers)
    if args.out:
        report.write_json(args.out, {"task": task.name, **found})
    for protocol in PROTOCOLS:
        print(f"  {protocol.name:<15}{found['scores'][protocol.name]:7.2f}   {protocol.about}")
    differing = found["differing"]
    print(f"{len(differing)} of {len(examples)} items differ")
    for row in differing[: args.show]:
        scores = ", ".join(f"{name} {value:.0f}" for name, value in row["scores"].items())
        print(f"  {row['id']}: {row['question']} {row['answer']!r}: {scores}")
        for reason in row["why"]:
            print(f"      {reason}")
    return 0


def _with_accuracy(name: str) -> Task:
    task = tasks.get(name)
    if task.captions:
        raise ConfigError(f"the audit is about VQA accuracy; {task.name} has captions")
    return task


def recorded(path: Path) -> tuple[Task, list[Example], list[str]]:
    """Task, examples and answers of a run: its report, or the items or answers (a control's too) beside it.

    The items hold questions and references, so neither the task's data nor its split need be said.

    Raises:
        ConfigError: captions.
        DataError: the file is none of these, or what lies beside it is missing or damaged.
    """
    kind = re.fullmatch(r"(.+)\.(items|answers(?:\.\w+)?)\.jsonl", path.name)
    whole = path.with_name(f"{kind[1]}.json") if kind else path
    try:
        task = _with_accuracy(report.read_report(whole)["task"])
    except DataError as error:
        raise DataError(
            f"{error}; answers without a report want `vlm eval audit TASK --data DIR --predictions FILE`"
        ) from None
    rows = report.read_items(whole, ("key", "question", "references", "answer"))
    examples = [
        Example((), (Turn("user", (row["question"],)),), tuple(row["references"]), row["id"],
                {name: row[name] for name in ("key", "confidences") if name in row})
        for row in rows
    ]  # fmt: skip
    if kind and kind[2] != "items":
        return task, examples, read_predictions(path, task, examples)
    return task, examples, [row["answer"] for row in rows]


def audit(examples: Sequence[Example], answers: Sequence[str]) -> dict[str, Any]:
    """Mean score of every protocol, and every item on which they disagree, with the reasons.

    Raises:
        ConfigError: the examples have fewer than four references, where the rules say nothing.
    """
    if any(len(example.answers) < 4 for example in examples):
        raise ConfigError("the audit is about VQA accuracy: every question needs at least four references")
    rows = [
        {p.name: 100 * p.score(answer, example) for p in PROTOCOLS}
        for answer, example in zip(answers, examples, strict=True)
    ]
    differing = [
        {
            "id": example.id,
            "question": question(example),
            "answer": answer,
            "references": list(example.answers),
            "scores": row,
            "why": reasons(answer, example, row),
        }
        for answer, example, row in zip(answers, examples, rows, strict=True)
        if max(row.values()) - min(row.values()) > 1e-9
    ]
    means = {p.name: sum(row[p.name] for row in rows) / len(rows) for p in PROTOCOLS}
    return {"n": len(rows), "scores": means, "differing": differing}


def reasons(answer: str, example: Example, row: dict[str, float]) -> list[str]:
    """Why the protocols disagree about one answer."""
    found = []
    given = list(example.answers)
    official = row["official"]
    if (
        len(set(given)) == 1
        and normalise(given[0]) == normalise(answer)
        and given[0].lower() != answer.lower()
    ):
        found.append(f"official: all say {given[0]!r}, so {answer!r} is compared as it stands")
    for name, value in row.items():
        if abs(value - official) < 1e-9 or name in ("official", "normalised"):
            continue
        if name == "open_flamingo" and ", " in answer:
            found.append(f"open_flamingo: the answer is cut to {answer.split(', ', 1)[0]!r}")
        elif name in ("lmms-eval", "open_flamingo", "lavis") and "confidences" in example.meta:
            found.append(f"{name}: equal annotations without ids cancel each other")
        elif name == "lavis":
            found.append("lavis: references keep case, articles and number words")
        elif name == "llava" and any(_evalai(text) != normalise(text) for text in (answer, *given)):
            found.append("llava: commas, question marks and 's are taken out before the usual rules")
        elif len(set(given)) == 1:
            found.append(
                f"{name}: the answer is normalised to {normalise(answer)!r} although references agree"
            )
        else:
            found.append(f"{name}: the answer is compared as {_evalai(answer)!r}")
    return found
