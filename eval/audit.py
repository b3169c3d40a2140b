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
from vlm.eval.metrics.vqa import (
    agreement,
    evalai,
    evalai_accuracy,
    normalise,
    official,
    punctuation,
    vqa_accuracy,
)
from vlm.eval.predictions import read_predictions
from vlm.eval.task import Task, question
from vlm.options import add_offline, apply_offline, make_parser


@dataclass(frozen=True)
class Protocol:
    """One harness's rule.

    Attributes:
        about: what is particular about it.
        score: answer, example and the task's name -> 0 to 1.
    """

    name: str
    about: str
    score: Callable[[str, Example, str], float]


def _by_equality(answer: str, references: Sequence[str], example: Example) -> float:
    """Leave out every annotation that equals the one left out: the same where annotations carry ids.

    VizWiz's carry only a confidence, so annotators who agree strike each other out.
    """
    if "confidences" not in example.meta:
        return agreement([reference == answer for reference in references])
    rows = list(zip(references, str(example.meta["confidences"]).split("|"), strict=True))
    scores = [min(1.0, sum(other[0] == answer for other in rows if other != row) / 3) for row in rows]
    return sum(scores) / len(scores)


def _official(answer: str, example: Example, task: str) -> float:
    return official(task)(answer, example.answers)


def _normalised(answer: str, example: Example, task: str) -> float:
    return vqa_accuracy(answer, example.answers, strict=False)


def _lmms_eval(answer: str, example: Example, task: str) -> float:
    rule = _normalised if task == LMMS_PLAIN else _llava
    return rule(answer, example, task)


def _open_flamingo(answer: str, example: Example, task: str) -> float:
    first = re.split("Question|Answer|Short", answer, maxsplit=1)[0].split(", ", 1)[0]
    return _by_equality(normalise(first), [normalise(text) for text in example.answers], example)


def _lavis(answer: str, example: Example, task: str) -> float:
    given = list(example.answers)
    if len(set(given)) > 1:
        given = [punctuation(reference) for reference in given]
    return _by_equality(normalise(answer), given, example)


def _llava(answer: str, example: Example, task: str) -> float:
    return evalai_accuracy(answer, example.answers)


LMMS_PLAIN = "vqav2"  # the task that lmms-eval scores without EvalAI's first steps
PROTOCOLS = (
    Protocol("official", "the rule of the benchmark's own code", _official),
    Protocol("normalised", "always normalised, by the VQA challenge's rules", _normalised),
    Protocol("lmms-eval", "always normalised; but for vqav2 as llava", _lmms_eval),
    Protocol(
        "open_flamingo",
        "always normalised, the answer cut at its first comma; equal annotations cancel",
        _open_flamingo,
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
    found = audit(examples, answers, task.name)
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


def audit(examples: Sequence[Example], answers: Sequence[str], task: str = "") -> dict[str, Any]:
    """Mean score of every protocol, and every item on which they disagree, with the reasons.

    Args:
        task: the name of the task that the examples are of: some rules depend on it. Without, those are
            taken that most tasks have.

    Raises:
        ConfigError: the examples have fewer than four references, where the rules say nothing.
    """
    if any(len(example.answers) < 4 for example in examples):
        raise ConfigError("the audit is about VQA accuracy: every question needs at least four references")
    rows = [
        {p.name: 100 * p.score(answer, example, task) for p in PROTOCOLS}
        for answer, example in zip(answers, examples, strict=True)
    ]
    differing = [
        {
            "id": example.id,
            "question": question(example),
            "answer": answer,
            "references": list(example.answers),
            "scores": row,
            "why": reasons(answer, example, row, task),
        }
        for answer, example, row in zip(answers, examples, rows, strict=True)
        if max(row.values()) - min(row.values()) > 1e-9
    ]
    means = {p.name: sum(row[p.name] for row in rows) / len(rows) for p in PROTOCOLS}
    return {"n": len(rows), "scores": means, "differing": differing}


def reasons(answer: str, example: Example, row: dict[str, float], task: str) -> list[str]:
    """Why the protocols disagree about one answer."""
    given = list(example.answers)
    processed = any(evalai(text) != normalise(text) for text in (answer, *given))
    found = _official_reasons(answer, given, task, processed)
    for name, value in row.items():
        if abs(value - row["official"]) < 1e-9 or name in ("official", "normalised"):
            continue
        if name == "open_flamingo" and ", " in answer:
            found.append(f"open_flamingo: the answer is cut to {answer.split(', ', 1)[0]!r}")
        elif name in ("open_flamingo", "lavis") and "confidences" in example.meta:
            found.append(f"{name}: equal annotations without ids cancel each other")
        elif name == "lavis" and len(set(given)) == 1:
            found.append("lavis: the answer is normalised, references that agree are not")
        elif name == "lavis":
            found.append("lavis: references keep case, articles and number words")
        elif processed and (name == "llava" or (name == "lmms-eval" and task != LMMS_PLAIN)):
            found.append(f"{name}: commas, question marks and 's are taken out before the usual rules")
        else:
            found.append(f"{name}: answer and references are normalised, the answer to {normalise(answer)!r}")
    return found


def _official_reasons(answer: str, given: list[str], task: str, processed: bool) -> list[str]:
    """What the benchmark's own rule makes of the answer that `normalised` does not."""
    plain = normalise(answer)
    rule = official(task)
    if rule is evalai_accuracy:
        taken = "official: commas, question marks and 's are taken out before the usual rules"
        return [taken] if processed else []
    if rule is vqa_accuracy:
        apart = len(set(given)) == 1 and normalise(given[0]) == plain and given[0].lower() != answer.lower()
        return [f"official: all say {given[0]!r}, so {answer!r} is compared as it stands"] if apart else []
    left = [text for text in given if normalise(text) == plain and not rule(answer, [text])]
    return [f"official: references stay as they are: {left[0]!r}, not {plain!r}"] if left else []
