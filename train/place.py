"""Where an adapter that is given a guide lies: in its own folder, or as a copy in another."""

from __future__ import annotations

import argparse
from pathlib import Path

from vlm.checkpoint import adapter_folder, require_new
from vlm.errors import WeightsError
from vlm.model import VLM
from vlm.weights_cache import cache_root


def add_place(parser: argparse.ArgumentParser) -> None:
    """ADAPTER and --out."""
    parser.add_argument("adapter", help="the adapter: an own folder, which is written to, or any with --out")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="write a copy there and leave the adapter as it is"
    )


def place(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The adapter's folder, and where its copy goes, if it does.

    Raises:
        WeightsError: there is no such adapter, one that is not one's own would be written to, or the copy
            would overwrite something.
    """
    folder = adapter_folder(args.adapter, offline=args.offline)
    if args.out is None:
        if folder != Path(args.adapter).expanduser():
            raise WeightsError(f"{args.adapter} is no folder of your own: --out DIR says where a copy goes")
        return folder, None
    out = args.out.expanduser()
    require_new(out)
    return folder, out


def without_guides(folder: Path, args: argparse.Namespace) -> VLM:
    """The adapter alone, with the feature cache.

    A guide that is damaged, or of other frozen parts, may be what is to be mended.
    """
    return VLM.from_pretrained(
        folder,
        offline=args.offline,
        device=args.device,
        dtype=args.dtype,
        feature_cache=cache_root() / "features",
        guides=False,
    )
