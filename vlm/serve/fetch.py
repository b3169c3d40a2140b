"""The one door to remote pictures, shut unless a host was named when the server was started.

Server-side request forgery is met four times over: the URL must match one strict grammar (no userinfo, no
brackets, no escapes in the host, https alone), its host must be on the list, every address that the host
resolves to must be public, and the address that is dialled is the one that was checked: the name is resolved
once for each hop and never again. Redirects come back through the same four. No proxy is read from the
environment, since nothing below asyncio's sockets is used.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass

import h11

from vlm.errors import UsageError
from vlm.serve.errors import APIError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[list[str]]]

_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = rf"(?:{_LABEL}\.)*{_LABEL}"
_URL = re.compile(
    rf"https://(?P<host>{_HOST})(?::(?P<port>[1-9][0-9]{{0,4}}))?"
    r"(?P<target>(?:/(?:[a-z0-9._~!$&'()*+,;=:@/-]|%[0-9a-f]{2})*)?"
    r"(?:\?(?:[a-z0-9._~!$&'()*+,;=:@/?-]|%[0-9a-f]{2})*)?)"
    r"(?:#[!-~]*)?",
    re.IGNORECASE | re.ASCII,
)
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
# Relays, documentation, and 192.0.0.0/24, of which Python's tables call a part public in some versions.
_UNUSUAL = ("2001::/23", "2002::/16", "3fff::/20", "192.88.99.0/24", "192.0.0.0/24")
_RELAYS = tuple(map(ipaddress.ip_network, _UNUSUAL))
_REDIRECTS = {301, 302, 303, 307, 308}
_CHUNK = 64 * 1024


@dataclass(frozen=True, slots=True)
class Target:
    """A URL after its one parse; the request is built from these fields, never from the text again."""

    host: str
    port: int
    path: str


def parse(url: str) -> Target | None:
    """The parts of a well-formed https URL of at most 2,048 characters, or None."""
    if len(url) > 2048 or not (match := _URL.fullmatch(url)):
        return None
    host, port, target = match["host"].lower(), int(match["port"] or 443), match["target"]
    if len(host) > 253 or port > 65535:
        return None
    return Target(host, port, target if target.startswith("/") else "/" + target)


def is_public(text: str) -> bool:
    """Whether an address may be dialled: global unicast, and no tunnel to an address that is not."""
    address: Address = ipaddress.ip_address(text)  # a zone ("%eth0") makes it link-local: refused below
    if address.version == 6 and (address not in _GLOBAL_V6 or getattr(address, "scope_id", None)):
        return False
    if any(address in net for net in _RELAYS if net.version == address.version):
        return False
    unwanted = address.is_multicast or address.is_reserved or address.is_loopback or address.is_link_local
    return address.is_global and not address.is_private and not unwanted


def allowed_hosts(names: Iterable[str]) -> frozenset[tuple[str, int]]:
    """`name` or `name:port` to (name, port) pairs; the port is 443 unless given.

    Raises:
        UsageError: a name is an address, a wildcard, or not a host name at all.
    """
    pairs = set()
    for name in names:
        target = parse(f"https://{name}")
        if target is None or target.path != "/" or "/" in name or target.host.split(".")[-1].isdigit():
            raise UsageError(f"image host {name!r}: give a plain host name, or name:port")
        pairs.add((target.host, target.port))
    return frozenset(pairs)


async def resolve(host: str, port: int) -> list[str]:
    """Every address of a name, as the system's resolver gives them."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(entry[4][0]) for entry in found]


def _refused(message: str) -> APIError:
    return APIError(400, message, code="image_url_not_allowed", param="messages")


def _failed(message: str) -> APIError:
    return APIError(400, message, code="invalid_image", param="messages")


