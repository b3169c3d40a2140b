"""`vlm eval score`: anyone's answers, scored by the official rules, without a model or pictures."""

from __future__ import annotations

from pathlib import Path

from vlm.eval import outputs, report, tasks
from vlm.eval.main import add_data
from vlm.eval.predictions import read_predictions
from vlm.options import add_offline, apply_offline, make_parser


def main(argv: list[str]) -> int:
    """Runs `vlm eval score TASK --data DIR --predictions FILE --out REPORT.json`."""
    parser = make_parser("vlm eval score", "Score a file of answers.")
    parser.add_argument("task", help=f"one of {', '.join(tasks.TASKS)}")
    parser.add_argument("--predictions", type=Path, required=True, metavar="FILE", help="the answers")
    add_data(parser)
    add_offline(parser)
    args = parser.parse_args(argv)
    apply_offline(args)
    task = tasks.get(args.task)
    out = args.out or args.predictions.with_suffix(".report.json")
    outputs.check(out, page=True, spare=[args.predictions])
    outputs.check(report.siblings(out, "items"), spare=[args.predictions])
    examples = task.answered(args.data, args.split)
    answers = read_predictions(args.predictions, task, examples)
    scores = task.scores(examples, answers, java=not args.no_java)
    report.write_items(report.siblings(out, "items"), report.items(examples, answers, scores))
    block = {
        "version": report.VERSION,
        "task": task.name,
        "split": task.part_name(args.data, args.split),
        "n": len(examples),
        "comparable": True,
        "main_metric": scores.main,
        **report.scores_block(scores),
        "rates": report.rates(task, examples, answers),
        "controls": {},
        "hashes": {"data": report.data_hash(examples), "scorer": report.scorer_hash()},
        "published": [vars(figure) for figure in task.published],
        "predictions": str(args.predictions),
    }
    report.write_json(out, block)
    if not args.no_html:
        from vlm.eval.page import write_page

        write_page(out)
    from vlm.eval.session import show

    show(block, out)
    return 0
