"""`vlm eval`: a benchmark from the command line.

vlm eval flickr8k --data DIR --out runs/flickr8k.json
vlm eval --list
vlm eval score vqav2 --data DIR --predictions FILE --out REPORT.json
vlm eval compare A.json B.json
vlm eval audit REPORT.json
vlm eval audit vqav2 --data DIR --predictions FILE
vlm eval calibrate REPORT.json --target 0.8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from vlm.eval import tasks
from vlm.options import add_common, make_parser, positive

BEFORE = {"score": "vlm.eval.offline", "audit": "vlm.eval.audit", "compare": "vlm.eval.compare",
          "calibrate": "vlm.eval.abstain"}  # fmt: skip


def main(argv: list[str]) -> int:
    """Runs one of the eval commands; returns its exit code."""
    if argv and argv[0] in BEFORE:
        import importlib

        command: Callable[[list[str]], int] = importlib.import_module(BEFORE[argv[0]]).main
        return command(argv[1:])
    if "--list" in argv:
        show_list()
        return 0
    parser = _parser()
    args = parser.parse_args(argv)
    if not args.shots and (args.shot_labels, args.shot_choice) != ("true", "random"):
        parser.error("--shot-labels and --shot-choice are about shots: say --shots K")
    from vlm.eval.session import run

    return run(args)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("vlm eval", "Score a model on a benchmark, with its controls.")
    parser.add_argument("task", help=f"one of {', '.join(tasks.TASKS)}; or score, compare, audit, calibrate")
    parser.add_argument(
        "--list", action="store_true", help="show every task with chance and published figures"
    )
    add_data(parser)
    parser.add_argument(
        "--adapter", default="default", help="adapter id or folder (default: the one shipped)"
    )
    parser.add_argument("--controls", choices=("all", "none"), default="all", help="default: all")
    parser.add_argument("--limit", type=positive, metavar="N", help="only N examples: not comparable")
    parser.add_argument("--shots", type=count, default=0, metavar="K", help="K solved examples before each")
    parser.add_argument(
        "--shot-labels", choices=("true", "random"), default="true", help="answers of the shots"
    )
    parser.add_argument("--shot-choice", choices=("random", "nearest"), default="random", help="which shots")
    parser.add_argument("--choices", choices=("likelihood", "generation"), default="likelihood",
                        help="how multiple choice is answered (default: likelihood)")  # fmt: skip
    parser.add_argument(
        "--beams", type=positive, metavar="N", help="beams of beam search (default: the task's)"
    )
    parser.add_argument("--max-new-tokens", type=positive, metavar="N", help="longest answer")
    parser.add_argument("--batch-size", type=positive, default=32, metavar="N", help="default: 32")
    parser.add_argument("--feature-cache", type=Path, metavar="DIR", help="default: the one of training")
    parser.add_argument(
        "--memory", type=Path, metavar="DIR", help="remembered pictures (a picture never recalls itself)"
    )
    parser.add_argument(
        "--restart", action="store_true", help="drop the answers of an earlier run of this --out"
    )
    parser.add_argument(
        "--submission",
        type=Path,
        metavar="FILE",
        help="the answers as the challenge wants them (of a split without published answers: always, "
        "by default beside the report)",
    )
    parser.add_argument(
        "--maps",
        type=count,
        default=0,
        metavar="N",
        help="draw where the model looked on the page's N best and N worst items",
    )
    parser.add_argument("--train-data", type=Path, metavar="DIR", help="training pictures: report overlap")
    parser.add_argument(
        "--allow-different-frozen", action="store_true", help="other frozen weights: warn, go on"
    )
    add_common(parser)
    return parser


def add_data(parser: argparse.ArgumentParser) -> None:
    """The options that every command about a task shares."""
    where = "the data set as downloaded: its folder, Parquet files, or an id of the hub"
    parser.add_argument("--data", type=Path, metavar="DIR", help=where)
    parser.add_argument("--split", help="default: the task's own")
    parser.add_argument("--out", type=Path, metavar="REPORT.json", help="where the report goes")
    parser.add_argument("--no-java", action="store_true", help="leave METEOR and SPICE out")
    parser.add_argument("--no-html", action="store_true", help="write no page beside the report")


def count(text: str) -> int:
    """A whole number of at least 0, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def show_list() -> None:
    """Prints every task: splits, main metric, chance, published figures with sources.

    Chance is a function of the examples; without data its rule stands here, the report has the number.
    """
    from rich.console import Console
    from rich.table import Table

    from vlm.eval.scorers import choice_chance, half, uniform_chance

    rules: dict[object, str] = {
        half: "50",
        choice_chance: "100 / own choices",
        uniform_chance: "100 / all answers",
    }
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in (
        "task",
        "what",
        "splits (default first; * not scored)",
        "main metric",
        "chance, %",
        "published",
    ):
        table.add_column(column, overflow="fold")
    for name in tasks.TASKS:
        task = tasks.get(name)
        splits = [task.split, *(split for split in task.splits if split != task.split)]
        splits = [f"{split}*" if split in task.hidden else split for split in splits]
        figures = "\n".join(f"{p.metric} {p.value:g} ({p.source})" for p in task.published)
        chance = rules.get(task.chance, "-")
        table.add_row(name, task.about, ", ".join(splits), task.main, chance, figures or "-")
    Console(width=None if sys.stdout.isatty() else 160).print(table)
