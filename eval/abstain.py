"""`vlm eval calibrate`: below which confidence an adapter had better say that it cannot tell.

vlm eval daquar --data DIR --adapter runs/daquar --out runs/daquar.json
vlm eval calibrate runs/daquar.json --target 0.8
vlm ask room.jpg "What is on the table?" --adapter runs/daquar --abstain
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from vlm.config import AbstainConfig
from vlm.errors import DataError
from vlm.eval import contamination, report, tasks
from vlm.options import add_offline, make_parser

LEAST = 20
"""Answers that must be left: the accuracy of fewer says little of the next hundred."""


def main(argv: list[str]) -> int:
    """Runs `vlm eval calibrate REPORT.json --target ACCURACY`."""
    parser = make_parser(
        "vlm eval calibrate", "Fit the confidence below which `vlm ask --abstain` gives no answer."
    )
    parser.add_argument("report", type=Path, metavar="REPORT.json", help="of `vlm eval` with this adapter")
    parser.add_argument(
        "--target", type=_share, required=True, metavar="X", help="accuracy of the answers given, 0 to 1"
    )
    parser.add_argument("--adapter", metavar="ID|DIR", help="where it is written (default: the report's)")
    add_offline(parser)
    args = parser.parse_args(argv)
    from vlm.checkpoint import adapter_folder, save_abstain

    block = report.read_report(args.report)
    fitted = fit(block, report.read_items(args.report), args.target)
    folder = adapter_folder(args.adapter or block["adapter"], offline=args.offline)
    require_same_adapter(block, folder)
    save_abstain(folder, fitted)
    print(
        f"{folder}: answers of confidence {fitted.threshold:.3f} and more; on {fitted.task}, {fitted.split}, "
        f"that is {fitted.coverage:.1%} of the questions, {fitted.accuracy:.1%} right (all: "
        f"{block['metrics'][block['main_metric']]:.1f} %)"
    )
    if said := contamination.warning(block.get("guide")):
        print(f"of new pictures less will be right: {said}")
    return 0


def fit(block: dict[str, Any], rows: list[dict[str, Any]], target: float) -> AbstainConfig:
    """The least confidence at which the answers given are as right as asked for on a report's items.

    Raises:
        DataError: answers that were not written freely, a task without right and wrong answers, or a target
            that no threshold reaches.
    """
    if tasks.get(block["task"]).captions:
        raise DataError(f"{block['task']} scores captions, which are not simply right or wrong")
    if (block.get("decoding") or {}).get("choices") == "likelihood":
        raise DataError("the report's answers were chosen by likelihood: evaluate with --choices generation")
    if any("confidence" not in row for row in rows):
        raise DataError("the report's items hold no confidence: evaluate again")
    main = block["main_metric"]
    scored = [(row["confidence"], row["scores"][main]) for row in rows if row["scores"][main] is not None]
    if len(scored) < LEAST:
        raise DataError(f"{len(scored)} scored items are too few: at least {LEAST} are needed")
    sure, running = report.risk_coverage(*np.array(scored, dtype=float).T)
    # A threshold cannot tell equals apart: only where the next answer is less sure may it lie.
    last = [n for n in range(LEAST - 1, len(sure)) if n == len(sure) - 1 or sure[n + 1] < sure[n]]
    reached = [n for n in last if running[n] >= 100 * target]
    if not reached:
        best = max(last, key=lambda n: float(running[n]))
        raise DataError(
            f"no threshold gives {target:.0%} right answers on {block['task']}: the most is "
            f"{running[best]:.1f} %, of the surest {best + 1} of {len(sure)}"
        )
    kept = max(reached)
    # Half-way to the first answer that is left out, so that the last bits of a sum decide nothing.
    threshold = 0.0 if kept == len(sure) - 1 else float(sure[kept] + sure[kept + 1]) / 2
    return AbstainConfig(
        threshold=round(threshold, 6),
        task=block["task"],
        split=block["split"],
        target=target,
        accuracy=round(float(running[kept]) / 100, 6),
        coverage=round((kept + 1) / len(sure), 6),
    )


def require_same_adapter(block: dict[str, Any], folder: Path) -> None:
    """Raises:
    DataError: the report is of another adapter than the folder's.
    """
    from vlm.adapter_file import read_adapter

    digest = read_adapter(folder).sha256
    if block["hashes"].get("adapter") != digest:
        raise DataError(f"the report is of another adapter than {folder}: evaluate that one, or name another")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share above 0 and up to 1")
    return value
