"""Request bodies: capped in size, time and total before a parser sees them.

The body is read here, once, into `scope["vlm.body"]`; the handlers take it from there and release it as soon
as its pictures are opened.
"""

from __future__ import annotations

import asyncio
import ctypes
from typing import Any

from vlm.serve.errors import APIError, overloaded
from vlm.serve.settings import Settings

Scope = dict[str, Any]
_BODILESS = frozenset({"GET", "HEAD", "OPTIONS"})
_GROWS = 1 << 20
"""Bytes up to which a body grows as it comes: moving it costs little."""


class Body:
    """One request's bytes, counted against what all requests may hold together.

    Args:
        most: bytes that `add` will be given at most.

    Attributes:
        length: bytes that are counted.
        data: the bytes, once `close` was called.
    """

    def __init__(self, ledger: Ledger, most: int) -> None:
        self.data = bytearray()
        self.length = 0
        self._ledger, self._most = ledger, most

    def add(self, chunk: bytes) -> None:
        """Append a chunk.

        Raises:
            APIError: 429 when all bodies together exceed their bound.
        """
        self._ledger.take(len(chunk))
        begin, self.length = self.length, self.length + len(chunk)
        if len(self.data) < self.length > _GROWS:
            _reserve(self.data, self._most)
        self.data[begin : self.length] = chunk

    def close(self) -> None:
        """Nothing follows."""
        del self.data[self.length :]

    def forget(self) -> None:
        """Drop the bytes. They stay counted: what was parsed from them is as large."""
        self.data = bytearray()

    def release(self) -> None:
        """Drop the bytes and stop counting them; may be called again."""
        self._ledger.held -= self.length
        self.length = 0
        self.forget()


def _reserve(data: bytearray, size: int) -> None:
    """Makes room for what follows: one that grew would move, and while it moves it is there twice.

    `bytearray(size)` would write zeros, and so hold memory for bytes that never come.
    """
    ctypes.pythonapi.PyByteArray_Resize(ctypes.py_object(data), ctypes.c_ssize_t(size))


class Ledger:
    """Bytes of all bodies being held."""

    def __init__(self, bound: int) -> None:
        self.bound = bound
        self.held = 0

    def take(self, size: int) -> None:
        """Count bytes in.

        Raises:
            APIError: 429 over the bound.
        """
        if self.held + size > self.bound:
            raise overloaded(0, 1)
        self.held += size


class BodyLimit:
    """ASGI middleware that reads the body within its bounds, or refuses with 408, 413, 415 or 429."""

    def __init__(self, app: Any, settings: Settings) -> None:
        self._app = app
        self._settings = settings
        self.ledger = Ledger(settings.max_bodies)

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] in _BODILESS:
            await self._app(scope, receive, send)
            return
        body = Body(self.ledger, self._settings.max_body)
        try:
            complete = await self._read(scope, receive, body)
        except BaseException:
            body.release()
            raise
        if not complete:  # the client went away
            body.release()
            return
        scope["vlm.body"] = body
        try:
            await self._app(scope, receive, send)
        finally:
            body.release()

    async def _read(self, scope: Scope, receive: Any, body: Body) -> bool:
        cap = self._settings.max_body
        headers = dict(scope["headers"])
        if headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
            raise APIError(415, "Send the body uncompressed.")
        declared = headers.get(b"content-length", b"0")
        too_large = APIError(413, f"The request is larger than {cap // (1 << 20)} MiB.")
        if not declared.isdigit() or int(declared) > cap:
            raise too_large
        try:
            async with asyncio.timeout(self._settings.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return False
                    chunk = message.get("body", b"")
                    if body.length + len(chunk) > cap:
                        raise too_large
                    body.add(chunk)
                    more = message.get("more_body", False)
        except TimeoutError:
            raise APIError(408, "The request's body did not arrive in time.") from None
        body.close()
        return True
