"""The outermost layer: who may pass, and the one line that is logged about it.

Deny by default: with keys set, only the paths in `open_paths` answer without one, compared as the very string
that routing uses. The log has the route's template, never the path, query, headers or body.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
import traceback
from collections.abc import Iterable
from typing import Any

from vlm.errors import UsageError
from vlm.serve.errors import APIError, error_bytes
from vlm.serve.keys import Keys
from vlm.serve.metrics import Metrics
from vlm.serve.settings import Settings

logger = logging.getLogger("vlm.serve")
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_PREFLIGHT = {b"access-control-allow-methods": b"GET, POST", b"access-control-max-age": b"600"}
_SENT = ("authorization", "content-type")
_CLIENTS = re.compile(
    r"x-stainless-[a-z0-9-]{1,40}|openai-(?:organization|project)|user-agent|idempotency-key"
)
"""Headers that OpenAI's JavaScript client sends besides; a browser asks whether it may."""


_HOST = r"(?:[a-z0-9_](?:[a-z0-9._-]*[a-z0-9_])?|\[[0-9a-f:.]+\])"
_ORIGIN = re.compile(rf"[a-z][a-z0-9+.-]*://{_HOST}(?::[1-9][0-9]{{0,4}})?")
_USUAL_PORT = re.compile(r"(?:http://.*:80|https://.*:443)")


def host_name(text: str) -> str:
    """A name as the Host header is compared with: without a port, in small letters.

    Raises:
        UsageError: no Host header could match it.
    """
    if not re.fullmatch(_HOST, name := text.lower()):
        raise UsageError(
            f"--allow-host {text!r} can never match: write the name alone, without scheme and port, "
            "as in ask.example"
        )
    return name


def origin(text: str) -> str:
    """An origin as browsers write it.

    Raises:
        UsageError: no browser writes it so.
    """
    if not _ORIGIN.fullmatch(name := text.lower()) or _USUAL_PORT.fullmatch(name):
        raise UsageError(
            f"--allow-origin {text!r} can never match: write scheme and host, and the port where it is not "
            "the usual one, as in https://chat.example or http://localhost:3000, with nothing after it"
        )
    return name


class QuietFormatter(logging.Formatter):
    """Tracebacks without their message and values, which may hold what a user wrote."""

    def formatException(self, ei: Any) -> str:
        """The frames and the error's type."""
        frames = "".join(traceback.format_tb(ei[2]))
        return f"{frames}{ei[0].__name__} (message withheld)"


class Gate:
    """ASGI middleware: host names, keys, CORS, request ids, metrics, the access log."""

    def __init__(
        self, app: Any, *, settings: Settings, keys: Keys | None, metrics: Metrics, open_paths: Iterable[str]
    ) -> None:
        self._app = app
        self._keys = keys
        self._metrics = metrics
        self._open = frozenset(open_paths)
        self._hosts = frozenset(host.lower() for host in settings.hosts)
        self._origins = frozenset(origin.encode() for origin in settings.origins)

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        visit = _Visit(send, self._cors(headers))
        self._metrics.open.inc()
        try:
            await self._pass(scope, headers, receive, visit)
        finally:
            self._metrics.open.dec()
            self._note(scope, visit)

    async def _pass(
        self, scope: dict[str, Any], headers: dict[bytes, bytes], receive: Any, visit: _Visit
    ) -> None:
        if visit.extra and scope["method"] == "OPTIONS" and b"access-control-request-method" in headers:
            visit.extra += _PREFLIGHT.items()
            visit.extra.append((b"access-control-allow-headers", _allowed(headers)))
            await visit.send({"type": "http.response.start", "status": 204, "headers": []})
            await visit.send({"type": "http.response.body", "body": b""})
            return
        try:
            self._check_host(headers)
            self._check_key(scope["path"], scope["headers"])
            await self._app(scope, receive, visit.send)
        except APIError as error:
            await visit.refuse(error)
        except asyncio.CancelledError:
            # By nothing but the server's end, which waits no longer: ended here, as uvicorn would log it.
            await visit.refuse(APIError(503, "The server is stopping."))
        except Exception:
            # The last line of defence: the client gets OpenAI's shape instead of a cut connection, and the
            # log gets frames without values (uvicorn would print the message, which may quote a prompt).
            logger.exception("request %s failed", visit.id)
            await visit.refuse(APIError(500, "The server failed to answer; the error is logged."))

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """A page of another site may point its own name at this address (DNS rebinding)."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host[: host.rfind(":")] if host.rpartition(":")[2].isdigit() else host
        if self._hosts and name not in self._hosts:
            raise APIError(403, "This server does not answer to that host name.", code="host_not_allowed")

    def _check_key(self, path: str, headers: list[tuple[bytes, bytes]]) -> None:
        if self._keys is None or path in self._open:
            return
        offered = [value for name, value in headers if name == b"authorization"]
        if len(offered) != 1 or not self._keys.opens(offered[0].decode("latin-1")):
            message = "A valid API key is needed: send it as `Authorization: Bearer KEY`."
            raise APIError(401, message, headers={"www-authenticate": "Bearer"})

    def _cors(self, headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
        origin = headers.get(b"origin", b"")
        if origin not in self._origins:
            return []
        exposed = (b"access-control-expose-headers", b"retry-after, x-request-id")
        return [(b"access-control-allow-origin", origin), exposed, (b"vary", b"Origin")]

    def _note(self, scope: dict[str, Any], visit: _Visit) -> None:
        method = scope["method"] if scope["method"] in _METHODS else "OTHER"
        route = getattr(scope.get("route"), "path", "-")
        seconds = time.monotonic() - visit.started
        self._metrics.requests.labels(method, route, str(visit.status or "none")).inc()
        self._metrics.seconds.labels(route).observe(seconds)
        logger.info("%s %s %s %.3fs %s", method, route, visit.status or "gone", seconds, visit.id)


def _allowed(headers: dict[bytes, bytes]) -> bytes:
    """What a preflight may send: always the two that are needed, and of the others it names, the known."""
    named = headers.get(b"access-control-request-headers", b"").decode("latin-1").lower()
    known = [name for name in map(str.strip, named.split(",")) if _CLIENTS.fullmatch(name)]
    return ", ".join((*_SENT, *known)).encode()


class _Visit:
    """One request on its way through: its id, its status, and the headers every answer gets."""

    def __init__(self, send: Any, extra: list[tuple[bytes, bytes]]) -> None:
        self._send = send
        self.extra = extra
        self.id = "req-" + secrets.token_hex(8)
        self.status = 0
        self.started = time.monotonic()

    async def send(self, message: dict[str, Any]) -> None:
        """Pass a message on, with the common headers on the first."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = {name.lower() for name, _ in message["headers"]}
            common = [(b"x-request-id", self.id.encode()), (b"x-content-type-options", b"nosniff")]
            if b"cache-control" not in given:
                common.append((b"cache-control", b"no-store"))
            message = {**message, "headers": [*message["headers"], *common, *self.extra]}
        await self._send(message)

    async def refuse(self, error: APIError) -> None:
        """Answer with an error, unless an answer has begun."""
        if self.status:
            return
        body, headers = error_bytes(error)
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
