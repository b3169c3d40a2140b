"""What the person who runs the server decides, and the bounds that hold when nothing is said."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MIB = 1 << 20


@dataclass(frozen=True)
class Settings:
    """One server's bounds and permissions. Times are seconds, sizes bytes unless a name says otherwise."""

    image_hosts: tuple[str, ...] = ()
    """Hosts (`name` or `name:port`) whose https pictures may be fetched; none means no fetching at all."""
    hosts: tuple[str, ...] = ()
    """Names accepted in the Host header; empty accepts any (a server behind a key or a proxy)."""
    origins: tuple[str, ...] = ()
    """Origins that browsers may call from (CORS); none means the server's own page alone."""
    feedback: Path | None = None
    """The SQLite file for thumbs and corrections; None switches the feature off."""

    max_body: int = 32 * MIB
    """One request's body."""
    max_bodies: int = 160 * MIB
    """All bodies being held at once; past it requests are told to come back (429)."""
    max_structure: int = 50_000
    """Brackets, braces and commas in one JSON body: bounds what parsing can cost."""
    header_seconds: float = 15.0
    """From the opening of a connection to the end of its first request's headers."""
    body_seconds: float = 30.0
    """From the headers to the last byte of the body."""
    write_seconds: float = 20.0
    """That a client may leave a piece of an answer untaken."""

    max_images: int = 8
    max_image_bytes: int = 20 * MIB
    max_pixels: int = 50_000_000
    max_text: int = 32_000
    """Characters of all messages together, counted before anything is tokenised."""
    context: int = 2048
    """Tokens of a conversation and its answer together: bounds memory, and how long others wait."""

    attention_tokens: int = 512
    """Tokens of a conversation and its answer whose grounds may be asked for: going back through the model
    cannot be done in slices, so that all others wait for it."""

    slots: int = 16
    """Answers decoded side by side."""
    queue: int = 64
    """Answers waiting for a slot; one more is refused with 429."""
    deadline: float = 120.0
    """From the request's admission to its last token."""
    connections: int = 512
    """Open TCP connections."""
    default_new_tokens: int = 128
    max_new_tokens: int = 1024
    cached_features: int = 64 * MIB
    """Image features kept in memory, least recently used out first: of the default encoder, 500 pictures'."""
    cached_latents: int = 64 * MIB
    """What the adapter makes of them, likewise: of the default adapter, 1,300 pictures'."""
    workers: int = 2
    """Threads that open and encode pictures; at most this many decoded pictures exist at a time."""

    fetch_seconds: float = 15.0
    fetch_redirects: int = 3

    feedback_entries: int = 100_000
    feedback_bytes: int = 2048 * MIB
