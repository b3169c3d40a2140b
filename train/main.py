"""`vlm train`: an adapter from a recipe, or from a folder of your own pictures.

vlm train flickr8k-flamingo data=DIR out=runs/flamingo
vlm train finetune data=MY_PICTURES out=runs/mine
vlm train prefer data=PAIRS.jsonl start=runs/mine out=runs/preferred
vlm train plan flickr8k-larger
vlm train ladder flickr8k-flamingo data=DIR ladder.pictures=[300,600,1200,2400,4800]
vlm train selftest
vlm train consensus ADAPTER CAPTIONED
vlm train captioner ADAPTER CAPTIONED
vlm train answers ADAPTER QUESTIONS
vlm train card OUT --reports REPORT.json
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from vlm.errors import UsageError
from vlm.options import add_common, apply_common, make_parser

if TYPE_CHECKING:
    from vlm.train.config import TrainConfig

COMMANDS = {
    "selftest": "vlm.train.selftest",
    "card": "vlm.train.card",
    "plan": "vlm.train.plan",
    "ladder": "vlm.train.ladder",
    "consensus": "vlm.train.consensus",
    "captioner": "vlm.train.captioner",
    "answers": "vlm.train.answers",
}


def main(argv: list[str]) -> int:
    """Runs one of the train commands; returns its exit code."""
    if argv and argv[0] in COMMANDS:
        command: Callable[[list[str]], int] = importlib.import_module(COMMANDS[argv[0]]).main
        return command(argv[1:])
    if "--keys" in argv:
        show_keys()
        return 0
    args = _parser().parse_intermixed_args(argv)
    from vlm.train.recipe import read_recipe

    config = read_recipe(args.recipe, args.settings)
    config = applied(args, config)
    from accelerate import PartialState

    from vlm.train.processes import TERMINATED, leaving
    from vlm.train.run import train

    with leaving(config.out):
        done = train(config, offline=args.offline, fresh=args.fresh, device=args.device)
    PartialState().destroy_process_group()
    return 0 if done else TERMINATED


def applied(args: argparse.Namespace, config: TrainConfig) -> TrainConfig:
    """Gives the common options effect; --dtype bfloat16 is the recipe's `precision=bf16`.

    Raises:
        UsageError: float16, in which nothing is trained, or one GPU of several.
    """
    if args.dtype == "float16":
        raise UsageError("nothing is trained in float16: say --dtype bfloat16")
    if args.device.startswith("cuda:"):
        number = args.device.partition(":")[2]
        raise UsageError(
            f"training takes what GPUs it sees: set CUDA_VISIBLE_DEVICES={number} and say --device cuda"
        )
    apply_common(args)
    return replace(config, precision="bf16") if args.dtype == "bfloat16" else config


def _parser() -> argparse.ArgumentParser:
    from vlm.train.recipe import shipped

    parser = make_parser("vlm train", "Train an adapter from a recipe.")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    width = max(map(len, shipped()))
    recipes = "\n".join(f"  {name:<{width}}  {about}" for name, about in shipped().items())
    parser.epilog = (
        f"recipes:\n{recipes}\n\nalso: vlm train {' | '.join(COMMANDS)}\n"
        "An interrupted run goes on where its last saved state stands; --fresh begins anew."
    )
    parser.add_argument("recipe", help="a recipe that ships, or a YAML file")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="data=DIR out=DIR steps=500 optim.lr=3e-4 ... (--keys lists them all)",
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--resume", action="store_true", help="go on from the last saved state (default)")
    how.add_argument("--fresh", action="store_true", help="begin anew, dropping the saved state in out")
    parser.add_argument("--keys", action="store_true", help="everything a recipe may say")
    add_common(parser)
    return parser


def show_keys() -> None:
    """Prints every key of a recipe with its default and what it does."""
    from rich.console import Console
    from rich.table import Table

    from vlm.train.recipe import keys

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("key", "default", "what it does"):
        table.add_column(column, overflow="fold")
    for row in keys():
        table.add_row(*row)
    Console().print(table, markup=False)
