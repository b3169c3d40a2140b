"""`vlm bench ask`: how long one answer takes, from nothing, and how many come a second.

Two measurements. `command` runs `vlm ask` itself, a whole process each time, as a person at a terminal
meets it. `many` asks about pictures in batches, of the model as it is loaded and of the same model packed
(`VLM.pack`); the two take turns, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.bench.serve import sample_picture
from vlm.errors import VLMError
from vlm.options import add_common, apply_common, common_words, make_parser, positive

if TYPE_CHECKING:
    from vlm.model import VLM

QUESTION = "What is in the picture?"


def main(argv: list[str]) -> int:
    """Entry of `vlm bench ask`."""
    parser = make_parser("vlm bench ask", "Seconds of one `vlm ask`, and answers a second of many.")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--adapter", default="default", help="a shipped adapter, a folder or a hub id")
    parser.add_argument("--repeats", type=positive, default=3, metavar="N", help="turns of each (default: 3)")
    parser.add_argument(
        "--pictures", type=positive, default=32, metavar="N", help="pictures of many (default: 32)"
    )
    add_common(parser)
    args = parser.parse_args(argv)
    apply_common(args)
    result = {"command": command(args), "many": many(args)}
    print(json.dumps(result, indent=2) if args.json else table(result))
    return 0


def command(args: argparse.Namespace) -> dict[str, Any]:
    """`vlm ask` as a process: its seconds in all, those it tells of, and its highest memory in bytes.

    Raises:
        VLMError: it failed.
    """
    options = ["--adapter", args.adapter, *common_words(args)]
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder, "picture.jpg")
        picture.write_bytes(sample_picture(0))
        words = [sys.executable, "-m", "vlm", "ask", str(picture), QUESTION, "--json", *options]
        turns = []
        for _ in range(args.repeats + 1):
            began = time.perf_counter()
            run = subprocess.run(words, capture_output=True, text=True, check=False)
            if run.returncode:
                raise VLMError(f"vlm ask failed: {run.stderr.strip()}")
            turns.append({"total": time.perf_counter() - began} | json.loads(run.stdout)["seconds"])
    names = turns[0]
    # The first turn reads the files from disk; the others find them in memory.
    seconds = {name: round(statistics.median(turn[name] for turn in turns[1:]), 2) for name in names}
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return {"first": round(turns[0]["total"], 2), "seconds": seconds, "peak_memory": peak}


def many(args: argparse.Namespace) -> dict[str, Any]:
    """Answers a second, pictures encoded anew each time: greedy ones and captions by beams."""
    from vlm.model import VLM

    options = {"device": args.device, "dtype": args.dtype, "offline": args.offline}
    models = {
        "plain": VLM.from_pretrained(args.adapter, **options),
        "packed": VLM.from_pretrained(args.adapter, **options).pack(),
    }
    pictures = [sample_picture(number) for number in range(args.pictures)]
    jobs: dict[str, Callable[[VLM], object]] = {
        "answers": lambda model: model.ask_batch(_asked(pictures), batch_size=32),
        "captions": lambda model: model.caption(pictures, batch_size=32),
    }
    found: dict[str, Any] = {"pictures": args.pictures}
    for job, work in jobs.items():
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for turn in range(args.repeats + 1):
            for name, model in models.items():
                began = time.perf_counter()
                work(model)
                if turn:  # the first is for the memory to be laid out
                    seconds[name].append(time.perf_counter() - began)
        speed = {name: args.pictures / statistics.median(each) for name, each in seconds.items()}
        ratios = [a / b for a, b in zip(seconds["plain"], seconds["packed"], strict=True)]
        found[job] = {name: round(value, 2) for name, value in speed.items()} | {
            "packed / plain": round(statistics.median(ratios), 2)
        }
    return found


def _asked(pictures: list[bytes]) -> list[Any]:
    from vlm.conversation import Conversation

    return [Conversation.ask([picture], QUESTION) for picture in pictures]


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    one, seconds = result["command"], result["command"]["seconds"]
    lines = [
        f"vlm ask: {seconds['total']:.1f} s (load {seconds['load']:.1f}, encode {seconds['encode']:.2f}, "
        f"decode {seconds['decode']:.2f}; {one['first']:.1f} s the first time), peak memory "
        f"{one['peak_memory'] / 1e9:.2f} GB"
    ]
    for job in ("answers", "captions"):
        row = result["many"][job]
        lines.append(
            f"{job} of {result['many']['pictures']} pictures: {row['plain']:.1f} a second, packed "
            f"{row['packed']:.1f} ({row['packed / plain']:.2f} times)"
        )
    return "\n".join(lines)
