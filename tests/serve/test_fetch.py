"""The fetch door against a real listening socket that counts who comes."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("fastapi")
trustme = pytest.importorskip("trustme")

from vlm.errors import ConfigError  # noqa: E402
from vlm.serve.errors import APIError  # noqa: E402
from vlm.serve.fetch import FetchDoor, allowed_hosts, is_public, parse  # noqa: E402

if TYPE_CHECKING:
    from vlm.model import VLM

HOST = "pictures.example"
CA = trustme.CA()
CERT = CA.issue_cert(HOST, "other.example")
CLIENT_TLS = ssl.create_default_context()
CA.configure_trust(CLIENT_TLS)
SERVER_TLS = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
CERT.configure_cert(SERVER_TLS)


class Listener:
    """A TLS server on loopback: counts TCP connections, keeps requests, answers what it is told."""

    def __init__(self, reply: bytes, *, drip: float = 0.0) -> None:
        self.reply, self.drip = reply, drip
        self.connections = 0
        self.requests: list[bytes] = []
        self.port = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            if not self.tls:
                return
            await writer.start_tls(SERVER_TLS)
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            for byte in (self.reply[i : i + 1] for i in range(len(self.reply) if self.drip else 0)):
                writer.write(byte)
                await writer.drain()
                await asyncio.sleep(self.drip)
            if not self.drip:
                writer.write(self.reply)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass  # the door hung up, as it should on too much or too late
        finally:
            writer.close()

    @asynccontextmanager
    async def open(self, *, tls: bool = True) -> AsyncIterator[Listener]:
        self.tls = tls
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        async with server:
            yield self


def ok(body: bytes, extra: str = "") -> bytes:
    return f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body


def redirect(location: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


def answers(*addresses: str) -> Callable[[str, int], object]:
    async def resolver(host: str, port: int) -> list[str]:
        return list(addresses)

    return resolver


def loopback_door(port: int, **options: object) -> FetchDoor:
    """A door that may reach the listener: the control that shows the counting works."""
    settings = {"resolver": answers("127.0.0.1"), "permitted": lambda address: True, "max_bytes": 1000}
    settings["tls"] = CLIENT_TLS
    return FetchDoor([f"{HOST}:{port}", f"other.example:{port}"], **(settings | options))


async def refusal(door: FetchDoor, url: str) -> APIError:
    with pytest.raises(APIError) as caught:
        await door.fetch(url)
    assert caught.value.status == 400
    return caught.value


def test_control_an_allowed_host_is_fetched_and_counted() -> None:
    async def main() -> None:
        async with Listener(ok(b"picture")).open() as listener:
            door = loopback_door(listener.port)
            assert (
                await door.fetch(f"https://{HOST.upper()}:{listener.port}/a%20b.png?x=1#part") == b"picture"
            )
            assert listener.connections == 1
            assert listener.requests[0].startswith(b"GET /a%20b.png?x=1 HTTP/1.1\r\n")
            assert f"Host: {HOST}:{listener.port}\r\n".encode() in listener.requests[0]

    asyncio.run(main())


ADDRESSES = json.loads((Path(__file__).parent / "addresses.json").read_text("utf-8"))
FORMS, PRIVATE = ADDRESSES["forms"], ADDRESSES["private"]


def test_no_address_form_makes_a_connection() -> None:
    assert len(set(FORMS)) >= 40

    async def main() -> None:
        async with Listener(ok(b"secret")).open(tls=False) as listener:
            door = loopback_door(listener.port)
            for form in FORMS:
                error = await refusal(door, form.format(p=listener.port))
                assert error.code == "image_url_not_allowed", form
            assert listener.connections == 0

    asyncio.run(main())


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700::6810:84e5", "2a00:1450::1"])
def test_public_addresses_are(address: str) -> None:
    assert is_public(address)


def test_a_name_with_any_private_address_is_never_dialled() -> None:
    async def main() -> None:
        async with Listener(ok(b"secret")).open(tls=False) as listener:
            for address in PRIVATE:
                for found in ([address], ["8.8.8.8", address]):
                    door = loopback_door(listener.port, resolver=answers(*found), permitted=is_public)
                    error = await refusal(door, f"https://{HOST}:{listener.port}/")
                    assert error.code == "image_url_not_allowed"
            assert listener.connections == 0

    asyncio.run(main())


def test_a_name_that_changes_its_answer_is_resolved_once() -> None:
    calls = []

    async def main() -> None:
        async with Listener(ok(b"secret")).open(tls=False) as listener:

            async def turncoat(host: str, port: int) -> list[str]:
                calls.append(host)
                return ["192.0.2.1"] if len(calls) == 1 else ["127.0.0.1"]

            # The first answer passes the check and leads nowhere; the second would lead to the listener.
            door = loopback_door(
                listener.port,
                resolver=turncoat,
                permitted=lambda address: address == "192.0.2.1",
                seconds=0.5,
            )
            await refusal(door, f"https://{HOST}:{listener.port}/")
            assert len(calls) == 1
            assert listener.connections == 0
            error = await refusal(door, f"https://{HOST}:{listener.port}/")
            assert error.code == "image_url_not_allowed"
            assert listener.connections == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    "location",
    ["https://127.0.0.1:{p}/", "http://pictures.example:{p}/", "//127.0.0.1:{p}/", "https://[::1]:{p}/",
     "https://private.example:{p}/", "\\\\127.0.0.1:{p}/", "/\\127.0.0.1:{p}", "file:///etc/passwd"],
)  # fmt: skip
def test_redirects_go_through_the_same_door(location: str) -> None:
    async def main() -> None:
        async with (
            Listener(ok(b"secret")).open(tls=False) as inner,
            Listener(redirect(location.format(p=inner.port))).open() as outer,
        ):
            error = await refusal(loopback_door(outer.port), f"https://{HOST}:{outer.port}/")
            assert error.code == "image_url_not_allowed"
            assert (outer.connections, inner.connections) == (1, 0)

    asyncio.run(main())


def test_an_allowed_redirect_to_a_private_address_is_not_followed() -> None:
    async def main() -> None:
        async with (
            Listener(ok(b"secret")).open(tls=False) as inner,
            Listener(redirect(f"https://other.example:{inner.port}/")).open() as outer,
        ):

            async def resolver(host: str, port: int) -> list[str]:
                return ["127.0.0.1"] if host == HOST else ["10.0.0.1", "127.0.0.1"]

            door = FetchDoor(
                [f"{HOST}:{outer.port}", f"other.example:{inner.port}"], max_bytes=100, tls=CLIENT_TLS,
                resolver=resolver, permitted=lambda address: address != "10.0.0.1",
            )  # fmt: skip
            error = await refusal(door, f"https://{HOST}:{outer.port}/")
            assert error.code == "image_url_not_allowed"
            assert (outer.connections, inner.connections) == (1, 0)

    asyncio.run(main())


def test_a_redirect_within_the_host_is_followed_and_a_circle_ends() -> None:
    async def main() -> None:
        async with (
            Listener(ok(b"picture")).open() as inner,
            Listener(redirect(f"https://other.example:{inner.port}/x")).open() as outer,
        ):
            hosts = [f"{HOST}:{outer.port}", f"other.example:{inner.port}"]
            door = FetchDoor(
                hosts,
                max_bytes=99,
                resolver=answers("127.0.0.1"),
                permitted=lambda a: True,
                tls=CLIENT_TLS,
            )
            assert await door.fetch(f"https://{HOST}:{outer.port}/") == b"picture"
        async with Listener(redirect("/again")).open() as circle:
            assert (await refusal(loopback_door(circle.port), f"https://{HOST}:{circle.port}/")).code == (
                "invalid_image"
            )
            assert circle.connections == 4

    asyncio.run(main())


@pytest.mark.parametrize(
    "reply",
    [
        ok(b"x" * 1001),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + (b"200\r\n" + b"x" * 512 + b"\r\n") * 2,
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 5000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort",
        ok(b"x", "Content-Encoding: gzip\r\n"),
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"",
    ],
    ids=["long", "chunked", "endless", "claims", "short", "gzip", "404", "not-http", "nothing"],
)  # fmt: skip
def test_bad_replies_are_refused(reply: bytes) -> None:
    async def main() -> None:
        async with Listener(reply).open() as listener:
            error = await refusal(loopback_door(listener.port), f"https://{HOST}:{listener.port}/")
            assert error.code == "invalid_image"

    asyncio.run(main())


def test_a_dripping_host_meets_the_deadline() -> None:
    async def main() -> None:
        async with Listener(ok(b"x" * 900), drip=0.05).open() as listener:
            started = asyncio.get_running_loop().time()
            error = await refusal(
                loopback_door(listener.port, seconds=0.4), f"https://{HOST}:{listener.port}/"
            )
            assert error.code == "invalid_image"
            assert asyncio.get_running_loop().time() - started < 3

    asyncio.run(main())


def test_a_wrong_certificate_is_refused() -> None:
    async def main() -> None:
        async with Listener(ok(b"picture")).open() as listener:
            door = loopback_door(listener.port, tls=ssl.create_default_context())
            assert (await refusal(door, f"https://{HOST}:{listener.port}/")).code == "invalid_image"
            assert listener.requests == []

    asyncio.run(main())


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with Listener(b"").open(tls=False) as proxy, Listener(ok(b"picture")).open() as listener:
            for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            assert await loopback_door(listener.port).fetch(f"https://{HOST}:{listener.port}/") == b"picture"
            assert proxy.connections == 0

    asyncio.run(main())


def test_a_fetched_picture_is_asked_about_like_one_that_was_sent(
    make_tiny: Callable[..., VLM], make: Any
) -> None:
    """Over two allowed hosts, through the desk that serves requests, and into the same row and numbers."""
    import torch

    from vlm.serve.cache import Latents
    from vlm.serve.metrics import Metrics
    from vlm.serve.pictures import Desk
    from vlm.serve.schemas import Message
    from vlm.serve.settings import Settings

    model = make_tiny()

    async def main() -> None:
        picture = make.png(make.picture(1))
        async with Listener(ok(picture)).open() as listener:
            door = loopback_door(listener.port, max_bytes=100_000)
            desk = Desk(model, Latents(model, 0, Metrics()), Settings(), door)
            urls = [f"https://{HOST}:{listener.port}/a", f"https://other.example:{listener.port}/b"]
            asked = []
            for first, second in (urls, [make.data_url(picture)] * 2):
                message = Message.model_validate(make.user("Are they alike?", first, second))
                asked.append(await desk.question([message]))
            assert listener.connections == 2
            fetched, sent = asked
            assert fetched.row == sent.row
            assert torch.equal(fetched.features, sent.features)
            assert torch.equal(fetched.latents, sent.latents) and len(fetched.latents) == 2
            message = Message.model_validate(
                make.user("And this?", f"https://third.example:{listener.port}/")
            )
            with pytest.raises(APIError) as caught:
                await desk.question([message])
            assert caught.value.code == "image_url_not_allowed"
            assert listener.connections == 2
            desk.close()

    asyncio.run(main())


def test_off_by_default() -> None:
    async def main() -> None:
        error = await refusal(FetchDoor([], max_bytes=10), f"https://{HOST}/")
        assert error.code == "image_url_not_allowed"

    asyncio.run(main())


@pytest.mark.parametrize(
    "name",
    ["127.0.0.1", "*.example", "", "a b", "https://a.example", "a.example/", "[::1]", "a.example/path",
     "u@a.example", "0x7f000001.1", "a.example:99999"],
)  # fmt: skip
def test_hosts_that_cannot_be_allowed(name: str) -> None:
    with pytest.raises(ConfigError):
        allowed_hosts([name])


def test_hosts_that_can() -> None:
    assert allowed_hosts(["A.example", "b:8443"]) == {("a.example", 443), ("b", 8443)}
    assert parse("https://a.example?q") is not None and parse("https://a.example?q").path == "/?q"
