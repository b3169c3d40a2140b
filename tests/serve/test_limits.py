"""Connections and bodies that lie, drip or never end, against the real protocol and limits."""

from __future__ import annotations

import ctypes
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn")

from vlm.serve.errors import overloaded  # noqa: E402
from vlm.serve.gate import Gate  # noqa: E402
from vlm.serve.limits import Body, BodyLimit, Ledger  # noqa: E402
from vlm.serve.metrics import Metrics  # noqa: E402
from vlm.serve.protocol import protocol_class  # noqa: E402
from vlm.serve.settings import Settings  # noqa: E402

CONNECTIONS = 8
SETTINGS = Settings(
    max_body=1 << 20, max_bodies=3 << 19, body_seconds=0.6, header_seconds=0.4, connections=CONNECTIONS
)


async def length_of_body(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the number of body bytes that came through."""
    body = scope.get("vlm.body")
    text = str(len(body.data) if body else 0).encode()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]}
    )
    await send({"type": "http.response.body", "body": text})


def test_a_large_body_stays_where_it_is() -> None:
    ledger = Ledger(1 << 30)
    body, places = Body(ledger, 64 << 20), set()
    chunks = [bytes([number]) * (300_000 + number) for number in range(100)]
    for chunk in chunks:
        body.add(chunk)
        if body.length > 1 << 20:
            places.add(ctypes.addressof(ctypes.c_char.from_buffer(body.data)))
    body.close()
    assert body.data == b"".join(chunks) and len(places) == 1
    assert ledger.held == body.length == len(body.data)
    body.release()
    body.release()
    assert ledger.held == 0 and not body.data


@pytest.fixture(scope="module")
def limits() -> Iterator[tuple[int, BodyLimit]]:
    """Port of a running server, and its body limit."""
    limit = BodyLimit(length_of_body, SETTINGS)
    app = Gate(limit, settings=SETTINGS, keys=None, metrics=Metrics(), open_paths=())
    protocol = protocol_class(SETTINGS)
    config = uvicorn.Config(
        app, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False, timeout_keep_alive=1
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()[1], limit
    server.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture
def port(limits: tuple[int, BodyLimit]) -> Iterator[int]:
    yield limits[0]
    patience = time.monotonic() + 5  # that a client has hung up is noticed a moment later
    while limits[1].ledger.held and time.monotonic() < patience:
        time.sleep(0.01)
    assert limits[1].ledger.held == 0, "bytes of a body are still counted"


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def read_all(connection: socket.socket) -> bytes:
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
    return data


def reply_to(port: int, data: bytes) -> tuple[int, Any]:
    """Send bytes, read one whole response until the server closes."""
    with connect(port) as connection:
        connection.sendall(data)
        return parsed(read_all(connection))


def parsed(reply: bytes) -> tuple[int, Any]:
    head, _, body = reply.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


def post(length: object, *headers: str) -> bytes:
    lines = ["POST / HTTP/1.1", "Host: x", *([f"Content-Length: {length}"] if length != "" else []), *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_control_a_body_within_bounds_arrives_whole(port: int) -> None:
    assert reply_to(port, post(1 << 20, "Connection: close") + b"x" * (1 << 20)) == (200, 1 << 20)


def test_a_declared_length_over_the_cap_is_refused_before_the_body(port: int) -> None:
    started = time.monotonic()
    with connect(port) as connection:
        connection.sendall(post(100 << 20))
        head = connection.recv(65536)
        assert head.startswith(b"HTTP/1.1 413 ")
        assert time.monotonic() - started < 1


@pytest.mark.parametrize("coding", ["gzip", "br", "identity, gzip"])
def test_a_compressed_body_is_refused(port: int, coding: str) -> None:
    status, body = reply_to(port, post(3, f"Content-Encoding: {coding}") + b"abc")
    assert (status, body["error"]["code"]) == (415, "unsupported_media_type")


def test_a_body_that_says_it_is_not_compressed(port: int) -> None:
    assert reply_to(port, post(3, "Content-Encoding: Identity") + b"abc") == (200, 3)


def test_an_endless_chunked_body_is_cut_off(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(post("", "Transfer-Encoding: chunked"))
        chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        sent = 0
        try:
            for _ in range(2000):
                connection.sendall(chunk)
                sent += 65536
        except OSError:
            pass  # the server closed: how much it took is judged below
        assert sent < 100 << 20 or read_all(connection).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_sends_all_before_it_reads_gets_its_answer(port: int) -> None:
    status, body = reply_to(port, post(4 << 20) + b"x" * (4 << 20))
    assert (status, body["error"]["code"]) == (413, "request_too_large")


def test_a_dripping_body_meets_its_deadline(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(post(1000))
        started = time.monotonic()
        try:
            for _ in range(40):
                connection.sendall(b"x")
                time.sleep(0.1)
        except OSError:
            pass
        assert time.monotonic() - started < 4
        status, body = parsed(read_all(connection))
        assert (status, body["error"]["code"]) == (408, "request_timeout")


def test_dripping_headers_meet_theirs(port: int) -> None:
    for start in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n"):
        with connect(port) as connection:
            connection.sendall(start)
            started = time.monotonic()
            reply = read_all(connection)
            assert time.monotonic() - started < 2
            assert reply == b"" if not start else parsed(reply)[0] == 408


def test_dripping_headers_on_a_used_connection(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
        connection.sendall(b"GET / HTTP/1.1\r\nHost")
        started = time.monotonic()
        assert parsed(read_all(connection))[0] == 408
        assert time.monotonic() - started < 2


def test_a_body_shorter_than_it_says_and_a_hang_up(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(post(1000) + b"x" * 10)
    assert reply_to(port, post(1, "Connection: close") + b"x") == (200, 1)


def test_a_body_longer_than_it_says_is_no_second_request(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(post(5) + b"x" * 50 + b"\r\n\r\n")
        reply = read_all(connection)
        assert reply.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 400 " in reply
        assert b'"code": "invalid_http"' in reply


@pytest.mark.parametrize(
    "data",
    [b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", post(-1), post("1e3"),
     post("5, 6"), post("9" * 5000), post("", "Transfer-Encoding: gzip"), b"GET / HTTP/1.1\r\n\r\n",
     b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"],
    ids=["words", "tls", "negative", "float", "two", "long", "coding", "no-host", "two-hosts"],
)  # fmt: skip
def test_what_is_not_http_gets_the_shape(port: int, data: bytes) -> None:
    status, body = reply_to(port, data)
    assert status in (400, 413, 431, 501)
    assert body["error"]["type"] == "invalid_request_error"


def test_endless_headers_are_cut_off(port: int) -> None:
    with connect(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")
        with pytest.raises(OSError):
            for _ in range(10_000):
                connection.sendall(b"A: " + b"a" * 10_000 + b"\r\n")


def test_all_bodies_together_are_bounded(port: int) -> None:
    with connect(port) as first, connect(port) as second:
        for connection in (first, second):
            connection.sendall(post(1 << 20) + b"x" * ((1 << 20) - 1))
        replies = sorted(parsed(read_all(connection))[0] for connection in (first, second))
        assert replies == [408, 429]


@pytest.mark.parametrize("slots", [1, 16])
def test_a_refused_client_waits_one_to_five_seconds(slots: int) -> None:
    pauses = [int(overloaded(waiting, slots).headers["retry-after"]) for waiting in range(200)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (1, 5)


def test_connections_are_bounded(port: int) -> None:
    held = [connect(port) for _ in range(CONNECTIONS)]
    try:
        with connect(port) as late:
            reply = read_all(late)
            status, body = parsed(reply)
            assert (status, body["error"]["type"]) == (429, "rate_limit_error")
            assert b"\r\nretry-after: 2\r\n" in reply
    finally:
        for connection in held:
            connection.close()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        if reply_to(port, post(1, "Connection: close") + b"x") == (200, 1):
            return
    pytest.fail("the connections were not given back")
