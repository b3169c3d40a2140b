"""What a client may keep open: requests that go on after their answer, answers that nobody takes."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

uvicorn = pytest.importorskip("uvicorn")

from vlm.serve import protocol  # noqa: E402
from vlm.serve.gate import Gate  # noqa: E402
from vlm.serve.keys import Keys, add_key  # noqa: E402
from vlm.serve.limits import BodyLimit  # noqa: E402
from vlm.serve.metrics import Metrics  # noqa: E402
from vlm.serve.settings import Settings  # noqa: E402

CONNECTIONS = 8
ANSWER = bytes(300_000)
CHUNKED = "Transfer-Encoding: chunked"
LONG = "Content-Length: 1000000"


async def answers(scope: Any, receive: Any, send: Any) -> None:
    """The same to everybody, whatever the body; of `/large` more than the kernel takes."""
    status = 404 if scope["path"] == "/nothing" else 200
    answer = ANSWER * 30 if scope["path"] == "/large" else ANSWER
    length = (b"content-length", b"%d" % len(answer))
    await send({"type": "http.response.start", "status": status, "headers": [length]})
    await send({"type": "http.response.body", "body": answer})


@contextmanager
def running(keys: Keys, **changes: Any) -> Iterator[tuple[int, Any]]:
    """Port and uvicorn's server of an application behind gate, limits and protocol."""
    settings = Settings(connections=CONNECTIONS, hosts=("x", "127.0.0.1"), **changes)
    paths = ("/", "/large", "/nothing")
    app = Gate(
        BodyLimit(answers, settings), settings=settings, keys=keys, metrics=Metrics(), open_paths=paths
    )
    config = uvicorn.Config(
        app, http=protocol.protocol_class(settings), ws="none", lifespan="off", log_config=None,
        access_log=False, timeout_graceful_shutdown=20,
    )  # fmt: skip
    server = protocol.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield port, server
        finally:
            server.should_exit = True
            thread.join(30)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    return path, add_key(path, "first")


@pytest.fixture(scope="module")
def port(key: tuple[Path, str]) -> Iterator[int]:
    with running(Keys.read(key[0]), write_seconds=0.5) as (port, _):
        yield port


def connect(port: int, window: int = 0) -> socket.socket:
    connection = socket.socket()
    if window:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    connection.settimeout(10)
    connection.connect(("127.0.0.1", port))
    return connection


def head(method: str, path: str, *lines: str, host: str = "x") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/1.1", f"Host: {host}", *lines, "", ""]).encode()


def read_answer(connection: socket.socket) -> tuple[bytes, bytes]:
    """Head and body of one answer that says how long it is."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(65536)
    top, _, body = data.partition(b"\r\n\r\n")
    length = int(next(line for line in top.split(b"\r\n") if line.startswith(b"content-length")).split()[1])
    while len(body) < length:
        body += connection.recv(65536)
    return top, body


def closes(connection: socket.socket, drip: bytes, seconds: float) -> bool:
    """Whether the server hangs up in time on a client that goes on sending."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            connection.sendall(drip)
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_an_answer_before_the_end_of_its_request_ends_the_connection(port: int) -> None:
    cases = [
        (b"401", head("POST", "/v1/chat/completions", LONG), b"x"),
        (b"401", head("POST", "/v1/chat/completions", CHUNKED), b"1\r\nx\r\n"),
        (b"403", head("POST", "/", LONG, host="evil"), b"x"),
        (b"200", head("GET", "/", LONG), b"x"),
        (b"404", head("GET", "/nothing", CHUNKED), b"1\r\nx\r\n"),
        (b"413", head("POST", "/", "Content-Length: 99999999999"), b"x"),
    ]
    with ExitStack() as stack:
        links = [stack.enter_context(connect(port)) for _ in cases]
        for link, (status, request, _) in zip(links, cases, strict=True):
            link.sendall(request)
            top, _ = read_answer(link)
            assert top.startswith(b"HTTP/1.1 " + status) and b"\r\nconnection: close" in top
        for link, (_, _, drip) in zip(links, cases, strict=True):
            assert closes(link, drip, 4)


def test_a_body_without_end_is_not_read_on_after_a_refusal(port: int) -> None:
    with connect(port) as link:
        link.sendall(head("POST", "/v1/chat/completions", CHUNKED))
        assert read_answer(link)[0].startswith(b"HTTP/1.1 401 ")
        assert closes(link, b"10000\r\n" + bytes(65536) + b"\r\n", 4)


def test_a_connection_is_kept_when_request_and_answer_are_whole(port: int, key: tuple[Path, str]) -> None:
    allowed = f"Authorization: Bearer {key[1]}"
    with connect(port) as link:
        for request, status in (
            (head("GET", "/"), b"200"),
            (head("POST", "/v1/models", "Content-Length: 5") + b"hello", b"401"),
            (head("POST", "/v1/models", allowed, "Content-Length: 5") + b"hello", b"200"),
            (head("POST", "/v1/models", CHUNKED) + b"5\r\nhello\r\n0\r\n\r\n", b"401"),
            (head("GET", "/nothing"), b"404"),
        ):
            link.sendall(request)
            top, _ = read_answer(link)
            assert top.startswith(b"HTTP/1.1 " + status) and b"connection: close" not in top


def test_the_official_client_is_told_that_its_key_is_wrong(port: int) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong", max_retries=0) as client:
        content = [{"type": "text", "text": "x" * (20 << 20)}]
        with pytest.raises(openai.AuthenticationError) as caught:
            client.chat.completions.create(model="m", messages=[{"role": "user", "content": content}])
    assert caught.value.code == "invalid_api_key"


def test_who_takes_no_answers_is_cut_off(port: int) -> None:
    """With one answer on its way, or with many."""
    with ExitStack() as stack:
        for number in range(CONNECTIONS):
            link = stack.enter_context(connect(port, window=2048))
            link.setblocking(False)
            link.send(head("GET", "/large") if number % 2 else head("GET", "/") * 100)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with connect(port) as other:
                other.sendall(head("GET", "/"))
                if other.recv(64).startswith(b"HTTP/1.1 200 "):
                    return
            time.sleep(0.1)
    pytest.fail("the connections were not given back")


def test_who_takes_an_answer_late_gets_all_of_it(port: int) -> None:
    with connect(port, window=2048) as link:
        link.sendall(head("GET", "/"))
        time.sleep(0.2)
        assert read_answer(link)[1] == ANSWER


def test_the_end_does_not_wait_for_who_takes_no_answers(
    key: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(protocol, "_FAREWELL_SECONDS", 0.3)
    with ExitStack() as links, running(Keys.read(key[0]), write_seconds=60) as (port, server):
        for number in range(4):
            link = links.enter_context(connect(port, window=2048))
            link.setblocking(False)
            link.send(head("GET", "/large") if number % 2 else head("GET", "/") * 100)
        time.sleep(0.5)
        started = time.monotonic()
        server.should_exit = True
        while server.server_state.connections:
            time.sleep(0.05)
            assert time.monotonic() - started < 5
    assert time.monotonic() - started < 5
    assert "Traceback" not in caplog.text and "CancelledError" not in caplog.text
