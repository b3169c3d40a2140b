"""HTTP over TCP: uvicorn's h11 protocol, with a deadline for headers and refusals in OpenAI's shape."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlm.serve.errors import APIError, error_bytes


def protocol_class(header_seconds: float, connections: int) -> type[H11Protocol]:
    """A protocol that closes a connection whose first headers do not arrive in time, and any connection
    beyond the given number."""

    class BoundedProtocol(H11Protocol):
        """One client's connection."""

        _patience: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > connections:
                self._refuse(APIError(429, "Too many connections.", headers={"retry-after": "2"}))
                return
            self._wait_for_headers()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_waiting()
            super().connection_lost(exc)

        def handle_events(self) -> None:
            super().handle_events()
            if self.conn.their_state is h11.IDLE:
                # Half a head may lie in the buffer; uvicorn's own keep-alive timer stops at the first byte.
                if self._patience is None and self.conn.trailing_data[0]:
                    self._wait_for_headers()
            else:
                self._stop_waiting()

        def send_400_response(self, msg: str) -> None:
            self._refuse(APIError(400, "This is not a valid HTTP request.", code="invalid_http"))

        def _wait_for_headers(self) -> None:
            self._patience = self.loop.call_later(header_seconds, self._give_up)

        def _stop_waiting(self) -> None:
            if self._patience is not None:
                self._patience.cancel()
                self._patience = None

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

    return BoundedProtocol
