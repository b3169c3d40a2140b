"""Hostile uploads against the whole server: refused early, with memory near that of idling."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import httpx
import pytest
from PIL import Image

pytest.importorskip("fastapi")
MIB = 1 << 20


@contextmanager
def memory_within(server: Any, bound: int) -> Iterator[None]:
    """Fails when the server's resident memory rises by more than `bound` bytes at any moment inside."""
    idle = server.memory()
    peak = [idle]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            peak.append(server.memory())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    assert max(peak) - idle < bound, f"{(max(peak) - idle) / MIB:.0f} MiB above idle"


@pytest.fixture(scope="module", autouse=True)
def warm(server: Any, make: Any) -> None:
    assert server.chat(messages=[make.user("Warm up.", make.url(1))]).status_code == 200


def bomb(side: int) -> bytes:
    """A PNG that claims side x side pixels and holds a few."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10_000)))
        + chunk(b"IEND", b"")
    )


def repeated(kind: str) -> bytes:
    """A small JPEG with 5 million empty notes, or with its last scan 3,000 times more."""
    out = BytesIO()
    image = Image.new("L", (4_000, 4_000) if kind == "scans" else (64, 64), 100)
    image.save(out, "JPEG", progressive=kind == "scans")
    content = out.getvalue()
    if kind == "scans":
        return content[:-2] + content[content.rindex(b"\xff\xda") : -2] * 3_000 + content[-2:]
    return content[:2] + b"\xff\xe9\0\2" * ((19 * MIB) // 4) + content[2:]


@pytest.mark.parametrize(("kind", "bound"), [("scans", 50 * MIB), ("notes", 200 * MIB)])
def test_a_jpeg_that_goes_on_and_on(server: Any, make: Any, kind: str, bound: int) -> None:
    """What 20 MB of notes take is the request itself, as text and as bytes."""
    message = make.user("What?", make.data_url(repeated(kind), "image/jpeg"))
    with memory_within(server, bound):
        started = time.monotonic()
        reply = server.chat(messages=[message])
        assert time.monotonic() - started < 10
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_image")


def test_words_do_not_wait_behind_pictures(make_tiny: Callable[..., Any], make: Any) -> None:
    """A desk whose only thread for pictures is busy goes on to read questions without any."""
    from vlm.serve.cache import Latents
    from vlm.serve.fetch import FetchDoor
    from vlm.serve.metrics import Metrics
    from vlm.serve.pictures import Desk
    from vlm.serve.schemas import Message
    from vlm.serve.settings import Settings

    model = make_tiny()
    free = threading.Event()

    async def main() -> None:
        desk = Desk(model, Latents(model, 0, Metrics()), Settings(workers=1), FetchDoor([], max_bytes=10))
        busy = asyncio.ensure_future(desk.run(free.wait))
        try:
            words = Message.model_validate(make.user("What is the answer?"))
            question = await asyncio.wait_for(desk.question([words]), 30)
            assert question.prompt_tokens > 0 and len(question.latents) == 0
            shown = Message.model_validate(make.user("What is it?", make.url(1)))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(desk.question([shown]), 0.5)
            assert not busy.done()
        finally:
            free.set()
            await busy
            desk.close()

    asyncio.run(main())


def test_a_header_of_60_000_by_60_000(server: Any, make: Any) -> None:
    with memory_within(server, 50 * MIB):
        started = time.monotonic()
        reply = server.chat(messages=[make.user("What?", make.data_url(bomb(60_000)))])
        assert time.monotonic() - started < 5
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_image")


def test_a_data_url_of_100_mb(server: Any, make: Any) -> None:
    body = json.dumps(
        {"model": "model", "messages": [make.user("What?", "data:image/png;base64," + "A" * (100 * MIB))]}
    )
    with memory_within(server, 50 * MIB):
        reply = httpx.post(
            f"{server.url}/v1/chat/completions",
            content=body,
            headers={"Content-Type": "application/json"},
            timeout=60,
        )
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "request_too_large")


def test_a_chunked_body_without_end(server: Any) -> None:
    sent = 0
    with (
        memory_within(server, 50 * MIB),
        socket.create_connection(("127.0.0.1", server.port), timeout=30) as link,
    ):
        link.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"100000\r\n" + b"x" * MIB + b"\r\n"
        try:
            while sent < 1000 * MIB:
                link.sendall(chunk)
                sent += MIB
        except OSError:
            pass  # hung up on, as it should be
    assert 1 * MIB < sent < 1000 * MIB


def test_dripping_and_lying_bodies_cost_nothing(server: Any) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with memory_within(server, 50 * MIB):
        links = [socket.create_connection(("127.0.0.1", server.port), timeout=30) for _ in range(50)]
        for link in links:
            link.sendall(head + b"Content-Length: 30000000\r\n\r\n{")
        assert httpx.get(f"{server.url}/health").status_code == 200
        for link in links:
            link.close()
        with socket.create_connection(("127.0.0.1", server.port), timeout=30) as link:
            link.sendall(head + b"Content-Length: 999999999999\r\n\r\n{")
            assert link.recv(4096).startswith(b"HTTP/1.1 413 ")


def test_a_body_of_brackets(server: Any) -> None:
    with memory_within(server, 50 * MIB):
        reply = httpx.post(
            f"{server.url}/v1/chat/completions", content=b"[" + b"{}," * (10 * MIB) + b"{}]",
            headers={"Content-Type": "application/json"}, timeout=60,
        )  # fmt: skip
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_json")


def test_the_page_of_the_server_is_alive_after_all_that(server: Any, make: Any) -> None:
    assert server.chat(messages=[make.user("Still there?", make.url(1))]).status_code == 200
    assert server.process.poll() is None
