"""Keys, overload, deadlines, the end: a small server (one slot, one waiting, locked) pushed to its bounds."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def small(start: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    from vlm.serve.keys import add_key

    path = tmp_path_factory.mktemp("keys") / "keys.txt"
    add_key(path, "first")
    key = add_key(path, "second")
    options = ["--api-key-file", str(path), "--slots", "1", "--queue", "1", "--deadline", "10"]
    return start(*options, "--allow-origin", "https://chat.example", key=key)


def open_stream(server: Any, make: Any, tokens: int = 1000, stream: bool = True) -> socket.socket:
    """A request whose answer runs on, sent and left open."""
    body = json.dumps(
        {"model": "model", "messages": [make.user("Tell a long story.", make.url(3))], "max_tokens": tokens,
         "temperature": 2, "seed": 5, "stream": stream}
    ).encode()  # fmt: skip
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    connection.sendall(head.encode() + body)
    return connection


def read_all(connection: socket.socket) -> str:
    data = b""
    while chunk := connection.recv(65536):
        data += chunk
        if b"\r\n0\r\n\r\n" in data:
            break
    return data.decode()


def waits_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def numbers(server: Any) -> tuple[int, int]:
    return int(server.metric("vlm_answers_running ")), int(server.metric("vlm_answers_waiting "))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("GET", path) for path in (
            "/ready", "/metrics", "/v1/models", "/v1/models/model", "/v1/page", "/openapi.json", "/docs",
            "/nothing", "//health", "/health/", "/health/../metrics", "/HEALTH", "/page/",
            "/page/../v1/models", "/v1/models?path=/health", "/v1/models;/health",
        )),
        ("POST", "/v1/chat/completions"), ("POST", "/v1/feedback"), ("OPTIONS", "/v1/models"),
        ("BREW", "/v1/models"), ("HEAD", "/v1/models"),
    ],
)  # fmt: skip
def test_without_a_key_nothing_answers(small: Any, method: str, path: str) -> None:
    with closing(socket.create_connection(("127.0.0.1", small.port), timeout=20)) as connection:
        connection.sendall(f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        reply = read_all(connection)
    assert reply.startswith("HTTP/1.1 401 ")
    assert "www-authenticate: Bearer" in reply


@pytest.mark.parametrize(
    "path", ["/health", "/", "/page/page.js", "/page/style.css", "/page/samples/cat.jpg"]
)
def test_health_and_the_page_answer_without_a_key(small: Any, path: str) -> None:
    assert httpx.get(small.url + path).status_code == 200


@pytest.mark.parametrize(
    "key", ["", "Bearer", "Bearer x", "Basic {key}", "Bearer {key} x", "Token {key}", "{key}"]
)
def test_wrong_keys(small: Any, key: str) -> None:
    headers = {"Authorization": key.format(key=small.key)}
    reply = httpx.get(f"{small.url}/v1/models", headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")


def test_a_key_opens_and_bodies_of_strangers_are_not_read(small: Any) -> None:
    assert httpx.get(f"{small.url}/v1/models", headers=small.headers).status_code == 200
    with closing(socket.create_connection(("127.0.0.1", small.port), timeout=20)) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")


def test_cors_for_the_named_origin_alone(small: Any) -> None:
    ask = {"Access-Control-Request-Method": "POST"}
    url = f"{small.url}/v1/chat/completions"
    named = httpx.options(url, headers={**ask, "Origin": "https://chat.example"})
    assert named.status_code == 204
    assert named.headers["access-control-allow-origin"] == "https://chat.example"
    other = httpx.options(url, headers={**ask, "Origin": "https://evil.example"})
    assert other.status_code == 401
    assert "access-control-allow-origin" not in other.headers
    refused = httpx.post(url, headers={"Origin": "https://chat.example"})
    assert refused.headers["access-control-allow-origin"] == "https://chat.example"
    assert refused.headers["access-control-expose-headers"] == "retry-after, x-request-id"


def test_cors_lets_openais_javascript_client_in(small: Any) -> None:
    wanted = "authorization,content-type,x-stainless-arch,x-stainless-retry-count, X-Stainless-Lang"
    ask = {"Access-Control-Request-Method": "POST", "Origin": "https://chat.example"}
    ask["Access-Control-Request-Headers"] = f"{wanted},x-evil"
    reply = httpx.options(f"{small.url}/v1/chat/completions", headers=ask)
    allowed = reply.headers["access-control-allow-headers"].split(", ")
    assert {name.strip().lower() for name in wanted.split(",")} == set(allowed)


def test_a_full_queue_gives_429_and_leaving_it_frees_it(small: Any, make: Any) -> None:
    with closing(open_stream(small, make)) as running:
        assert waits_for(lambda: numbers(small) == (1, 0), 20)
        with closing(open_stream(small, make)):
            assert waits_for(lambda: numbers(small) == (1, 1), 20)
            reply = small.chat(messages=[make.user("And me?")])
            assert (reply.status_code, reply.json()["error"]["type"]) == (429, "rate_limit_error")
            assert 1 <= int(reply.headers["retry-after"]) <= 5
        assert waits_for(lambda: numbers(small)[1] == 0, 1.0)
        running.close()
        assert waits_for(lambda: numbers(small) == (0, 0), 1.0)
    assert small.chat(messages=[make.user("And now?")]).status_code == 200


def test_a_deadline_in_mid_stream_is_an_error_frame_without_done(small: Any, make: Any) -> None:
    running = open_stream(small, make)
    assert waits_for(lambda: numbers(small) == (1, 0), 20)
    waiting = open_stream(small, make, stream=False)
    with closing(running), closing(waiting):
        reply = read_all(running)
        assert reply.startswith("HTTP/1.1 200 ")
        assert '"code": "deadline_exceeded"' in reply or '"code":"deadline_exceeded"' in reply
        assert "[DONE]" not in reply
        head = waiting.recv(65536).decode()
        assert head.startswith("HTTP/1.1 504 ")
    assert waits_for(lambda: numbers(small) == (0, 0), 5)


def test_logs_and_metrics_hold_nothing_of_users(small: Any, make: Any) -> None:
    secret = "zebrafish-7231"
    small.chat(messages=[make.user(f"Is {secret} here?", make.url(1))])
    small.chat(messages=[make.user(secret, f"https://example.com/{secret}.png?{secret}")])
    small.chat(model=secret, messages=[])
    httpx.get(f"{small.url}/{secret}?q={secret}", headers=small.headers)
    httpx.get(f"{small.url}/v1/models/{secret}?q={secret}", headers=small.headers)
    httpx.get(f"{small.url}/v1/models", headers={"Authorization": f"Bearer {secret}"})
    metrics = httpx.get(f"{small.url}/metrics", headers=small.headers).text
    log = "".join(small.log)
    assert "/v1/chat/completions" in log and "/v1/chat/completions" in metrics
    for text in (log, metrics):
        assert secret not in text and small.key not in text and "base64" not in text


def test_sigterm_finishes_streams_and_exits_with_0(small: Any, make: Any) -> None:
    stream = open_stream(small, make, tokens=8)
    assert waits_for(lambda: numbers(small)[0] == 1, 20)
    codes: list[int] = []
    stopper = threading.Thread(target=lambda: codes.append(small.stop()))
    stopper.start()
    with closing(stream):
        reply = read_all(stream)
    stopper.join(30)
    assert "data: [DONE]" in reply
    assert len(re.findall('"content":', reply)) >= 1
    assert codes == [0]
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", small.port), timeout=2)


def test_told_twice_it_ends_at_once_with_refusals(start: Callable[..., Any], make: Any) -> None:
    server = start("--slots", "1")
    with closing(open_stream(server, make)) as stream:
        assert waits_for(lambda: numbers(server) == (1, 0), 20)
        with closing(open_stream(server, make, stream=False)) as waiting:
            assert waits_for(lambda: numbers(server) == (1, 1), 20)
            for _ in range(2):
                server.process.send_signal(signal.SIGINT)
                time.sleep(0.5)
            begun, whole = read_all(stream), read_all(waiting)
    assert server.process.wait(20) == 0
    assert '"code":"not_ready"' in begun and "[DONE]" not in begun
    assert whole.startswith("HTTP/1.1 503 ") and '"code":"not_ready"' in whole
    assert "Traceback" not in "".join(server.log)


def test_origins_and_hosts_are_compared_as_browsers_write_them() -> None:
    from vlm.serve.gate import host_name, origin

    given = ["https://Chat.Example", "http://localhost:3000", "http://[::1]:3000", "app://x"]
    assert list(map(origin, given)) == [text.lower() for text in given]
    assert list(map(host_name, ["Ask.Example", "my_host", "[::1]", "192.0.2.7"])) == [
        "ask.example", "my_host", "[::1]", "192.0.2.7",
    ]  # fmt: skip


def test_one_port_is_listened_on_once() -> None:
    from vlm.errors import ConfigError
    from vlm.serve.main import _bind

    with closing(_bind("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1 port {port}"):
            _bind("127.0.0.1", port)
        with closing(socket.create_connection(("127.0.0.1", port), timeout=2)):
            pass


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_a_public_address_without_a_key_is_refused(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    from vlm.cli import main

    assert main(["serve", "--host", host, "--port", "0"]) == 2
    assert "--api-key-file" in capsys.readouterr().err


def test_a_public_address_without_a_key_can_be_forced(tmp_path: Path) -> None:
    """It gets as far as the adapter, which is not there."""
    command = [sys.executable, "-m", "vlm", "serve", "--host", "0.0.0.0", "--port", "0", "--offline"]
    done = subprocess.run(
        [*command, "--insecure-public", "--adapter", str(tmp_path / "none")], cwd=ROOT, capture_output=True,
        text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "--api-key-file" not in done.stderr and "none" in done.stderr


def test_wrong_options_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from vlm.cli import main

    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = str(taken.getsockname()[1])
        for options in (
            ["--port", port],
            ["--port", "99999"],
            ["--slots", "0"],
            ["--deadline", "0"],
            *(
                ["--allow-origin", text]
                for text in (
                    "*",
                    "null",
                    "chat.example",
                    "https://",
                    "https://chat.example/",
                    "https://chat.example/x",
                    "https://chat.example:443",
                    "http://chat.example:80",
                    "https://a b",
                )
            ),
            *(
                ["--allow-host", text]
                for text in (
                    "*",
                    "",
                    "ask.example:8000",
                    "https://ask.example",
                    "ask.example/",
                    "::1",
                    "[::1]:8000",
                )
            ),
            ["--allow-image-host", "10.0.0.1"],
            ["--api-key-file", str(tmp_path / "none")],
        ):
            assert main(["serve", *options]) == (
                1 if options[1] == port or options[0] == "--api-key-file" else 2
            )
            error = capsys.readouterr().err
            assert error.startswith("error: ") and error.count("\n") == 1
            assert not options[0].startswith(("--allow-o", "--allow-h", "--d")) or options[0] in error
    for seconds in ("nan", "inf", "-inf", "1e999", "soon"):
        with pytest.raises(SystemExit) as caught:
            main(["serve", f"--deadline={seconds}"])
        assert caught.value.code == 2 and "no number of seconds" in capsys.readouterr().err
    assert main(["serve", "feedback", "export", "--db", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    assert "no feedback database" in capsys.readouterr().err
