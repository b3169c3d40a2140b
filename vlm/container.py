"""What makes the picture among a file's bytes, found before any decoder sees them.

    parts_of(content)  ->  the file without its notes, and what they told of

Decoders keep what they meet (comments, profiles, texts, EXIF) many times over, and take microseconds for
the smallest piece. They are given the first picture alone, from a file of not too many pieces.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["JPEG", "PNG", "GIF", "WEBP"]

MAX_PIECES: Final = 2_000
"""Segments, chunks or extensions besides those that hold pixels."""
MAX_DATA: Final = 100_000
"""Chunks of pixels, frames of an animation, blocks of a note: each costs about a microsecond."""
MAX_SCANS: Final = 100
MAX_SCANNED: Final = 1_200_000_000
"""Pixels that all scans of a JPEG pass over together, at some nanoseconds each; 20 scans are always read."""
MAX_TABLES: Final = 1 << 16
"""Bytes of a JPEG's quantization tables; four tables, of 130 bytes each, are in use at a time."""

_PNG: Final = b"\x89PNG\r\n\x1a\n"
_PNG_END: Final = b"\0\0\0\0IEND\xae\x42\x60\x82"
_ORIENTATION: Final = 0x0112
_WHOLE_NUMBERS: Final = {3: "H", 4: "I"}  # by EXIF's number of the type

_APP1, _SOS, _EOI, _DQT = 0xE1, 0xDA, 0xD9, 0xDB
_BARE: Final = frozenset({0x01, *range(0xD0, 0xD9)})
"""Markers without a length: restarts and the like, which mean nothing outside a scan."""
_NOTES: Final = frozenset({0xFE, *range(0xE1, 0xF0)} - {0xEE})
"""Comments and applications' segments, but for APP0 and APP14, which tell how colours are meant."""
_FRAMES: Final = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_SEQUENTIAL: Final = frozenset({0xC0, 0xC1, 0xC9})
_MARKER: Final = re.compile(rb"\xff[\x01-\xfe]")
_SCAN_END: Final = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_GIF_BLOCK: Final = re.compile(rb"[!,;]")


class Refused(Exception):
    """A file that asks for too much; the text goes on after its name."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a file's frame says of its first picture."""

    kind: Kind
    length: int
    """Bytes that the decoder is given."""
    size: tuple[int, int]
    """Width and height; of a damaged file any numbers."""
    turn: int = 1
    """EXIF orientation, 1 to 8."""
    coefficients: int = 0
    """Bytes that a JPEG of several scans takes until its last scan has been read."""


def kind_of(content: bytes) -> Kind | None:
    """What a file is by its first bytes; None for another kind than the four."""
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if content.startswith(_PNG):
        return "PNG"
    if content.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    return "WEBP" if content.startswith(b"RIFF") and content[8:12] == b"WEBP" else None


def parts_of(content: bytes) -> tuple[bytes, Facts] | None:
    """Of a JPEG, PNG, GIF or WebP file what a decoder needs for the first picture, and what is known of it.

    None for a file of any other kind.

    Raises:
        Refused: there are more pieces or scans than any camera or program writes.
        EOFError: the file is cut off before its end.
        ValueError: it is damaged.
    """
    kind = kind_of(content)
    return _PARTS[kind](content) if kind else None


def _too_many() -> Refused:
    return Refused("is made of more pieces than are read: save it again without its comments and other notes")


def _joined(content: bytes, spans: Iterable[tuple[int, int]], head: bytes = b"", tail: bytes = b"") -> bytes:
    view = memoryview(content)
    return b"".join([head, *(view[start:stop] for start, stop in spans), tail])


