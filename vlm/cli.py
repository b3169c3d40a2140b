"""The `vlm` command: a table of names, each imported only when it is called.

`vlm --help` answers without torch; so does every usage error of the table itself.
"""

from __future__ import annotations

import difflib
import errno
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlm import __version__
from vlm.errors import UsageError, VLMError

INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Command:
    """Where a command lives ("module:function"), what it does, and the extra that it needs."""

    target: str
    summary: str
    extra: str = ""

    def load(self) -> Callable[[list[str]], int]:
        """Import the module and return its function."""
        module, _, function = self.target.partition(":")
        loaded: Callable[[list[str]], int] = getattr(importlib.import_module(module), function)
        return loaded


COMMANDS: dict[str, Command] = {
    "ask": Command("vlm.ask:ask_main", "answer a question about one or more pictures"),
    "chat": Command("vlm.ask:chat_main", "talk about pictures, turn by turn"),
    "caption": Command("vlm.ask:caption_main", "describe pictures"),
    "train": Command("vlm.train.main:main", "train an adapter from a recipe"),
    "eval": Command("vlm.eval.main:main", "score a model on a benchmark, with its controls", "eval"),
    "data": Command("vlm.data.main:main", "convert, inspect and check data sets"),
    "serve": Command("vlm.serve.main:main", "serve a page and an OpenAI-compatible API", "serve"),
    "bench": Command("vlm.bench.main:main", "measure speed and memory", "all"),
    "weights": Command("vlm.weights_main:main", "list, get and verify the frozen weights"),
}


def usage() -> str:
    """The text of `vlm --help`."""
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: vlm COMMAND [options]\n\n"
        "A frozen image encoder and a frozen language model, joined by a small trained adapter.\n\n"
        f"commands:\n{rows}\n\n"
        "options:\n"
        "  -h, --help     this text; `vlm COMMAND --help` for one command\n"
        "  -V, --version  the version\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0 done, 1 an error in one line, 2 wrong usage, 130 Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # a strange character must not end in a traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()  # a closed pipe shows here, where it can still be caught
        return code
    except BrokenPipeError:
        # The reader of our output has gone (`vlm ... | head`); keep the interpreter's own last flush quiet.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as problem:
        if problem.errno != errno.ENOSPC:
            raise
        print("error: the disk is full", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _dispatch(arguments: list[str]) -> int:
    """Answer `--help` and `--version`; run anything else."""
    if not arguments:
        print(usage(), end="", file=sys.stderr)
        return UsageError.exit_code
    if arguments[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"vlm-adapters {__version__}")
        return 0
    return _run(arguments[0], arguments[1:])


def _run(name: str, arguments: list[str]) -> int:
    """Import and call one command; a `VLMError` becomes one line on stderr."""
    command = COMMANDS.get(name)
    if command is None:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean `vlm {near[0]}`?" if near else "`vlm --help` lists them."
        print(f"error: there is no command {_one_line(name)!r}; {hint}", file=sys.stderr)
        return UsageError.exit_code
    # Pillow warns of damaged EXIF and the like; what matters about a picture is said by its ImageError.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        return command.load()(arguments)
    except VLMError as error:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        # A package of an extra is missing; a missing module of our own is a bug and keeps its traceback.
        package = (error.name or "").partition(".")[0]
        if not package or package == "vlm":
            raise
        fix = f"pip install -e '.[{command.extra}]'" if command.extra else "pip install -e ."
        print(f"error: `vlm {name}` needs the package {package}: run {fix} in the checkout.", file=sys.stderr)
    return 1


def _one_line(message: str) -> str:
    """Fold line breaks, and escape control characters, which could rewrite the terminal."""
    folded = " ".join(message.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in folded)
