"""Options that every command takes: --offline --device --dtype --threads."""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
from typing import Any

from vlm.errors import ConfigError

DTYPES = ("float32", "bfloat16", "float16")
_MALLOPT = {-1: 512 << 20, -2: 64 << 20, -3: 1 << 30}
"""Of malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD."""
TRUE_WORDS = {"1", "ON", "YES", "TRUE"}  # what huggingface_hub takes as true


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser without abbreviations: `--off` is an error today rather than another option tomorrow."""
    return argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)


def offline_from_environment() -> bool:
    """True where HF_HUB_OFFLINE asks for it."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in TRUE_WORDS


def add_offline(parser: argparse.ArgumentParser) -> None:
    """Add --offline, for commands that load no model; the other shared options they take and do not need."""
    _offline(parser)
    add_idle(parser, "--device", "--dtype", "--threads")


def add_idle(parser: argparse.ArgumentParser, *names: str) -> None:
    """Add shared options that a command has no use for, so that every command may be given the same ones."""
    kinds: dict[str, dict[str, Any]] = {
        "--offline": {"action": "store_true"},
        "--dtype": {"choices": DTYPES},
        "--threads": {"type": positive},
    }
    for name in names:
        parser.add_argument(name, help=argparse.SUPPRESS, **kinds.get(name, {}))


def _offline(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--offline",
        action="store_true",
        default=offline_from_environment(),
        help="never touch the network (also: HF_HUB_OFFLINE=1)",
    )


def apply_offline(args: argparse.Namespace) -> None:
    """Give --offline effect. Read once, when huggingface_hub is first imported; so before its friends are."""
    if args.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add the shared options; `apply_common` gives them effect."""
    group = parser.add_argument_group("common options")
    _offline(group)
    group.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps, or auto: the best there is (default)"
    )
    group.add_argument("--dtype", default="float32", choices=DTYPES, help="number format (default: float32)")
    group.add_argument(
        "--threads", type=positive, default=None, metavar="N", help="CPU threads (default: one per core)"
    )


def apply_common(args: argparse.Namespace) -> None:
    """Give the shared options effect: imports torch, sets its threads, turns `auto` into a device.

    Afterwards `args.device` is a string that `torch.device` takes and that is present on this machine.

    Raises:
        ConfigError: a device that torch does not know or that this machine does not have.
    """
    apply_offline(args)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    args.device = _device(args.device)


def keep_memory() -> None:
    """Have glibc keep the memory that is freed, up to half a gigabyte, instead of handing it back at once.

    The encoder's maps are large and short-lived: to take them anew, page by page, costs as much as to fill
    them. For commands that look at thousands of pictures and then end. Does nothing where there is no glibc.
    """
    if sys.platform != "linux":
        return
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        for parameter, size in _MALLOPT.items():
            mallopt(parameter, size)


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def common_words(args: argparse.Namespace) -> list[str]:
    """The command-line words that give another `vlm` process the same shared options."""
    words = ["--device", args.device, "--dtype", args.dtype] + ["--offline"] * args.offline
    return words + (["--threads", str(args.threads)] if args.threads else [])


def _device(name: str) -> str:
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # `meta` makes a tensor but holds no number
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0].split(". ")[0].split(" device type at")[0][:120]
        raise ConfigError(f"--device {name} does not work here ({reason}); try --device cpu.") from error
    return name
