"""The door for untrusted pictures: every bad kind gets one clear line, and memory stays bounded."""

from __future__ import annotations

import os
import random
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import fuzz_images as FUZZ
import pytest
from fuzz_images import encoded, seeds
from helpers import png, png_chunk, quadrants
from PIL import Image, ImageOps

from vlm.images import ImageError, Limits, open_picture

TEXT = b"a\0\0" + zlib.compress("\U0001f600".encode() * 250_000)


def progressive(mode: str, side: int, **options: object) -> bytes:
    return encoded(Image.new(mode, (side, side)), "JPEG", **{"progressive": True, "subsampling": 0} | options)


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


def after_start(kind: str, pieces: bytes, side: int = 64) -> bytes:
    """A small picture with something put between its header and its pixels."""
    plain = encoded(Image.new("P" if kind == "GIF" else "RGB", (side, side)), kind)
    place = {"JPEG": 2, "PNG": 33, "GIF": plain.find(b",", 13), "WEBP": 12}[kind]
    content = plain[:place] + pieces + plain[place:]
    if kind == "WEBP":
        content = b"RIFF" + struct.pack("<I", len(content) - 8) + content[8:]
    return content


PIECES = {
    "jpeg app9": ("JPEG", b"\xff\xe9\0\2"),
    "jpeg comment": ("JPEG", b"\xff\xfe\0\2"),
    "jpeg restart": ("JPEG", b"\xff\xd0"),
    "gif comment": ("GIF", b"!\xfe\1x\0"),
    "gif control": ("GIF", b"!\xf9\4\0\0\0\0\0"),
    "png text": ("PNG", png_chunk(b"tEXt", b"a\0b")),
    "png private": ("PNG", png_chunk(b"prVt", b"")),
    "png palette": ("PNG", png_chunk(b"PLTE", b"abc")),
    "webp notes": ("WEBP", b"XMP \0\0\0\0"),
}


@pytest.mark.parametrize("case", PIECES)
def test_too_many_pieces_are_refused_and_many_are_read(case: str) -> None:
    kind, piece = PIECES[case]
    assert open_picture(after_start(kind, piece * 1_900)).pixels.size == (64, 64)
    for number in (2_001, 200_000):
        refused(after_start(kind, piece * number), "more pieces than are read")


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [
        ("PNG", png_chunk(b"IDAT", b"") * 100_000),
        ("PNG", png_chunk(b"fcTL", b"") * 100_000),
        ("GIF", b"!\xfe" + b"\1x" * 100_000 + b"\0"),
        ("WEBP", b"ANMF\0\0\0\0" * 100_000),
        ("JPEG", (b"\xff\xdb" + struct.pack(">H", 2 + 65 * 900) + (b"\0" + b"\1" * 64) * 900) * 2),
    ],
)
def test_too_many_pieces_of_data_are_refused(kind: str, pieces: bytes) -> None:
    refused(after_start(kind, pieces), "more pieces than are read")


def refused(content: bytes, why: str) -> None:
    """In less than a second, in one line that says why."""
    started = time.process_time()
    with pytest.raises(ImageError, match=why) as caught:
        open_picture(content)
    assert caught.value.code == "damaged"
    assert "\n" not in str(caught.value)
    assert time.process_time() - started < 1


def scanned(scans: int, width: int, height: int) -> bytes:
    """A grey progressive JPEG whose last scan is there so many times more."""
    plain = encoded(Image.new("L", (width, height), 100), "JPEG", progressive=True)
    last = plain[plain.rindex(b"\xff\xda") : -2]
    return plain[:-2] + last * scans + plain[-2:]


def test_repeated_scans_are_refused_before_they_are_decoded() -> None:
    assert open_picture(scanned(90, 64, 64)).pixels.getpixel((9, 9)) == (100, 100, 100)
    refused(scanned(101, 64, 64), "more scans")
    refused(scanned(3_000, 4_000, 4_000), "more scans")
    assert open_picture(scanned(20, 3_000, 3_000)).pixels.size == (3_000, 3_000)
    refused(scanned(30, 7_000, 7_000), "more scans")  # fewer for larger pictures: each takes longer


