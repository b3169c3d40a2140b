"""The door for untrusted pictures: every odd kind has golden pixels, every bad kind one clear line."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm.images import ImageError, Limits, list_pictures, open_picture

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def _fuzz() -> Any:
    """The fuzz target beside this file: its seeds, and what must hold of any bytes."""
    spec = importlib.util.spec_from_file_location("fuzz_images", Path(__file__).parent / "fuzz_images.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FUZZ = _fuzz()
encoded, seeds = FUZZ.encoded, FUZZ.seeds


def quadrants(mode: str = "RGB") -> Image.Image:
    """32 x 16: red, green over blue, white; blocks of 16 x 8, so that JPEG keeps them nearly exact."""
    image = Image.new("RGB", (32, 16))
    for box, colour in zip(((0, 0), (16, 0), (0, 8), (16, 8)), (RED, GREEN, BLUE, WHITE), strict=True):
        image.paste(colour, (*box, box[0] + 16, box[1] + 8))
    return image.convert(mode)


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    """The centres of the four quarters, in reading order."""
    width, height = image.size
    return [image.getpixel((x * width // 4, y * height // 4)) for x, y in ((1, 1), (3, 1), (1, 3), (3, 3))]


def near(found: list[tuple[int, ...]], expected: list[tuple[int, ...]], tolerance: int) -> bool:
    return all(
        abs(a - b) <= tolerance
        for p, q in zip(found, expected, strict=True)
        for a, b in zip(p, q, strict=True)
    )


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: bytes) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    data = png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + data + png_chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("kind", "mode", "tolerance", "options"),
    [
        ("PNG", "RGB", 0, {}),
        ("PNG", "P", 0, {}),
        ("GIF", "P", 0, {}),
        ("WEBP", "RGB", 0, {"lossless": True}),
        ("JPEG", "RGB", 4, {"quality": 95, "subsampling": 0}),
        ("JPEG", "RGB", 4, {"quality": 95, "subsampling": 0, "progressive": True}),
        ("JPEG", "CMYK", 4, {"quality": 95}),
    ],
)
def test_colours_come_out_as_they_went_in(
    kind: str, mode: str, tolerance: int, options: dict[str, object]
) -> None:
    picture = open_picture(encoded(quadrants(mode), kind, **options))
    assert picture.pixels.mode == "RGB"
    assert picture.pixels.size == (32, 16)
    assert near(corners(picture.pixels), [RED, GREEN, BLUE, WHITE], tolerance)


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "I;16", "I", "F", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"]
)
def test_every_pillow_mode_becomes_rgb(mode: str) -> None:
    grey = {"I;16": 257 * 255, "I": 257 * 255, "F": 1.0}.get(mode)
    if grey is not None:
        image = Image.new(mode, (5, 4), grey)
    else:
        image = Image.new("RGB", (5, 4), WHITE).convert("RGBA" if mode == "PA" else mode)
        image = image.convert("PA") if mode == "PA" else image
    picture = open_picture(image)
    assert (picture.pixels.mode, picture.pixels.size) == ("RGB", (5, 4))
    assert near([picture.pixels.getpixel((2, 2))], [WHITE], 1)


# Where the quarters red, green, blue, white stand after the turn that each EXIF value asks for.
TURNED = {
    1: [RED, GREEN, BLUE, WHITE],
    2: [GREEN, RED, WHITE, BLUE],
    3: [WHITE, BLUE, GREEN, RED],
    4: [BLUE, WHITE, RED, GREEN],
    5: [RED, BLUE, GREEN, WHITE],
    6: [BLUE, RED, WHITE, GREEN],
    7: [WHITE, GREEN, BLUE, RED],
    8: [GREEN, WHITE, RED, BLUE],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [0, *TURNED, 9])
def test_exif_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, object] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}.get(
        kind, {}
    )
    content = encoded(quadrants(), kind, exif=exif, **options)
    pixels = open_picture(content).pixels
    assert pixels.size == ((16, 32) if orientation in (5, 6, 7, 8) else (32, 16))
    assert near(corners(pixels), TURNED.get(orientation, TURNED[1]), 4)
    assert open_picture(Image.open(io.BytesIO(content))).pixels.tobytes() == pixels.tobytes()


def test_an_image_that_was_worked_on_is_not_turned_again() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = Image.open(io.BytesIO(encoded(quadrants(), "PNG", exif=exif))).transpose(
        Image.Transpose.ROTATE_270
    )
    assert near(corners(open_picture(upright).pixels), TURNED[6], 0)


def test_transparency_lies_on_white() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    half.putpixel((1, 0), (0, 0, 0, 0))
    pixels = open_picture(encoded(half, "PNG")).pixels
    assert near([pixels.getpixel((0, 0)), pixels.getpixel((1, 0))], [(255, 127, 127), WHITE], 1)
    grey = Image.new("LA", (1, 1), (0, 128))
    assert near([open_picture(encoded(grey, "PNG")).pixels.getpixel((0, 0))], [(127, 127, 127)], 1)


def test_a_palette_with_transparency_lies_on_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    for content in (encoded(image, "PNG", transparency=1), encoded(image, "GIF", transparency=1)):
        pixels = open_picture(content).pixels
        assert [pixels.getpixel((0, 0)), pixels.getpixel((1, 0))] == [RED, WHITE]


def test_colour_key_transparency_of_png() -> None:
    rows = b"\0" + bytes([255, 0, 0, 9, 9, 9])
    content = png(2, 1, 8, 2, rows, png_chunk(b"tRNS", struct.pack(">HHH", 9, 9, 9)))
    pixels = open_picture(content).pixels
    assert [pixels.getpixel((0, 0)), pixels.getpixel((1, 0))] == [RED, WHITE]


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    values = np.array([[0, 257, 128 * 257 + 100, 65535]], dtype=np.uint16)
    pixels = open_picture(encoded(Image.fromarray(values), "PNG")).pixels
    assert [pixels.getpixel((x, 0)) for x in range(4)] == [(v, v, v) for v in (0, 1, 128, 255)]


def test_16_bit_grey_with_a_transparent_value() -> None:
    rows = b"\0" + struct.pack(">HH", 0, 300)
    content = png(2, 1, 16, 0, rows, png_chunk(b"tRNS", struct.pack(">H", 300)))
    pixels = open_picture(content).pixels
    assert [pixels.getpixel((0, 0)), pixels.getpixel((1, 0))] == [(0, 0, 0), WHITE]


def test_16_bit_colour() -> None:
    rows = b"\0" + struct.pack(">HHH", 65535, 128 * 257, 0) + struct.pack(">HHH", 0, 0, 65535)
    pixels = open_picture(png(2, 1, 16, 2, rows)).pixels
    assert near([pixels.getpixel((0, 0)), pixels.getpixel((1, 0))], [(255, 128, 0), BLUE], 1)


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_few_bits_of_grey(depth: int) -> None:
    top = (1 << depth) - 1
    rows = b"\0" + bytes([top << (8 - depth)])
    pixels = open_picture(png(2, 1, depth, 0, rows)).pixels
    assert [pixels.getpixel((0, 0)), pixels.getpixel((1, 0))] == [WHITE, (0, 0, 0)]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert open_picture(content).pixels.getpixel((4, 4)) == RED


def test_large_pictures_are_halved_to_bounded_memory() -> None:
    limits = Limits(keep_pixels=1_000_000)
    for mode, kind in (("RGB", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("L", "PNG")):
        image = quadrants().resize((2050, 1030), Image.Resampling.NEAREST).convert(mode)
        pixels = open_picture(encoded(image, kind), limits=limits).pixels
        assert pixels.size == (1025, 515)
        grey = mode == "L"
        expected = [
            tuple(Image.new("RGB", (1, 1), c).convert("L").convert("RGB").getpixel((0, 0))) if grey else c
            for c in (RED, GREEN, BLUE, WHITE)
        ]
        assert near(corners(pixels), expected, 3), (mode, kind)


def test_strips_leave_no_seam() -> None:
    """A picture large enough to go through in strips equals one conversion of the whole."""
    noise = np.random.default_rng(0).integers(0, 256, (1500, 1001, 4), dtype=np.uint8)
    image = Image.fromarray(noise, "RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    whole = np.asarray(Image.alpha_composite(white, image).convert("RGB"), dtype=np.int16)
    found = np.asarray(open_picture(encoded(image, "PNG")).pixels, dtype=np.int16)
    assert np.abs(found - whole).max() <= 1


def test_hash_and_name(tmp_path: Path) -> None:
    content = encoded(quadrants(), "PNG")
    path = tmp_path / "a picture.txt"  # the name says nothing, the first bytes do
    path.write_bytes(content)
    picture = open_picture(path)
    assert picture.sha256 == hashlib.sha256(content).hexdigest() == open_picture(content).sha256
    assert picture.name == str(path)
    assert open_picture(content, name="upload 3").name == "upload 3"
    assert open_picture(picture) is picture
    assert open_picture(str(path)).pixels.tobytes() == picture.pixels.tobytes()
    assert open_picture(bytearray(content)).sha256 == picture.sha256  # type: ignore[arg-type]


def test_hash_of_pillow_images_tells_mode_size_and_pixels_apart() -> None:
    images = [
        Image.new("RGB", (4, 2)), Image.new("RGB", (2, 4)), Image.new("RGBX", (4, 2)),
        Image.new("RGB", (4, 2), RED), Image.new("P", (4, 2)), Image.new("L", (4, 2)),
    ]  # fmt: skip
    recoloured = Image.new("P", (4, 2))
    recoloured.putpalette([9, 9, 9])
    assert len({open_picture(image).sha256 for image in [*images, recoloured]}) == len(images) + 1
    assert open_picture(images[0]).sha256 == open_picture(Image.new("RGB", (4, 2))).sha256


def test_the_callers_image_is_left_alone() -> None:
    image = quadrants()
    picture = open_picture(image)
    picture.pixels.putpixel((0, 0), (1, 2, 3))
    assert image.getpixel((0, 0)) == RED


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


TEXT_BOMB = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 9_000_000))

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
    "text bomb": (png(1, 1, 8, 0, b"\0\0", TEXT_BOMB), "damaged"),
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


def test_list_pictures(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.webp", "notes.txt", ".hidden.png", "d.gif"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in list_pictures(tmp_path)] == ["a.png", "b.JPG", "c.webp", "d.gif"]
    assert list_pictures(str(tmp_path)) == list_pictures(tmp_path)
    with pytest.raises(ImageError, match="no folder"):
        list_pictures(tmp_path / "none")
