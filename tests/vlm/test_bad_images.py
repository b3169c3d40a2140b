"""The door for untrusted pictures: every bad kind gets one clear line, and memory stays bounded."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import fuzz_images as FUZZ
import pytest
from fuzz_images import encoded, seeds
from helpers import png, png_chunk, quadrants
from PIL import Image

from vlm.images import ImageError, Limits, open_picture


def header_only(kind: str, width: int, height: int) -> bytes:
    if kind == "png":
        return png(width, height, 8, 2, b"")
    if kind == "gif":
        return (
            b"GIF89a"
            + struct.pack("<HHBBB", width, height, 0, 0, 0)
            + b","
            + struct.pack("<HHHHB", 0, 0, width, height, 0)
            + b"\x08\0;"
        )
    if kind == "jpeg":
        sof = b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, height, width, 3) + b"\1\x11\0\2\x11\0\3\x11\0"
        return b"\xff\xd8" + sof + b"\xff\xda\0\x0c\3\1\0\2\0\3\0\0?\0" + b"\0" * 64 + b"\xff\xd9"
    body = (
        b"VP8X"
        + struct.pack("<I", 10)
        + b"\0" * 4
        + (width - 1).to_bytes(3, "little")
        + (height - 1).to_bytes(3, "little")
    )
    body += b"VP8L" + struct.pack("<I", 6) + b"\x2f" + b"\0" * 5
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


BAD = {
    "empty": (b"", "empty"),
    "text": (b"Dear all,\nthis is a letter.\n", "format"),
    "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "format"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "format"),
    "pdf": (b"%PDF-1.4\n", "format"),
    "tiff": (encoded(quadrants(), "TIFF"), "format"),
    "bmp": (encoded(quadrants(), "BMP"), "format"),
    "avif-like": (b"\0\0\0\x1cftypavif" + b"\0" * 40, "format"),
    "zeros": (b"\0" * 100, "format"),
    "zero width": (png(0, 5, 8, 2, b"\0" * 5), "damaged"),
    "png bomb": (header_only("png", 60_000, 60_000), "too_large"),
    "gif bomb": (header_only("gif", 60_000, 60_000), "too_large"),
    "jpeg bomb": (header_only("jpeg", 60_000, 60_000), "too_large"),
    "too tall": (header_only("png", 1, 40_000_000), "too_large"),
    "just over": (header_only("png", 7_072, 7_072), "too_large"),
    "truncated png": (encoded(quadrants(), "PNG")[:-40], "truncated"),
    "truncated jpeg": (encoded(quadrants(), "JPEG")[:-60], "truncated"),
    "truncated gif": (encoded(quadrants(), "GIF")[:-20], "truncated"),
    "truncated webp": (encoded(quadrants(), "WEBP")[:-20], "truncated"),
    "magic alone": (b"\x89PNG\r\n\x1a\n", "truncated"),
    "damaged png": (encoded(quadrants(), "PNG").replace(b"IDAT", b"IDAT\xff", 1), "damaged"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_pictures_get_one_line(case: str, tmp_path: Path) -> None:
    content, code = BAD[case]
    path = tmp_path / "picture.jpg"
    path.write_bytes(content)
    for source, name in ((path, str(path)), (content, "image")):
        with pytest.raises(ImageError) as caught:
            open_picture(source)
        assert caught.value.code == code
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


def test_a_webp_header_is_believed_about_its_size() -> None:
    with pytest.raises(ImageError):
        open_picture(header_only("webp", 16_000, 16_000))
    wide = encoded(Image.new("RGB", (200, 100)), "WEBP")
    with pytest.raises(ImageError) as caught:
        open_picture(wide, limits=Limits(max_webp_pixels=19_999))
    assert caught.value.code == "too_large"


def test_a_gif_frame_beyond_its_screen_is_measured_too() -> None:
    content = bytearray(header_only("gif", 60_000, 60_000))
    content[6:10] = struct.pack("<HH", 8, 8)
    with pytest.raises(ImageError) as caught:
        open_picture(bytes(content))
    assert caught.value.code == "too_large"


def test_places_that_are_no_picture(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.jpg"
    os.mkfifo(pipe)
    strings = ("/dev/zero", "https://example.org/a.jpg", "a\0b", "x" * 5000, "~nobody-here/a.jpg")
    for source in (tmp_path / "none.jpg", tmp_path, pipe, *strings):
        with pytest.raises(ImageError) as caught:
            open_picture(source)
        assert caught.value.code == "missing"
    with pytest.raises(TypeError):
        open_picture(3)  # type: ignore[arg-type]


def test_byte_cap(tmp_path: Path) -> None:
    path = tmp_path / "long.png"
    path.write_bytes(encoded(quadrants(), "PNG") + b"\0" * 5000)
    assert open_picture(path).pixels.size == (32, 16)
    for source in (path, path.read_bytes()):
        with pytest.raises(ImageError) as caught:
            open_picture(source, limits=Limits(max_bytes=4096))
        assert caught.value.code == "too_large"


def test_no_changed_byte_of_a_png_goes_unnoticed_in_the_pixels() -> None:
    content = seeds()["png"]
    whole = open_picture(content).pixels.tobytes()
    for place in range(content.index(b"IDAT"), content.index(b"IEND")):
        changed = bytearray(content)
        changed[place] ^= 0x55
        try:
            assert open_picture(bytes(changed)).pixels.tobytes() == whole, f"byte {place}"
        except ImageError as error:
            assert error.code in ("damaged", "truncated")


@pytest.mark.parametrize("kind", seeds())
def test_cut_at_every_offset_it_is_an_error_or_the_whole_picture(kind: str) -> None:
    content = seeds()[kind]
    whole = open_picture(content).pixels.tobytes()
    refused = 0
    for end in range(len(content)):
        try:
            assert open_picture(content[:end]).pixels.tobytes() == whole, f"cut at {end}"
        except ImageError as error:
            refused += error.code in ("truncated", "format", "empty")
    assert refused > len(content) // 2


def mutated(content: bytes, dice: random.Random) -> bytes:
    """A few bytes changed, dropped, added or repeated; the header as often as the rest."""
    found = bytearray(content)
    for _ in range(dice.choice((1, 1, 2, 4, 16))):
        place = dice.randrange(max(1, len(found) if dice.random() < 0.6 else min(64, len(found))))
        match dice.randrange(6):
            case 0:
                del found[place : place + dice.randrange(1, 9)]
            case 1:
                found[place:place] = dice.randbytes(dice.randrange(1, 9))
            case 2:
                found[place:place] = found[place : place + 20]
            case _:
                found[place : place + 1] = bytes([dice.choice((0, 255, 127, 128, dice.randrange(256)))])
    return bytes(found)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_mutated_files_are_refused_or_read_within_bounds() -> None:
    dice = random.Random(20_240)
    originals = list(seeds().values())
    read = refused = 0
    for _ in range(10_000):
        content = mutated(dice.choice(originals), dice)
        if FUZZ.one_input(content):
            read += 1
        else:
            refused += 1
    assert read > 500
    assert refused > 500


MEASURE = """
import sys
import numpy
from vlm.images import ImageError, open_picture

def peak():  # not getrusage: its peak is inherited from the process that forked this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

open_picture(sys.argv[1])
before = peak()
try:
    open_picture(sys.argv[2])
except ImageError as error:
    print(error.code, end=" ")
print((peak() - before) // 1024)
"""


def megabytes(path: Path, warm: Path) -> tuple[str, int]:
    """What reading one picture adds to the peak memory of a fresh process."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(warm), str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    *code, amount = done.stdout.split()
    return "".join(code), int(amount)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_bounded(tmp_path: Path) -> None:
    warm = tmp_path / "warm.png"
    warm.write_bytes(encoded(Image.new("I;16", (8, 8)), "PNG"))
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(header_only("png", 60_000, 60_000))
    assert megabytes(bomb, warm) == ("too_large", pytest.approx(0, abs=10))
    large = tmp_path / "large.png"
    Image.new("RGBA", (7_000, 7_000), (9, 9, 9, 100)).save(large, compress_level=1)
    code, amount = megabytes(large, warm)
    assert code == ""
    assert 100 < amount < 300
    webp = tmp_path / "large.webp"
    Image.new("RGB", (4_096, 4_096), (9, 9, 9)).save(webp, method=0)
    assert megabytes(webp, warm)[1] < 300
