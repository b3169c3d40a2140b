"""`vlm ask`, `vlm chat` and `vlm caption`."""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm.config import CAPTION_PROMPT
from vlm.errors import VLMError
from vlm.options import add_common, apply_common, make_parser

if TYPE_CHECKING:
    from vlm.answer import Answer
    from vlm.model import VLM

FOLDER_BATCH = 32
"""Pictures of a folder that are asked about between two lines of progress."""


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = make_parser(prog, description)
    parser.add_argument(
        "--adapter", default="default", metavar="ID|DIR", help="a shipped adapter or a folder"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=64, metavar="N", help="longest answer (default: 64)"
    )
    parser.add_argument("--beams", type=int, default=None, metavar="N", help="beams of beam search")
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 (default) always takes the likeliest word"
    )
    parser.add_argument("--seed", type=int, default=None, help="makes a sampled answer repeatable")
    parser.add_argument(
        "--feature-cache", type=Path, default=None, metavar="DIR", help="keep the pictures' features here"
    )
    parser.add_argument(
        "--allow-different-frozen", action="store_true", help="go on when the frozen weights are others"
    )
    add_common(parser)
    return parser


def _load(args: argparse.Namespace) -> tuple[VLM, float]:
    """The model, and the seconds it took to import and load."""
    began = time.perf_counter()
    apply_common(args)
    from vlm.model import VLM

    model = VLM.from_pretrained(
        args.adapter,
        device=args.device,
        dtype=args.dtype,
        offline=args.offline,
        allow_different_frozen=args.allow_different_frozen,
        feature_cache=args.feature_cache,
    )
    return model, time.perf_counter() - began


def _generation(args: argparse.Namespace) -> dict[str, Any]:
    options: dict[str, Any] = {
        "max_new_tokens": args.max_tokens,
        "temperature": args.temperature,
        "seed": args.seed,
    }
    if args.beams is not None:
        options["num_beams"] = args.beams
    return options


def ask_main(argv: Sequence[str]) -> int:
    """`vlm ask IMAGE [IMAGE ...] "QUESTION"`, or a folder, one question and --out FILE.csv."""
    parser = _parser("vlm ask", "Answer a question about one or more pictures.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="pictures, or one folder with --out")
    parser.add_argument("question", metavar="QUESTION", help="the question, in quotes")
    parser.add_argument(
        "--out", type=Path, default=None, metavar="FILE.csv", help="ask it of every picture of a folder"
    )
    parser.add_argument("--json", action="store_true", help="print the answer with its usage and times")
    args = parser.parse_args(argv)
    folders = [image for image in args.images if Path(image).is_dir()]
    if folders and (len(args.images) > 1 or args.out is None):
        parser.error("a folder goes alone, with --out FILE.csv for the answers")
    if args.out is not None:
        return _ask_each(args, pictures_in(args.images), args.question, ("image", "question", "answer"))
    check_pictures(args.images)
    model, loaded = _load(args)
    answer = model.ask(args.images, args.question, **_generation(args))
    print(json.dumps(answer_json(answer, loaded)) if args.json else answer.text)
    return 0


def caption_main(argv: Sequence[str]) -> int:
    """`vlm caption IMAGE|DIR ...`: a line (a JSON object with --json) for each picture."""
    parser = _parser("vlm caption", "Describe pictures.")
    parser.add_argument("images", nargs="+", metavar="IMAGE|DIR", help="pictures and folders of pictures")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE.csv", help="write image,caption rows")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = parser.parse_args(argv)
    pictures = pictures_in(args.images)
    if args.out is not None:
        return _ask_each(args, pictures, CAPTION_PROMPT, ("image", "caption"))
    check_pictures(pictures)
    model, loaded = _load(args)
    for begin in range(0, len(pictures), FOLDER_BATCH):
        part = pictures[begin : begin + FOLDER_BATCH]
        for picture, answer in zip(part, model.caption(part, **_generation(args)), strict=True):
            if args.json:
                print(json.dumps({"image": str(picture), **answer_json(answer, loaded)}), flush=True)
            else:
                print(f"{picture}\t{answer.text}" if len(pictures) > 1 else answer.text, flush=True)
    return 0


def chat_main(argv: Sequence[str]) -> int:
    """`vlm chat IMAGE ...`: questions from the keyboard, answers as they are decoded."""
    parser = _parser("vlm chat", "Talk about pictures; /show FILE adds one, an empty line or Ctrl-D ends.")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="pictures to begin with")
    args = parser.parse_args(argv)
    if args.beams not in (None, 1):
        parser.error("a chat is streamed, and beams cannot be")
    check_pictures(args.images)
    model, _ = _load(args)
    chat = model.chat(args.images)
    terminal = sys.stdin.isatty()
    while True:
        try:
            line = input("you: " if terminal else "").strip()
        except EOFError:
            return 0
        if not line:
            return 0
        try:
            if line.startswith("/show "):
                picture = line.removeprefix("/show ").strip()
                check_pictures([picture])
                chat.show(picture)
                continue
            for piece in chat.stream(line, **_generation(args)):
                print(piece, end="", flush=True)
            print(flush=True)
        except VLMError as problem:
            # A mistyped file name must not end the conversation.
            print(f"error: {problem}", file=sys.stderr)