class FetchDoor:
    """Fetches pictures from allowed hosts. The last three arguments exist so that tests can reach a local
    socket; the server leaves them alone."""

    def __init__(
        self,
        hosts: Iterable[str],
        *,
        max_bytes: int,
        seconds: float = 15.0,
        redirects: int = 3,
        resolver: Resolver = resolve,
        permitted: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._allowed = allowed_hosts(hosts)
        self._max_bytes = max_bytes
        self._seconds = seconds
        self._redirects = redirects
        self._resolver = resolver
        self._permitted = permitted
        self._tls = tls
        self._busy = asyncio.Semaphore(8)

    async def fetch(self, url: str) -> bytes:
        """The body behind an allowed URL.

        Raises:
            APIError: 400 `image_url_not_allowed` before any connection is made; 400 `invalid_image` when
                the host does not deliver in time or delivers too much.
        """
        if not self._allowed:
            raise _refused("Fetching pictures by URL is switched off; send them as data: URLs.")
        try:
            async with asyncio.timeout(self._seconds), self._busy:
                return await self._follow(url)
        except TimeoutError:
            raise _failed("The picture's host did not deliver in time.") from None
        except (OSError, ssl.SSLError, h11.RemoteProtocolError, UnicodeError):
            raise _failed("The picture could not be fetched from its host.") from None

    async def _follow(self, url: str) -> bytes:
        for _ in range(self._redirects + 1):
            target = self._admit(url)
            answer = await self._get(target, await self._addresses(target))
            if isinstance(answer, bytes):
                return answer
            url = self._absolute(answer.location, target)
        raise _failed("The picture's host redirects too often.")

    def _admit(self, url: str) -> Target:
        target = parse(url)
        if target is None:
            raise _refused("Pictures must be data: URLs or plain https:// URLs.")
        if (target.host, target.port) not in self._allowed:
            raise _refused("This server does not fetch pictures from that host.")
        return target

    async def _addresses(self, target: Target) -> list[str]:
        """Addresses to dial, each checked; one bad address refuses the name."""
        addresses = await self._resolver(target.host, target.port)
        if not addresses or not all(self._permitted(address) for address in addresses):
            raise _refused("This server does not fetch pictures from that host.")
        return addresses

    @staticmethod
    def _absolute(location: str, base: Target) -> str:
        """A Location header against the URL it came from; anything but two plain forms stays as it is and
        fails the grammar."""
        if location.startswith("/") and not location.startswith("//"):
            return f"https://{base.host}:{base.port}{location}"
        return location

    async def _get(self, target: Target, addresses: list[str]) -> bytes | _Redirect:
        tls = self._tls or ssl.create_default_context()
        error: OSError | None = None
        for address in addresses[:3]:
            try:
                reader, writer = await asyncio.open_connection(
                    address, target.port, ssl=tls, server_hostname=target.host
                )
            except OSError as failure:
                error = failure
                continue
            try:
                return await self._exchange(target, reader, writer)
            finally:
                writer.transport.abort()
        raise error or OSError("no address")

    async def _exchange(
        self, target: Target, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bytes | _Redirect:
        connection = h11.Connection(h11.CLIENT)
        name = target.host if target.port == 443 else f"{target.host}:{target.port}"
        headers = [
            ("Host", name),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        request = h11.Request(method="GET", target=target.path, headers=headers)
        writer.write((connection.send(request) or b"") + (connection.send(h11.EndOfMessage()) or b""))
        body = bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(_CHUNK))
            elif isinstance(event, h11.Response):
                if redirect := self._check(event):
                    return redirect
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self._max_bytes:
                    raise _failed("The picture behind the URL is too large.")
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)
            elif not isinstance(event, h11.InformationalResponse):
                raise _failed("The picture's host closed the connection early.")

    def _check(self, response: h11.Response) -> _Redirect | None:
        """Judge a response by its head: a redirect to follow, or None to read on."""
        headers = {bytes(name): bytes(value) for name, value in response.headers}
        if response.status_code in _REDIRECTS and b"location" in headers:
            return _Redirect(headers[b"location"].decode("latin-1"))
        if response.status_code != 200:
            raise _failed(f"The picture's host answered with status {response.status_code}.")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise _failed("The picture's host sent a compressed body.")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max_bytes:
            raise _failed("The picture behind the URL is too large.")
        return None


@dataclass(frozen=True, slots=True)
class _Redirect:
    location: str
