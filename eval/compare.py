"""`vlm eval compare A B`: two reports on the same items, item by item."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import DataError
from vlm.eval import outputs, report, stats
from vlm.eval.task import LOWER_IS_BETTER
from vlm.options import make_parser


def main(argv: list[str]) -> int:
    """Runs `vlm eval compare A.json B.json`."""
    parser = make_parser("vlm eval compare", "Compare two reports of one task, paired by item.")
    parser.add_argument("first", type=Path, metavar="A", help="a report")
    parser.add_argument("second", type=Path, metavar="B", help="another one")
    parser.add_argument(
        "--show", type=int, default=10, metavar="N", help="flipped items to print (default: 10)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the comparison")
    args = parser.parse_args(argv)
    outputs.check(args.out, spare=[args.first, args.second])
    found = compare(args.first, args.second)
    if args.out:
        report.write_json(args.out, found)
    _show(found, args.show)
    return 0


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Differences (B minus A) of every item score that both reports hold, with intervals.

    Raises:
        DataError: other tasks, data or items.
    """
    a, b = report.read_report(first), report.read_report(second)
    for key in ("task", "split"):
        if a[key] != b[key]:
            raise DataError(f"the reports differ in their {key}: {a[key]} and {b[key]}")
    if a["hashes"]["data"] != b["hashes"]["data"]:
        raise DataError("the reports are of different data (questions or references differ)")
    if a["hashes"]["scorer"] != b["hashes"]["scorer"]:
        raise DataError("the reports are of different scorers: score one again with `vlm eval score`")
    # Answers that came from a file were scored without pictures.
    pictures = {one["hashes"].get("pictures") for one in (a, b)} - {None}
    ours = {row["id"]: row for row in report.read_items(first)}
    theirs = {row["id"]: row for row in report.read_items(second)}
    if ours.keys() != theirs.keys():
        raise DataError("the reports hold different items")
    metrics: dict[str, Any] = {}
    main = a.get("main_metric", next(iter(a["metrics"])))
    flipped: list[dict[str, Any]] = []
    for name in next(iter(ours.values()))["scores"]:
        ids = [id for id in ours if ours[id]["scores"][name] is not None]
        result = stats.compare(
            [ours[id]["scores"][name] for id in ids], [theirs[id]["scores"][name] for id in ids]
        )
        metrics[name] = {
            "a": float(np.mean([ours[id]["scores"][name] for id in ids])),
            "b": float(np.mean([theirs[id]["scores"][name] for id in ids])),
            "difference": result.difference,
            "interval": list(result.interval),
            "p_value": result.p_value,
            "better": len(result.worse if name in LOWER_IS_BETTER else result.better),
            "worse": len(result.better if name in LOWER_IS_BETTER else result.worse),
        }
        if name == main:
            for n in sorted((*result.better, *result.worse)):
                one, two = ours[ids[n]], theirs[ids[n]]
                change = {
                    "a": one["answer"],
                    "b": two["answer"],
                    "scores": [one["scores"][name], two["scores"][name]],
                }
                flipped.append({k: one[k] for k in ("id", "question", "references")} | change)
    flipped.sort(key=lambda row: -abs(row["scores"][1] - row["scores"][0]))
    changed = [(row, theirs[id]) for id, row in ours.items() if row["answer"] != theirs[id]["answer"]]
    return {
        "task": a["task"],
        "split": a["split"],
        "n": len(ours),
        "metrics": metrics,
        "answers_differ": len(changed),
        "near_ties": _near_ties(changed),
        "same_pictures": len(pictures) < 2,
        "flipped": flipped,
    }


def _near_ties(changed: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> int | None:
    """How many differing answers were near ties in either run; None where a report holds no margins."""
    near = 0
    for pair in changed:
        margins = [row["margin"] for row in pair if row.get("margin") is not None]
        if len(margins) < len(pair):
            return None
        near += min(margins) < report.NEAR_TIE
    return near


def _show(found: dict[str, Any], count: int) -> None:
    print(f"{found['task']}, {found['split']}, {found['n']} items, B minus A")
    if not found["same_pictures"]:
        print("  the pictures differ: the same questions were asked about other picture files")
    for name, row in found["metrics"].items():
        low, high = row["interval"]
        print(
            f"  {name:<20} {row['a']:7.2f} -> {row['b']:7.2f}   {row['difference']:+.2f} "
            f"(95 % {low:+.2f} to {high:+.2f}, p {row['p_value']:.3f}); "
            f"{row['better']} better, {row['worse']} worse"
        )
    ties = "near ties are not measured in both" if found["near_ties"] is None else (
        f"{found['near_ties']} of them near ties (the two best within {report.NEAR_TIE:g})"
    )  # fmt: skip
    print(f"  {found['answers_differ']} answers differ" + (f", {ties}" if found["answers_differ"] else ""))
    for row in found["flipped"][:count]:
        before, after = row["scores"]
        print(f"  {row['id']}: {row['question']} [{'; '.join(row['references'][:3])}]")
        print(f"      A {row['a']!r} ({before:.0f})   B {row['b']!r} ({after:.0f})")