@pytest.mark.parametrize("scans", ["progressive", "one scan a channel"])
def test_coefficients_are_bounded(scans: str) -> None:
    content = bytearray(encoded(Image.new("RGB", (640, 400)), "JPEG", progressive=scans == "progressive"))
    if scans != "progressive":
        place = content.index(b"\xff\xda")
        content[place : place + 14] = b"\xff\xda\0\x08\1\1\0\0\x3f\0"
    # Three of four values of each colour difference are left out: 1.5 values a pixel, of 2 bytes.
    with pytest.raises(ImageError, match="several scans") as caught:
        open_picture(bytes(content), limits=Limits(max_coefficients=640 * 400 * 3 - 1))
    assert caught.value.code == "too_large"
    if scans == "progressive":
        assert open_picture(bytes(content), limits=Limits(max_coefficients=640 * 400 * 3)).pixels.width == 640


MEASURE = """
import sys
import threading
import numpy
from vlm.images import ImageError, open_picture

def peak():  # not getrusage: its peak is inherited from the process that forked this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

def read(path):
    try:
        open_picture(path)
    except ImageError as error:
        print(error.code, end=" ")

open_picture(sys.argv[1])
before = peak()
threads = [threading.Thread(target=read, args=[path]) for path in sys.argv[2:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print((peak() - before) // 1024)
"""


def megabytes(*paths: Path) -> tuple[str, int]:
    """What reading pictures, all at once, adds to the peak memory of a process that has read the first."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
    )
    *codes, amount = done.stdout.split()
    return " ".join(codes), int(amount)


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="peak memory is read from /proc"
)


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("warm") / "warm.png"
    path.write_bytes(encoded(Image.new("I;16", (8, 8)), "PNG"))
    return path


def exif_bomb() -> bytes:
    """EXIF data of 1 MB in which each of 60,000 entries claims all of it."""
    entries = b"".join(struct.pack("<HHII", tag, 7, 700_000, 0) for tag in range(1, 60_001))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", 60_000) + entries + bytes(300_000)


def full_of(kind: str, piece: bytes) -> bytes:
    return after_start(kind, piece * ((19 << 20) // len(piece)))


GREEDY = {
    "png bomb": (lambda: header_only("png", 60_000, 60_000), "too_large", 10),
    "progressive cmyk": (lambda: progressive("CMYK", 7_000), "too_large", 10),
    "progressive rgb": (lambda: progressive("RGB", 7_000), "too_large", 10),
    "scans": (lambda: scanned(3_000, 4_000, 4_000), "damaged", 10),
    "jpeg app9": (lambda: full_of("JPEG", b"\xff\xe9\0\2"), "damaged", 50),
    "jpeg comments": (lambda: full_of("JPEG", b"\xff\xfe\0\2"), "damaged", 50),
    "gif comments": (lambda: full_of("GIF", b"!\xfe\1x\0"), "damaged", 50),
    "png texts": (lambda: full_of("PNG", png_chunk(b"tEXt", b"a\0b")), "damaged", 50),
    "png without data": (lambda: full_of("PNG", png_chunk(b"IDAT", b"")), "damaged", 50),
    "exif": (lambda: after_start("PNG", png_chunk(b"eXIf", exif_bomb())), "", 50),
    "texts": (lambda: after_start("PNG", png_chunk(b"zTXt", TEXT) * 60), "", 50),
}


@needs_proc
@pytest.mark.parametrize("case", GREEDY)
def test_greedy_files_get_little_memory(case: str, warm: Path, tmp_path: Path) -> None:
    make, code, bound = GREEDY[case]
    path = tmp_path / "greedy"
    path.write_bytes(make())
    found, amount = megabytes(warm, path)
    assert found == code
    assert amount < bound


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pictures that are read, and take as much memory as any; all are turned."""
    folder = tmp_path_factory.mktemp("large")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (7_000, 7_000), (9, 9, 9, 100)).save(folder / "png", "PNG", compress_level=1, exif=exif)
    noisy = Image.frombytes("RGBA", (4_000, 750), random.Random(0).randbytes(12_000_000))
    noisy = ImageOps.expand(noisy, (0, 0, 0, 3_250), (9, 9, 9, 9))
    noisy.save(folder / "webp", "WEBP", lossless=True, method=0, quality=0, exif=exif)
    (folder / "cmyk").write_bytes(progressive("CMYK", 4_000, exif=exif))
    (folder / "rgb").write_bytes(progressive("RGB", 4_990, subsampling=0, exif=exif))
    return {path.name: path for path in folder.iterdir()}


@needs_proc
@pytest.mark.parametrize("names", ["png png", "webp webp", "cmyk rgb"])
def test_memory_stays_bounded_of_two_at_once_as_well(names: str, large: dict[str, Path], warm: Path) -> None:
    code, amount = megabytes(warm, *(large[name] for name in names.split()))
    assert code == ""
    assert 90 < amount < 300
