"""`vlm eval compare A B`: two reports on the same items, item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np

from vlm.errors import DataError
from vlm.eval import outputs, report, stats
from vlm.eval.corpus import CORPUS_SCORES
from vlm.eval.task import LOWER_IS_BETTER
from vlm.options import add_offline, make_parser

Row = dict[str, Any]
Pair = tuple[Row, Row]  # one item in both reports


def main(argv: list[str]) -> int:
    """Runs `vlm eval compare A.json B.json`."""
    parser = make_parser("vlm eval compare", "Compare two reports of one task, paired by item.")
    parser.add_argument("first", type=Path, metavar="A", help="a report")
    parser.add_argument("second", type=Path, metavar="B", help="another one")
    parser.add_argument(
        "--show", type=int, default=10, metavar="N", help="flipped items to print (default: 10)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="write the comparison")
    add_offline(parser)
    args = parser.parse_args(argv)
    outputs.check(args.out, spare=[args.first, args.second])
    found = compare(args.first, args.second)
    if args.out:
        report.write_json(args.out, found)
    _show(found, args.show)
    return 0


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Differences (B minus A) of every score that both reports hold, with intervals.

    Raises:
        DataError: other tasks, data or items, or a damaged report.
    """
    a, b = report.read_report(first), report.read_report(second)
    for key in ("task", "split"):
        if a[key] != b[key]:
            raise DataError(f"the reports differ in their {key}: {a[key]} and {b[key]}")
    if a["hashes"].get("data") != b["hashes"].get("data"):
        raise DataError("the reports are of different data (questions or references differ)")
    if a["hashes"].get("scorer") != b["hashes"].get("scorer"):
        raise DataError("the reports are of different scorers: score one again with `vlm eval score`")
    # Answers that came from a file were scored without pictures.
    pictures = {one["hashes"].get("pictures") for one in (a, b)} - {None}
    ours, theirs = _items(first), _items(second)
    if ours.keys() != theirs.keys():
        raise DataError("the reports hold different items")
    pairs = [(row, theirs[id]) for id, row in ours.items()]
    metrics, left_out = _differences(a["metrics"], b["metrics"], pairs)
    changed = [(one, two) for one, two in pairs if one["answer"] != two["answer"]]
    return {
        "task": a["task"],
        "split": a["split"],
        "n": len(pairs),
        "metrics": metrics,
        "left_out": left_out,
        "answers_differ": len(changed),
        "near_ties": _near_ties(changed),
        "same_pictures": len(pictures) < 2,
        "flipped": _flipped(pairs, a["main_metric"]),
    }


def _items(path: Path) -> dict[str, Row]:
    """The items beside a report, by id."""
    return {row["id"]: row for row in report.read_items(path, ("question", "references", "answer"))}


def _differences(
    a: Mapping[str, float], b: Mapping[str, float], pairs: Sequence[Pair]
) -> tuple[dict[str, Any], dict[str, str]]:
    """(metric -> its comparison, metric -> why there is none), of all that either report holds."""
    names = dict.fromkeys([*a, *b, *pairs[0][0]["scores"]])
    found: dict[str, Any] = {}
    for each in CORPUS_SCORES:
        if not any(name in a and name in b for name in each.names):
            continue
        references = [one["references"] for one, _ in pairs]
        ours, theirs = (each.counts([pair[n]["answer"] for pair in pairs], references) for n in (0, 1))
        for name, result in zip(each.names, stats.compare_corpus(ours, theirs, each.score), strict=True):
            if name in a and name in b:
                found[name] = _row(a[name], b[name], result)
    left_out = {}
    grouped = all("group" in one for one, _ in pairs)
    groups = [str(one["group"]) for one, _ in pairs] if grouped else []
    for name in names:
        if name in found:
            continue
        scores = [(one["scores"].get(name), two["scores"].get(name)) for one, two in pairs]
        kept = [None not in pair for pair in scores]
        counted = list(compress(scores, kept))
        if (name in a) != (name in b):
            left_out[name] = f"{'B' if name in a else 'A'} has no such score"
        elif not counted:
            left_out[name] = "a figure of the whole set alone" if name in a else "no item counts for it"
        else:
            first, second = zip(*counted, strict=True)
            result = stats.compare(first, second, groups=list(compress(groups, kept)))
            better, worse = len(result.better), len(result.worse)
            turned = name in LOWER_IS_BETTER
            found[name] = _row(float(np.mean(first)), float(np.mean(second)), result) | {
                "better": worse if turned else better,
                "worse": better if turned else worse,
            }
    return {name: found[name] for name in names if name in found}, left_out


def _flipped(pairs: Sequence[Pair], main: str) -> list[dict[str, Any]]:
    """The items whose main score differs, the farthest apart first."""
    found = []
    for one, two in pairs:
        scores = [row["scores"].get(main) for row in (one, two)]
        if None not in scores and scores[0] != scores[1]:
            change = {"a": one["answer"], "b": two["answer"], "scores": scores}
            found.append({key: one[key] for key in ("id", "question", "references")} | change)
    found.sort(key=lambda row: -abs(row["scores"][1] - row["scores"][0]))
    return found


def _row(a: float, b: float, result: stats.Comparison) -> dict[str, Any]:
    return {
        "a": a,
        "b": b,
        "difference": result.difference,
        "interval": list(result.interval),
        "p_value": result.p_value,
    }


def _near_ties(changed: Sequence[Pair]) -> int | None:
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
            f"(95 % {low:+.2f} to {high:+.2f}, p {row['p_value']:.3f})"
            + (f"; {row['better']} better, {row['worse']} worse" if "better" in row else "")
        )
    for name, why in found["left_out"].items():
        print(f"  {name:<20}       -   {why}")
    ties = "near ties are not measured in both" if found["near_ties"] is None else (
        f"{found['near_ties']} of them near ties (the two best within {report.NEAR_TIE:g})"
    )  # fmt: skip
    print(f"  {found['answers_differ']} answers differ" + (f", {ties}" if found["answers_differ"] else ""))
    for row in found["flipped"][:count]:
        before, after = row["scores"]
        print(f"  {row['id']}: {row['question']} [{'; '.join(row['references'][:3])}]")
        print(f"      A {row['a']!r} ({before:.0f})   B {row['b']!r} ({after:.0f})")
