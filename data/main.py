"""`vlm data`: convert public sets, check any source, make questions from captions, remember pictures.

vlm data check FOLDER
vlm data convert flickr8k SRC DST
vlm data questions SRC DST
vlm data remember SRC MEMORY
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlm.data.check import CheckReport, PartReport, Progress
from vlm.data.convert.write import ABOUT, write_dataset
from vlm.data.example import Example
from vlm.data.questions import QUESTION_TYPES, digest, questions_from_captions
from vlm.data.readers import BAD_SHARE, PUBLIC, read_source
from vlm.data.sources import DATASETS, canonical_name, find_root
from vlm.errors import DataError, NoPartError, UsageError
from vlm.options import (
    add_common,
    add_offline,
    apply_common,
    apply_offline,
    keep_memory,
    make_parser,
)

SHOWN = 10
# Sets without a dev part of their own: theirs is set aside from the training part by picture.
NO_DEV = ("daquar", "easy-vqa")


def _progress() -> Progress | None:
    if not sys.stderr.isatty():
        return None

    def show(what: str, done: int, total: int) -> None:
        if done % 50 == 0 or done == total:
            end = "\n" if done == total else ""
            print(f"\r{what}: {done}/{total}", end=end, file=sys.stderr, flush=True)

    return show


def _part_lines(part: PartReport) -> list[str]:
    if part.problem is not None:
        return [f"{part.name}: cannot be read: {part.problem}"]
    lines = [
        f"{part.name}: {part.examples} examples, {part.pictures} pictures, {len(part.bad)} unusable rows"
    ]
    if part.bad:
        lines += [f"  {count} x {cause}" for cause, count in part.causes.most_common()]
        lines += [f"    {row}" for row in part.bad[:SHOWN]]
        if len(part.bad) > SHOWN:
            lines.append(f"    ... and {len(part.bad) - SHOWN} more (--json names them all)")
        if part.bad_share > BAD_SHARE:
            lines.append(
                f"  {part.bad_share:.1%} of the rows: more than {BAD_SHARE:.0%}, training would not start"
            )
    if part.sizes:
        common = ", ".join(f"{size} ({count})" for size, count in part.sizes.most_common(3))
        lines.append(f"  sizes: {common}" + (", ..." if len(part.sizes) > 3 else ""))
    return lines + part.lines()


def _print_report(report: CheckReport) -> None:
    for part in report.parts:
        print("\n".join(_part_lines(part)))
    if report.leaks:
        print(f"LEAK: {len(report.leaks)} held-out pictures look like training pictures:")
        for held, train in report.leaks[:SHOWN]:
            print(f"  {held} = {train}")
    print("fine" if report.ok else "not fine")


def _check(args: argparse.Namespace) -> int:
    apply_offline(args)
    from vlm.data.check import check_source
    from vlm.data.show import masked_sample, plain_sample

    report = check_source(args.source, args.against, _progress())
    if args.json:
        print(json.dumps(report.to_json(), indent=1, ensure_ascii=False))
        return 0 if report.ok else 1
    samples = [example for part in report.parts for example in part.samples][: args.samples]
    show: Callable[[Example], str] = plain_sample
    if args.adapter and samples:
        from vlm.model import VLM

        apply_common(args)
        model = VLM.from_pretrained(args.adapter, offline=args.offline, device=args.device, dtype=args.dtype)
        show = lambda example: masked_sample(model, example)  # noqa: E731
    _print_report(report)
    for number, example in enumerate(samples, start=1):
        print(f"\nsample {number} ({example.id}):\n{show(example)}")
    return 0 if report.ok else 1


def _parts(read: Callable[[str], list[Example]], splits: tuple[str, ...]) -> dict[str, list[Example]]:
    """The parts that are there; `train-rest` is called train in what is written.

    Raises:
        DataError: a part is there and cannot be read, or there is none.
    """
    found: dict[str, list[Example]] = {}
    absent: DataError | None = None
    for split in splits:
        name = split.removesuffix("-rest")
        try:
            found[name] = read(split)
        except NoPartError as error:
            absent = absent or error
            print(f"skipped {name}: {error}", file=sys.stderr)
        except DataError as error:
            raise DataError(f"the {name} part cannot be read, so nothing is written: {error}") from error
    if not found:
        raise absent or DataError("nothing to convert")
    return found


def _print_sizes(sizes: dict[str, dict[str, int]], folder: Path) -> None:
    for name, size in sizes.items():
        print(f"{folder}: {name}: {size['pictures']} pictures, {size['examples']} examples")


def _convert(args: argparse.Namespace) -> int:
    name = canonical_name(args.name)
    if name not in PUBLIC:
        raise UsageError(f"unknown data set {args.name!r}; use one of {', '.join(DATASETS)}")
    packaged = args.source == "package"
    root = find_root(name, None if packaged else Path(args.source).expanduser())
    splits = ("train-rest", "dev", "test") if name in NO_DEV else ("train", "dev", "test")
    note = ""
    if name in NO_DEV:
        note = "The validation part is set aside from the official training part, by picture."
    parts = _parts(lambda split: PUBLIC[name][1](root, split, True), splits)
    about = {"name": name, **ABOUT[name], **({"dev_from": "train"} if name in NO_DEV else {})}
    _print_sizes(write_dataset(parts, Path(args.destination), about, note=note), Path(args.destination))
    return 0


def _questions(args: argparse.Namespace) -> int:
    read = read_source(args.source, divide=False)
    splits = ("train", "dev", "test") if read.has_part else ("train",)
    parts = _parts(lambda split: read_source(args.source, split, divide=False).checked(), splits)
    made = {}
    for name, examples in parts.items():
        captions = [example for example in examples if example.meta.get("task") == "caption"]
        if not captions:
            raise DataError(f"the {name} part of {args.source} holds no captions to make questions from")
        asked = questions_from_captions(captions, seed=args.seed)
        made[name] = [one for one in asked if one.meta["question_type"] in args.types]
    if not any(made.values()):
        raise DataError(
            f"no question can be made from {args.source} ({', '.join(args.types)}): that takes several "
            "captions a picture which agree"
        )
    origin = Path(args.source).name
    typed = f" --types {' '.join(args.types)}" if set(args.types) < set(QUESTION_TYPES) else ""
    about = {
        "name": f"{origin}-questions",
        "title": f"Questions from the captions of {origin}",
        "source": f"made from the captions of {origin} by `vlm data questions --seed {args.seed}{typed}`",
        "terms": "those of the captions and pictures",
    }
    sizes = write_dataset(made, Path(args.destination), about)
    _print_sizes(sizes, Path(args.destination))
    for name, examples in made.items():
        print(f"{name}: sha256 {digest(examples)}")
    return 0


def _remember(args: argparse.Namespace) -> int:
    apply_common(args)
    keep_memory()
    from vlm.data.remember import adapter_features, remember
    from vlm.weights_cache import cache_root

    cache = args.feature_cache or cache_root() / "features"
    features = adapter_features(args.adapter, offline=args.offline, device=args.device, cache=cache)
    done = remember(
        args.source, args.memory, features, split=args.split, count=args.count, least=args.least,
        progress=_progress(),
    )  # fmt: skip
    for problem in done.bad:
        print(f"error: {problem}", file=sys.stderr)
    captions = sum(map(len, done.memory.captions.values()))
    print(f"{args.memory}: {len(done.memory)} pictures ({done.new} of them new), {captions} captions")
    return 1 if done.bad else 0


def _remember_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "remember", allow_abbrev=False, help="captioned pictures -> a memory for --memory, without training"
    )
    parser.add_argument("source", help="a captioned source, as for check")
    parser.add_argument("memory", type=Path, metavar="MEMORY", help="a folder; what it holds is added to")
    parser.add_argument("--split", default="train", help="part of the source (default: train), or train+dev")
    parser.add_argument(
        "--adapter", default="default", metavar="ID|DIR", help="whose encoder sees the pictures"
    )
    parser.add_argument("--count", type=int, metavar="N", help="pictures that are told of (default: 3)")
    parser.add_argument("--least", type=float, metavar="X", help="least cosine of those (default: 0.65)")
    parser.add_argument("--feature-cache", type=Path, metavar="DIR", help="default: the one of training")
    add_common(parser)
    parser.set_defaults(run=_remember)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("vlm data", "Convert, check, question and remember data sets.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check", allow_abbrev=False, help="decode everything, count problems, find duplicates and leaks"
    )
    check.add_argument("source", help="a folder, table file, Parquet or tar file, or hub id (owner/name)")
    check.add_argument(
        "--against", action="append", default=[], metavar="SOURCE[:SPLIT]",
        help="also look for training pictures in this held-out source (repeatable)",
    )  # fmt: skip
    check.add_argument("--samples", type=int, default=3, metavar="N", help="samples to print (default: 3)")
    check.add_argument(
        "--adapter", metavar="NAME", help="print the samples as this adapter's model sees them"
    )
    add_common(check)
    check.add_argument("--json", action="store_true", help="the whole report for programs")
    check.set_defaults(run=_check)
    convert = commands.add_parser(
        "convert", allow_abbrev=False, help="a public set's download -> image folders that `datasets` reads"
    )
    convert.add_argument("name", help=", ".join(DATASETS))
    convert.add_argument("source", help="the download's folder (easy-vqa: `package` for the installed one)")
    convert.add_argument("destination", help="a new folder")
    add_offline(convert)
    convert.set_defaults(run=_convert)
    questions = commands.add_parser(
        "questions", allow_abbrev=False, help="captions -> questions with short answers"
    )
    questions.add_argument("source", help="a captioned source, as for check")
    questions.add_argument("destination", help="a new folder")
    questions.add_argument(
        "--seed", type=int, default=0, help="chooses among the possible questions (default: 0)"
    )
    questions.add_argument(
        "--types", nargs="+", default=QUESTION_TYPES, choices=QUESTION_TYPES, metavar="TYPE",
        help=f"only these: {', '.join(QUESTION_TYPES)}",
    )  # fmt: skip
    add_offline(questions)
    questions.set_defaults(run=_questions)
    _remember_parser(commands)
    return parser


def main(argv: list[str]) -> int:
    """Run `vlm data`; returns the exit code: 1 where a check found something that stops training."""
    args = _parser().parse_args(argv)
    code: int = args.run(args)
    return code
