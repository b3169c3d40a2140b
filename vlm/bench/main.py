"""`vlm bench NAME ...`: one module a measurement, each imported only when it is called."""

from __future__ import annotations

from vlm.cli import Command
from vlm.options import make_parser

BENCHMARKS = {
    "ask": Command("vlm.bench.ask:main", "an answer from nothing, and answers a second of many"),
    "train": Command("vlm.bench.train:main", "training: captions a second beside Idefics and Blip2"),
    "serve": Command("vlm.bench.serve:main", "the server: many users at once against one after another"),
}


def main(argv: list[str]) -> int:
    """Entry of `vlm bench`: the first word names the measurement, which reads the rest itself."""
    if argv and argv[0] in BENCHMARKS:
        return BENCHMARKS[argv[0]].load()(argv[1:])
    names = "; ".join(f"{name}: {benchmark.summary}" for name, benchmark in BENCHMARKS.items())
    parser = make_parser("vlm bench", f"Measure speed and memory. {names}.")
    parser.add_argument("name", choices=BENCHMARKS, help="`vlm bench NAME --help` shows its own options")
    parser.parse_args(argv)
    return 0