def _jpeg(content: bytes) -> tuple[bytes, Facts]:
    """Up to the end of the first picture; previews and maps behind it belong to no decoder."""
    spans, place, turn = [(0, 2)], 2, 0
    scans = tables = coefficients = 0
    frame = _Frame()
    for _ in range(MAX_PIECES):
        if not (found := _MARKER.search(content, place)):
            break  # the decoder tells whether what is missing matters
        start, marker = found.start(), content[found.start() + 1]
        if marker == _EOI:
            spans.append((start, start + 2))
            break
        place = start + 2
        if marker in _BARE:
            continue
        length = int.from_bytes(content[place : place + 2])
        place += length
        if place > len(content):
            raise EOFError
        if length < 2:
            raise ValueError("a segment is shorter than its own length")
        if marker in _FRAMES:
            frame = _Frame.read(marker, content[start + 4 : place])
        elif marker == _DQT and (tables := tables + length) > MAX_TABLES:
            raise _too_many()
        elif marker == _SOS:
            if not scans and (not frame.sequential or content[start + 4] < frame.channels):
                coefficients = frame.coefficients
            scans += 1
            if scans > min(MAX_SCANS, max(20, MAX_SCANNED // max(1, frame.size[0] * frame.size[1]))):
                raise Refused("has more scans than a picture of its size is given: save it again")
            end = _SCAN_END.search(content, place)
            place = end.start() if end else len(content)
        elif marker == _APP1 and not turn and content[start + 4 : start + 10] == b"Exif\0\0":
            turn = _orientation(content[start + 4 : place])
        if marker not in _NOTES:
            spans.append((start, place))
    else:
        raise _too_many()
    picture = _joined(content, spans)
    return picture, Facts("JPEG", len(picture), frame.size, turn or 1, coefficients)


@dataclass(frozen=True, slots=True)
class _Frame:
    """What a JPEG's frame header says."""

    sequential: bool = True
    channels: int = 0
    size: tuple[int, int] = (0, 0)
    coefficients: int = 0

    @classmethod
    def read(cls, marker: int, header: bytes) -> _Frame:
        height, width, channels = struct.unpack_from(">xHHB", header)
        shares = [(header[place] >> 4, header[place] & 15) for place in range(7, 6 + 3 * channels, 3)]
        most_x, most_y = (max((share[i] for share in shares), default=1) for i in (0, 1))
        across, down = -(-width // (8 * most_x)), -(-height // (8 * most_y))
        # Of every 8 x 8 pixels of a channel 64 coefficients of 2 bytes; coarse channels have fewer.
        blocks = across * down * sum(x * y for x, y in shares)
        return cls(marker in _SEQUENTIAL, channels, (width, height), 128 * blocks)


def _png(content: bytes) -> tuple[bytes, Facts]:
    """The chunks that no picture can do without, and transparency.

    All checksums are compared: Pillow does not, and where compressed data is damaged it returns black rows
    in silence.
    """
    view = memoryview(content)
    spans, place, turn, notes, tail = [(0, 8)], 8, 1, 0, b""
    for _ in range(MAX_DATA):
        if place + 12 > len(content):  # Pillow tells whether what is missing matters
            spans.append((place, len(content)))
            break
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 12 + length
        notes += kind not in (b"IDAT", b"fdAT", b"fcTL")
        if kind == b"IEND":
            tail = _PNG_END
            break
        if notes > MAX_PIECES:
            raise _too_many()
        if end > len(content):
            raise EOFError
        if zlib.crc32(view[place + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            raise ValueError(f"chunk {kind!r} has the wrong checksum")
        if kind == b"eXIf":
            turn = _orientation(content[place + 8 : end - 4])
        if not kind[0] & 0x20 or kind == b"tRNS":
            if spans[-1][1] == place:  # thousands of chunks of pixels are copied as one
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((place, end))
        place = end
    else:
        raise _too_many()
    width, height = _numbers(">II", content, 16)
    picture = _joined(content, spans, tail=tail)
    return picture, Facts("PNG", len(picture), (width, height), turn)


def _gif(content: bytes) -> tuple[bytes, Facts]:
    """The screen, what is said of the first frame's transparency, and all from the first frame on."""
    place = 13
    if len(content) > 10 and content[10] & 0x80:
        place += 6 << (content[10] & 7)
    spans = [(0, place)]
    for _ in range(MAX_PIECES):
        if not (found := _GIF_BLOCK.search(content, place)):
            raise EOFError
        start = found.start()
        if content[start : start + 1] != b"!":
            spans.append((start, len(content)))
            # A frame may reach beyond the screen.
            x, y, across, down = _numbers("<4H", content, start + 1)
            width, height = _numbers("<2H", content, 6)
            size = max(width, x + across), max(height, y + down)
            break
        place = _after_blocks(content, start + 2)
        if content[start + 1 : start + 2] == b"\xf9":
            spans.append((start, place))
    else:
        raise _too_many()
    picture = _joined(content, spans)
    return picture, Facts("GIF", len(picture), size)


def _after_blocks(content: bytes, place: int) -> int:
    """Where a chain of blocks, each with its length before it, has ended."""
    for _ in range(MAX_DATA):
        if place >= len(content):
            raise EOFError
        length = content[place]
        place += 1 + length
        if not length:
            return place
    raise _too_many()


def _webp(content: bytes) -> tuple[bytes, Facts]:
    """The canvas and the first picture, or the first frame; EXIF stands behind all frames."""
    stop = 8 + int.from_bytes(content[4:8], "little")
    if stop > len(content):
        raise EOFError
    spans: list[tuple[int, int]] = []
    place, turn, notes, shown, size = 12, 1, 0, False, (0, 0)
    for _ in range(MAX_DATA):
        if place + 8 > stop:
            break
        kind, length = struct.unpack_from("<4sI", content, place)
        notes += kind != b"ANMF"
        if notes > MAX_PIECES:
            raise _too_many()
        start, place = place, place + 8 + length + (length & 1)
        if start + 8 + length > stop:
            raise ValueError(f"chunk {kind!r} reaches beyond the file")
        if kind == b"EXIF":
            turn = _orientation(content[start + 8 : place])
        elif kind in (b"VP8X", b"ANIM", b"ALPH", b"VP8 ", b"VP8L", b"ANMF") and not shown:
            spans.append((start, min(place, stop)))
            size = size if any(size) else _canvas(kind, content, start + 8)
            shown = kind in (b"VP8 ", b"VP8L", b"ANMF")
    else:
        raise _too_many()
    length = 4 + sum(end - start for start, end in spans)
    picture = _joined(content, spans, head=b"RIFF" + length.to_bytes(4, "little") + b"WEBP")
    return picture, Facts("WEBP", len(picture), size, turn)


def _canvas(kind: bytes, content: bytes, place: int) -> tuple[int, int]:
    """Width and height as a chunk of WebP has them, (0, 0) where it has none."""
    if kind == b"VP8X":
        low_x, high_x, low_y, high_y = _numbers("<4xHBHB", content, place)
        return (high_x << 16 | low_x) + 1, (high_y << 16 | low_y) + 1
    if kind == b"VP8L":
        (bits,) = _numbers("<xI", content, place)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8 ":
        width, height = _numbers("<6xHH", content, place)
        return width & 0x3FFF, height & 0x3FFF
    return 0, 0


def _numbers(layout: str, content: bytes, place: int) -> tuple[int, ...]:
    """Whole numbers at a place; EOFError where the file ends before them."""
    if place + struct.calcsize(layout) > len(content):
        raise EOFError
    return struct.unpack_from(layout, content, place)


def _orientation(exif: bytes) -> int:
    """Orientation as EXIF data has it, 1 to 8; damaged EXIF is no reason to refuse a picture.

    Its one entry is looked up here since Pillow reads all: 5,000 entries may each claim the same 60 kB.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (first,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, first)
        for place in range(first + 2, first + 2 + 12 * entries, 12):
            tag, kind = struct.unpack_from(f"{order}HH", exif, place)
            if tag == _ORIENTATION:
                (value,) = struct.unpack_from(order + _WHOLE_NUMBERS[kind], exif, place + 8)
                return value if 1 <= value <= 8 else 1
    except (struct.error, KeyError):
        return 1
    return 1


def ends_early(content: bytes) -> bool:
    """True where the mark that ends a file of its format is missing."""
    tail = content[-4096:].rstrip(b"\0")
    if content.startswith(b"\xff"):
        return not tail.endswith(b"\xff\xd9")
    if content.startswith(b"\x89"):
        return b"IEND" not in tail
    if content.startswith(b"GIF"):
        return not tail.endswith(b";")
    return len(content) < 8 + int.from_bytes(content[4:8], "little")


def guess(content: bytes) -> str:
    """What a file of another kind seems to be, for the message."""
    start = content[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"%!ps", b"\xc5\xd0\xd3\xc6")):
        return "an EPS file"
    if start.startswith(b"%pdf"):
        return "a PDF file"
    if b"<svg" in start:
        return "an SVG file"
    if start.startswith((b"ii*\0", b"mm\0*")):
        return "a TIFF file"
    if start.startswith(b"bm"):
        return "a BMP file"
    if content[4:8] == b"ftyp":
        return "a HEIF, AVIF or video file"
    if all(byte >= 32 or byte in b"\t\r\n\f" for byte in content[:512]):
        return "a text file"
    return "no picture of a kind that is known"


_PARTS: Final[dict[Kind, Callable[[bytes], tuple[bytes, Facts]]]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "GIF": _gif,
    "WEBP": _webp,
}
