"""HTTP over TCP: uvicorn's server and its h11 protocol, with bounds on what a client may keep waiting, and
refusals in OpenAI's shape."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlm.serve.errors import APIError, error_bytes
from vlm.serve.settings import Settings

_LINGER_SECONDS = 2.0
_LINGER_BYTES = 64 << 20
_FAREWELL_SECONDS = 5.0
"""Left for readers that stand still when the server ends, and for refusals when it is told so twice."""


class Server(uvicorn.Server):
    """Says where it serves once it does; told to stop a second time, it does not wait for answers."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            print(f"serving on http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.ensure_future(super().shutdown(sockets))
        while not ending.done() and not self.force_exit:
            await asyncio.wait({ending}, timeout=0.1)
        if self.force_exit:
            # uvicorn would leave the application as it is: its thread, in native code while the interpreter
            # ends, would abort the process.
            await self.lifespan.shutdown()
            if tasks := set(self.server_state.tasks):
                await asyncio.wait(tasks, timeout=_FAREWELL_SECONDS)
        await ending


class BoundedProtocol(H11Protocol):
    """One client's connection: closed when its first headers do not arrive in time, when its request goes on
    after its answer, when its answer is not taken, or when it is one too many."""

    settings: Settings
    _patience: asyncio.TimerHandle | None = None
    _stuck: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._application: Any = self.app
        self.app = self._serve

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # A transport that is closed keeps what it could not send for as long as it takes, so every unsent
        # byte must start the clock, not only the first beyond some buffer.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self.settings.connections:
            self._refuse(APIError(429, "Too many connections.", headers={"retry-after": "2"}))
            return
        self._wait_for_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        self._wait_for_reader(None)
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.conn.their_state is h11.IDLE:
            # Half a head may lie in the buffer; uvicorn's own keep-alive timer stops at the first byte.
            if self._patience is None and self.conn.trailing_data[0]:
                self._wait_for_headers()
        else:
            self._stop_waiting()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._wait_for_reader(self.settings.write_seconds)

    def resume_writing(self) -> None:
        self._wait_for_reader(None)
        super().resume_writing()

    def shutdown(self) -> None:
        super().shutdown()
        if self._stuck is not None:
            self._wait_for_reader(min(_FAREWELL_SECONDS, self.settings.write_seconds))

    def send_400_response(self, msg: str) -> None:
        self._refuse(APIError(400, "This is not a valid HTTP request.", code="invalid_http"))

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        """Run the application. An answer that comes before its request's last byte is the connection's
        last: what follows such a request would otherwise be read for as long as it comes."""
        early = ended = False

        async def answer(message: Any) -> None:
            nonlocal early, ended
            if message["type"] == "http.response.start":
                early = self.conn.their_state is h11.SEND_BODY
                if early:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            elif early:
                ended = not message.get("more_body", False)
                message = {**message, "more_body": True}
            await send(message)

        await self._application(scope, receive, answer)
        if ended:
            await _linger(receive)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _wait_for_headers(self) -> None:
        self._patience = self.loop.call_later(self.settings.header_seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _wait_for_reader(self, seconds: float | None) -> None:
        """Give the client so long to take what is on its way to it; None: it has."""
        if self._stuck is not None:
            self._stuck.cancel()
        self._stuck = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def _give_up(self) -> None:
        self._patience = None
        if self.conn.trailing_data[0]:
            self._refuse(APIError(408, "The request's headers did not arrive in time."))
        else:
            self.transport.close()

    def _refuse(self, error: APIError) -> None:
        """Answer below the application, then close; a response under way is only cut off."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self._answering():
            body, headers = error_bytes(error)
            head = h11.Response(
                status_code=error.status, headers=[*headers, (b"connection", b"close")], reason=b""
            )
            events: list[Any] = [head, h11.Data(data=body), h11.EndOfMessage()]
            self.transport.write(b"".join(self.conn.send(event) or b"" for event in events))
        self.transport.close()

    def _answering(self) -> bool:
        return self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete


def protocol_class(settings: Settings) -> type[H11Protocol]:
    """The protocol within these bounds."""

    class Protocol(BoundedProtocol):
        pass

    Protocol.settings = settings
    return Protocol


async def _linger(receive: Any) -> None:
    """Read on for a moment: a client that is still sending when its connection closes loses the answer."""
    left = _LINGER_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