def answer_json(answer: Answer, loaded: float) -> dict[str, Any]:
    """What `--json` prints of an answer."""
    return {
        "answer": answer.text,
        "finish_reason": answer.finish_reason,
        "usage": {
            "prompt_tokens": answer.usage.prompt_tokens,
            "completion_tokens": answer.usage.completion_tokens,
            "total_tokens": answer.usage.total_tokens,
            "images": answer.usage.images,
        },
        "seconds": {"load": round(loaded, 3), **{k: round(v, 3) for k, v in answer.seconds.items()}},
        "logprob": round(answer.logprob, 4),
        "adapter": answer.adapter,
    }


def pictures_in(arguments: Sequence[str]) -> list[Path]:
    """The pictures named and those in the folders named.

    Raises:
        VLMError: a folder without pictures.
    """
    from vlm.images import list_pictures

    found: list[Path] = []
    for argument in arguments:
        path = Path(argument)
        if not path.is_dir():
            found.append(path)
            continue
        inside = list_pictures(path)
        if not inside:
            raise VLMError(f"{path} holds no JPEG, PNG, WebP or GIF files")
        found += inside
    return found


def check_pictures(pictures: Sequence[str | Path]) -> None:
    """Opens every picture, so that a bad one is told of before seconds are spent on loading the model."""
    from vlm.images import open_picture

    for picture in pictures:
        open_picture(picture)


def _ask_each(args: argparse.Namespace, pictures: list[Path], question: str, columns: tuple[str, ...]) -> int:
    """One row a picture; a picture that cannot be read is named, counted and left out of the file."""
    from vlm.images import ImageError, open_picture

    if not args.out.parent.is_dir():
        raise VLMError(f"{args.out.parent} is no folder: make it first")
    model, _ = _load(args)
    ask = (
        model.caption
        if len(columns) == 2
        else lambda part, **g: model.ask_batch([_conversation(picture, question) for picture in part], **g)
    )
    bad = 0
    with open(args.out, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        for begin in range(0, len(pictures), FOLDER_BATCH):
            good = []
            for picture in pictures[begin : begin + FOLDER_BATCH]:
                try:
                    open_picture(picture)
                    good.append(picture)
                except ImageError as problem:
                    bad += 1
                    print(f"error: {problem}", file=sys.stderr)
            for picture, answer in zip(good, ask(good, **_generation(args)), strict=True):
                middle = (question,) if len(columns) == 3 else ()
                rows.writerow((picture, *middle, answer.text))
            file.flush()
            done = min(begin + FOLDER_BATCH, len(pictures))
            print(f"{done} of {len(pictures)} pictures", file=sys.stderr)
    if bad:
        print(
            f"{bad} of {len(pictures)} pictures could not be read and are not in {args.out}", file=sys.stderr
        )
    return 1 if bad else 0


def _conversation(picture: Path, question: str) -> Any:
    from vlm.conversation import Conversation

    return Conversation.ask([picture], question)
