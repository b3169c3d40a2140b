"""API keys: made here, shown once, kept as SHA-256 and compared in constant time.

A key file has one key a line, `name sha256hex`; `#` begins a comment. Keys are 256 random bits, so a fast
hash without salt cannot be searched; keys that people invent are refused for the same reason.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from vlm.errors import ConfigError

PREFIX = "vlm-"
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64})\s+([0-9a-f]{64})")


def key_hash(key: str) -> str:
    """SHA-256 of a key, 64 hexadecimal digits."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class Keys:
    """The keys that open the server. Holds hashes only."""

    def __init__(self, hashes: tuple[str, ...]) -> None:
        self._hashes = hashes

    def __len__(self) -> int:
        return len(self._hashes)

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys of a file.

        Raises:
            ConfigError: the file is missing, holds no key, or a line is not `name sha256hex`.
        """
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"key file {path} cannot be read: {error}") from error
        hashes = []
        for number, line in enumerate(lines, 1):
            if not (text := line.partition("#")[0].strip()):
                continue
            if not (match := _LINE.fullmatch(text)):
                # The line itself may be a key somebody pasted, so it is not shown.
                raise ConfigError(
                    f"key file {path}, line {number}: not `name sha256`; make keys with `vlm serve keys add`"
                )
            hashes.append(match[2])
        if not hashes:
            raise ConfigError(f"key file {path} holds no key; make one: `vlm serve keys add --file {path}`")
        return cls(tuple(hashes))

    def opens(self, authorization: str) -> bool:
        """Whether an Authorization header's value holds one of the keys, in time that tells nothing."""
        scheme, _, key = authorization.partition(" ")
        offered = key_hash(key.strip())
        found = False
        for known in self._hashes:
            found |= hmac.compare_digest(offered, known)
        return found and scheme.lower() == "bearer"


def add_key(path: Path, name: str) -> str:
    """Make a key, append its hash to the file (created for its owner alone) and return the key.

    Raises:
        ConfigError: the name cannot be used or the file cannot be written.
    """
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise ConfigError(f"key name {name!r}: use 1 to 64 letters, digits, dots, dashes or underscores")
    key = PREFIX + secrets.token_urlsafe(32)
    try:
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+") as file:
            whole_lines = not (text := file.read()) or text.endswith("\n")
            file.write(f"{'' if whole_lines else chr(10)}{name} {key_hash(key)}\n")
    except OSError as error:
        raise ConfigError(f"key file {path} cannot be written: {error.strerror}") from error
    return key
