"""`vlm serve`: load the model, put the layers together, run until told to stop.

vlm serve                                          the page and the API on http://127.0.0.1:8000
vlm serve keys add --file keys.txt --name alice    make an API key
vlm serve feedback export --db opinions.db --out pairs/
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import math
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from vlm.errors import ConfigError, UsageError
from vlm.options import add_common, add_offline, apply_common, make_parser

if TYPE_CHECKING:
    from vlm.features import FeatureCache
    from vlm.model import VLM
    from vlm.serve.keys import Keys
    from vlm.serve.settings import Settings

_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_DRAIN_SECONDS = 5


def main(argv: list[str]) -> int:
    """Serve, or do one of the small jobs beside it; returns the exit code."""
    if argv[:1] == ["keys"]:
        return _keys_main(argv[1:])
    if argv[:1] == ["feedback"]:
        return _feedback_main(argv[1:])
    args = _parser().parse_args(argv)
    settings, keys = _decide(args)
    listener = _bind(args.host, args.port)
    try:
        _log_to_stderr(args.quiet)
        apply_common(args)
        from vlm.model import VLM

        model = VLM.from_pretrained(
            args.adapter, device=args.device, dtype=args.dtype, offline=args.offline,
            allow_different_frozen=args.allow_different_frozen, feature_cache=args.feature_cache,
            memory=args.memory,
        )  # fmt: skip
        app = build(model, settings, keys, model_id=args.name or _name(args.adapter))
        return run(app, settings, listener)
    finally:
        listener.close()


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("vlm serve", "Serve a page and an OpenAI-compatible API.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    parser.add_argument("--adapter", default="default", help="a shipped adapter, a folder or a hub id")
    parser.add_argument("--allow-different-frozen", action="store_true", help="accept other frozen weights")
    parser.add_argument("--name", help="the model's name in the API (default: the adapter's)")
    parser.add_argument("--api-key-file", type=Path, metavar="F", help="keys made with `vlm serve keys add`")
    parser.add_argument(
        "--insecure-public", action="store_true", help="listen beyond this machine without a key file"
    )
    parser.add_argument("--allow-host", action="append", default=[], metavar="NAME",
                        help="answer to this Host header too (repeatable)")  # fmt: skip
    parser.add_argument("--allow-origin", action="append", default=[], metavar="ORIGIN",
                        help="let pages of this origin call the API (repeatable)")  # fmt: skip
    parser.add_argument("--allow-image-host", action="append", default=[], metavar="HOST",
                        help="fetch https pictures from this host (repeatable)")  # fmt: skip
    parser.add_argument("--feature-cache", type=Path, metavar="DIR", help="keep pictures' features on disk")
    parser.add_argument("--memory", type=Path, metavar="DIR", help="tell of remembered pictures like these")
    parser.add_argument("--feedback", type=Path, metavar="DB", help="collect opinions in this SQLite file")
    parser.add_argument("--slots", type=int, default=16, help="answers decoded side by side (default: 16)")
    parser.add_argument("--queue", type=int, default=64, help="answers that may wait (default: 64)")
    parser.add_argument(
        "--deadline", type=_seconds, default=120.0, help="seconds an answer may take (default: 120)"
    )
    parser.add_argument(
        "--answer-tokens",
        type=int,
        default=128,
        help="longest answer when a request does not say (default: 128)",
    )
    parser.add_argument("--quiet", action="store_true", help="log warnings only")
    add_common(parser)
    return parser


def _seconds(text: str) -> float:
    try:
        if math.isfinite(seconds := float(text)):
            return seconds
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds")


def _decide(args: argparse.Namespace) -> tuple[Settings, Keys | None]:
    """Settings and keys, or the reason why this may not be served."""
    from vlm.serve.fetch import allowed_hosts
    from vlm.serve.gate import host_name, origin
    from vlm.serve.keys import Keys
    from vlm.serve.settings import Settings

    for option, least in (("slots", 1), ("queue", 0), ("deadline", 1), ("answer_tokens", 1)):
        if getattr(args, option) < least:
            raise UsageError(f"--{option.replace('_', '-')} must be at least {least}")
    allowed_hosts(args.allow_image_host)
    local = _is_local(args.host)
    if not local and args.api_key_file is None and not args.insecure_public:
        raise UsageError(
            f"--host {args.host} is open to others: give --api-key-file (make one: `vlm serve keys add`), "
            "or --insecure-public if anyone may use it"
        )
    keys = Keys.read(args.api_key_file) if args.api_key_file else None
    names = tuple(map(host_name, args.allow_host))
    if local and keys is None:
        names = (*_LOCAL_NAMES, *names)
    settings = Settings(
        image_hosts=tuple(args.allow_image_host), hosts=names,
        origins=tuple(map(origin, args.allow_origin)),
        feedback=args.feedback, slots=args.slots, queue=args.queue, deadline=args.deadline,
        default_new_tokens=args.answer_tokens,
    )  # fmt: skip
    return settings, keys


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket, before the model is loaded: a port in use is told at once, and whoever comes early
    waits."""
    if not 0 <= port <= 65_535:  # getaddrinfo would take it modulo 65,536
        raise UsageError(f"--port {port} is not between 0 and 65535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # with SO_REUSEADDR two may bind to one port; only one may listen
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(f"cannot listen on {host} port {port}: {error}") from error
    return listener


def _name(adapter: str) -> str:
    """The model's name: an adapter's folder or id without what stands before its last slash."""
    return Path(adapter).name or "default"


def _log_to_stderr(quiet: bool) -> None:
    from vlm.serve.gate import QuietFormatter

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(QuietFormatter("%(asctime)s %(levelname)s %(message)s"))
    for name in ("vlm", "uvicorn", "asyncio"):
        log = logging.getLogger(name)
        log.addHandler(handler)
        log.propagate = False
        log.setLevel(logging.WARNING if quiet or name != "vlm" else logging.INFO)


def build(model: VLM, settings: Settings, keys: Keys | None, *, model_id: str) -> Any:
    """The application around a loaded model."""
    from vlm.generation import DecodeBatch
    from vlm.serve.app import create_app
    from vlm.serve.cache import Latents, MemoryCache
    from vlm.serve.engine import Engine
    from vlm.serve.fetch import FetchDoor
    from vlm.serve.metrics import Metrics
    from vlm.serve.pictures import Desk

    metrics = Metrics()
    cache = MemoryCache(settings.cached_features, metrics, model.features.cache)
    model.features.cache = cast("FeatureCache", cache)  # the two methods that `Features` calls
    door = FetchDoor(
        settings.image_hosts, max_bytes=settings.max_image_bytes,
        seconds=settings.fetch_seconds, redirects=settings.fetch_redirects,
    )  # fmt: skip
    desk = Desk(model, Latents(model, settings.cached_latents, metrics), settings, door)
    engine = Engine(model.pack(), settings, metrics, DecodeBatch)
    return create_app(engine, desk, settings=settings, keys=keys, metrics=metrics, model_id=model_id)


def run(app: Any, settings: Settings, listener: socket.socket) -> int:
    """Serve until SIGTERM or SIGINT; answers under way are finished first."""
    import uvicorn

    from vlm.serve.protocol import Server, protocol_class

    config = uvicorn.Config(
        app, http=protocol_class(settings), ws="none", loop="asyncio", lifespan="on",
        log_config=None, access_log=False, server_header=False, proxy_headers=False,
        timeout_keep_alive=15, timeout_graceful_shutdown=int(settings.deadline) + _DRAIN_SECONDS,
    )  # fmt: skip
    # uvicorn raises the signal again when it is done; stopping as asked is no failure.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    Server(config).run(sockets=[listener])
    return 0


def _keys_main(argv: list[str]) -> int:
    parser = make_parser("vlm serve keys", "Make API keys.")
    jobs = parser.add_subparsers(dest="job", required=True)
    add = jobs.add_parser("add", help="make a key, show it once, keep its hash", allow_abbrev=False)
    add.add_argument("--file", type=Path, required=True, help="key file; made if missing")
    add.add_argument("--name", required=True, help="whose key it is")
    add_offline(add)
    args = parser.parse_args(argv)
    from vlm.serve.keys import add_key

    print(add_key(args.file, args.name))
    return 0


def _feedback_main(argv: list[str]) -> int:
    parser = make_parser("vlm serve feedback", "What people thought of answers.")
    jobs = parser.add_subparsers(dest="job", required=True)
    export = jobs.add_parser(
        "export", help="write preference pairs for `vlm train prefer`", allow_abbrev=False
    )
    export.add_argument("--db", type=Path, required=True, help="the file given to `vlm serve --feedback`")
    export.add_argument("--out", type=Path, required=True, help="folder for pairs.jsonl and its pictures")
    add_offline(export)
    args = parser.parse_args(argv)
    from vlm.serve.feedback import FeedbackStore

    if not args.db.is_file():
        raise ConfigError(f"there is no feedback database {args.db}")
    found = FeedbackStore(args.db).export(args.out)
    print(f"{found.pairs} pairs, {found.pictures} pictures, {found.unused} opinions unused: {args.out}")
    return 0
