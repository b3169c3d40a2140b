"""`vlm ask`, `vlm chat` and `vlm caption`."""

from __future__ import annotations

import argparse
import atexit
import csv
import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vlm.config import CAPTION_PROMPT, GenerationConfig, from_dict
from vlm.conversation import Conversation
from vlm.errors import ConfigError, VLMError
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
        "--memory", type=Path, default=None, metavar="DIR", help="tell of remembered pictures like these"
    )
    parser.add_argument(
        "--allow-different-frozen", action="store_true", help="go on when the frozen weights are others"
    )
    parser.set_defaults(abstain=False)
    add_common(parser)
    return parser


def _load(args: argparse.Namespace) -> tuple[VLM, float]:
    """The model, and the seconds it took to import and load."""
    began = time.perf_counter()
    # What the imports make stays to the end: to look through it for garbage again and again, while it
    # grows, takes two of eight seconds.
    gc.disable()
    atexit.register(gc.freeze)  # nor is it looked through at the very end, which takes another
    try:
        apply_common(args)
        from vlm.model import VLM

        model = VLM.from_pretrained(
            args.adapter,
            device=args.device,
            dtype=args.dtype,
            offline=args.offline,
            allow_different_frozen=args.allow_different_frozen,
            feature_cache=args.feature_cache,
            memory=args.memory,
        )
    finally:
        gc.enable()
    return model, time.perf_counter() - began


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; a wrong number ends here, before seconds are spent on loading the model."""
    args = parser.parse_intermixed_args(argv)
    try:
        from_dict(GenerationConfig, _generation(args))
    except ConfigError as problem:
        parser.error(str(problem).replace("max_new_tokens", "--max-tokens").replace("num_beams", "--beams"))
    return args


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
    parser.add_argument(
        "--abstain", action="store_true", help="say that one can't tell rather than an unsure answer"
    )
    args = _parse(parser, argv)
    if not args.question.strip():
        parser.error("the question is empty")
    _one_form(parser, args)
    folders = [image for image in args.images if os.path.isdir(image)]
    if folders and (len(args.images) > 1 or args.out is None):
        parser.error("a folder goes alone, with --out FILE.csv for the answers")
    if args.out is not None:
        return _ask_each(args, pictures_in(args.images), args.question, ("image", "question", "answer"))
    check_pictures(args.images)
    model, loaded = _load(args)
    answer = model.ask(args.images, args.question, **_generation(args))
    if args.abstain:
        answer = model.unless_unsure(answer)
    print(json.dumps(answer_json(answer, loaded)) if args.json else answer.text)
    return 0


def caption_main(argv: Sequence[str]) -> int:
    """`vlm caption IMAGE|DIR ...`: a line (a JSON object with --json) for each picture."""
    parser = _parser("vlm caption", "Describe pictures.")
    parser.add_argument("images", nargs="+", metavar="IMAGE|DIR", help="pictures and folders of pictures")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE.csv", help="write image,caption rows")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    args = _parse(parser, argv)
    _one_form(parser, args)
    pictures = pictures_in(args.images)
    if args.out is not None:
        return _ask_each(args, pictures, CAPTION_PROMPT, ("image", "caption"))
    good = _readable(pictures)
    if not good:
        return 1
    model, loaded = _load(args)
    for begin in range(0, len(good), FOLDER_BATCH):
        part = good[begin : begin + FOLDER_BATCH]
        for picture, answer in zip(part, model.caption(part, **_generation(args)), strict=True):
            if args.json:
                print(json.dumps({"image": str(picture), **answer_json(answer, loaded)}), flush=True)
            else:
                print(f"{picture}\t{answer.text}" if len(pictures) > 1 else answer.text, flush=True)
    return 0 if len(good) == len(pictures) else 1


def chat_main(argv: Sequence[str]) -> int:
    """`vlm chat IMAGE ...`: questions from the keyboard, answers as they are decoded."""
    parser = _parser("vlm chat", "Talk about pictures; /show FILE adds one, an empty line or Ctrl-D ends.")
    parser.add_argument("images", nargs="*", metavar="IMAGE", help="pictures to begin with")
    args = _parse(parser, argv)
    if args.beams not in (None, 1):
        parser.error("a chat is streamed, and beams cannot be")
    check_pictures(args.images)
    model, _ = _load(args)
    chat = model.chat(args.images)
    terminal = sys.stdin.isatty()
    if terminal and not args.images:
        print("no picture is shown yet: /show FILE", file=sys.stderr)
    while True:
        try:
            line = input("you: " if terminal else "").strip()
        except EOFError:
            return 0
        if not line:
            return 0
        try:
            if line.startswith("/"):
                chat.show(_shown(line))
                continue
            for piece in chat.stream(line, **_generation(args)):
                print(piece, end="", flush=True)
            print(flush=True)
        except VLMError as problem:
            # A mistyped file name must not end the conversation.
            print(f"error: {problem}", file=sys.stderr)


def _shown(line: str) -> str:
    """The picture that a line of a chat shows; in quotes or with backslashes, as terminals drop it there.

    Raises:
        VLMError: it is another command.
    """
    command, _, name = line.partition(" ")
    name = name.strip()
    if command != "/show" or not name:
        raise VLMError(f"{line[:40]} is none of: /show FILE (an empty line or Ctrl-D ends)")
    if not os.path.exists(os.path.expanduser(name)):
        try:
            words = shlex.split(name)
        except ValueError:  # an apostrophe
            words = []
        if len(words) == 1:
            return words[0]
    return name


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
        "confidence": round(answer.confidence, 4),
        "abstained": answer.abstained,
        "adapter": answer.adapter,
    }


def _one_form(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    if args.out is not None and args.json:
        parser.error("--out writes CSV and --json prints: say one of them")


def pictures_in(arguments: Sequence[str]) -> list[Path]:
    """The pictures named and those in the folders named.

    Raises:
        VLMError: a folder without pictures.
    """
    from vlm.folders import list_pictures

    found: list[Path] = []
    for argument in arguments:
        if not os.path.isdir(argument):
            found.append(Path(argument))
            continue
        inside, others = list_pictures(argument)
        if not inside:
            raise VLMError(f"{argument} holds no JPEG, PNG, WebP or GIF files")
        if others:
            names = ", ".join(path.name for path in others[:3])
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            print(f"not read in {argument}, being no JPEG, PNG, WebP or GIF: {names}{more}", file=sys.stderr)
        found += inside
    return found


def check_pictures(pictures: Sequence[str | Path]) -> None:
    """Opens every picture, so that a bad one is told of before seconds are spent on loading the model."""
    from vlm.images import open_picture

    for picture in pictures:
        open_picture(picture)


def _ask_each(args: argparse.Namespace, pictures: list[Path], question: str, columns: tuple[str, ...]) -> int:
    """One row a picture; a picture that cannot be read is named, counted and left out of the file."""
    _require_table(args.out, columns)
    model, _ = _load(args)
    if len(pictures) > FOLDER_BATCH:  # packing takes a second, which a few pictures do not earn back
        model.pack()
    bad = 0
    with _table(args.out) as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        for begin in range(0, len(pictures), FOLDER_BATCH):
            good = _readable(pictures[begin : begin + FOLDER_BATCH])
            done = min(begin + FOLDER_BATCH, len(pictures))
            bad += done - begin - len(good)
            if "question" in columns:
                asked = [Conversation.ask([picture], question) for picture in good]
                answers = model.ask_batch(asked, **_generation(args))
                if args.abstain:
                    answers = list(map(model.unless_unsure, answers))
            else:
                answers = model.caption(good, **_generation(args))
            for picture, answer in zip(good, answers, strict=True):
                values = {
                    "image": picture,
                    "question": question,
                    "answer": answer.text,
                    "caption": answer.text,
                }
                rows.writerow([values[column] for column in columns])
            file.flush()
            print(f"{done} of {len(pictures)} pictures", file=sys.stderr)
        if bad == len(pictures):
            raise VLMError(f"no picture could be read: {args.out} is not written")
    if bad:
        print(
            f"{bad} of {len(pictures)} pictures could not be read and are not in {args.out}", file=sys.stderr
        )
    return 1 if bad else 0


def _require_table(path: Path, columns: Sequence[str]) -> None:
    """Raises:
    VLMError: there is no such folder, or something there that was not written by the same command.
    """
    if not path.parent.is_dir():
        raise VLMError(f"{path.parent} is no folder: make it first")
    head = ",".join(columns).encode()
    try:
        if path.exists():
            with open(path, "rb") as file:
                if file.read(len(head)) not in (head, b""):
                    raise VLMError(f"{path} is there already and holds something else: name another --out")
    except OSError as problem:
        raise VLMError(f"{path} cannot be written: {problem.strerror or problem}") from problem


@contextmanager
def _table(path: Path) -> Iterator[TextIO]:
    """A CSV file to write, which takes its place when it is whole; what was broken off lies beside.

    Names of pictures that are not UTF-8 go in as the bytes that they are.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with open(partial, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            yield file
        os.replace(partial, path)
    except VLMError:
        partial.unlink()
        raise
    except OSError as problem:
        raise VLMError(f"{path} cannot be written: {problem.strerror or problem}") from problem


def _readable(pictures: Sequence[Path]) -> list[Path]:
    """Those that can be opened; of the others a line is told."""
    from vlm.images import ImageError, open_picture

    good = []
    for picture in pictures:
        try:
            open_picture(picture)
            good.append(picture)
        except ImageError as problem:
            print(f"error: {problem}", file=sys.stderr)
    return good
