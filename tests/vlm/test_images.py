"""The door for untrusted pictures: every odd kind has golden pixels."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from fuzz_images import encoded
from helpers import BLUE, GREEN, RED, WHITE, png, png_chunk, quadrants
from PIL import Image

from vlm.folders import list_pictures
from vlm.images import ImageError, Limits, open_picture


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


def drawn(mode: str) -> Image.Image:
    """The quadrants in any mode; those of one number a pixel hold their greys, from black to white."""
    grey = np.asarray(quadrants("L"))
    match mode:
        case "1":
            return Image.fromarray(grey > 100)
        case "I;16" | "I":
            return Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
        case "F":
            return Image.fromarray(grey.astype(np.float32) / 255)
        case "PA":
            return quadrants("RGBA").convert("PA")
    return quadrants(mode)


COLOURS = [RED, GREEN, BLUE, WHITE]
GREYS = [(value,) * 3 for value in (76, 150, 29, 255)]
BLACK_OR_WHITE = [(value,) * 3 for value in (0, 255, 0, 255)]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("1", BLACK_OR_WHITE),
        *((mode, GREYS) for mode in ("L", "LA", "I;16", "I", "F")),
        *((mode, COLOURS) for mode in ("RGB", "P", "PA", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")),
    ],
)
def test_every_pillow_mode_becomes_rgb(mode: str, expected: list[tuple[int, ...]]) -> None:
    image = drawn(mode)
    assert image.mode == mode
    pixels = open_picture(image).pixels
    assert (pixels.mode, pixels.size) == ("RGB", (32, 16))
    assert near(corners(pixels), expected, 2 if mode == "YCbCr" else 0)


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


def exif_of(order: str, kind: int, value: int, entries: int = 2) -> bytes:
    """EXIF data whose second entry is the orientation, in this byte order and type of number."""
    first = struct.pack(f"{order}HHII", 0x010F, 4, 1, 7)
    number = struct.pack(f"{order}{'I' if kind == 4 else 'H'}", value).ljust(4, b"\0")
    table = first + struct.pack(f"{order}HHI", 0x0112, kind, 1) + number
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8)
    return head + struct.pack(f"{order}H", entries) + table


@pytest.mark.parametrize(
    ("exif", "turned"),
    [
        *((exif_of(order, kind, 6), True) for order in "<>" for kind in (3, 4)),
        (exif_of("<", 3, 6, entries=60_000), True),
        (exif_of("<", 3, 6, entries=60_000)[:-12], False),
        (exif_of("<", 2, 6), False),
        (exif_of("<", 3, 600), False),
        (exif_of("<", 3, 6)[:-1].replace(b"II", b"IM"), False),
        (b"II*\0\xff\xff\xff\xff", False),
        (b"", False),
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_exif_is_read_however_it_is_written_and_passed_over_where_damaged(
    kind: str, exif: bytes, turned: bool
) -> None:
    content = encoded(Image.new("RGB", (8, 4)), kind, exif=b"Exif\0\0" + exif)
    assert open_picture(content).pixels.size == ((4, 8) if turned else (8, 4))


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


def segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def test_a_jpeg_of_a_phone_with_hundreds_of_notes() -> None:
    """EXIF, a colour profile in 255 pieces, depth maps, fill bytes, and a preview behind the end."""
    exif = Image.Exif()
    exif[0x0112] = 6
    plain = encoded(quadrants(), "JPEG", quality=95, subsampling=0)
    profile = [segment(0xE2, b"ICC_PROFILE\0" + bytes([i, 255]) + bytes(60)) for i in range(1, 256)]
    further = [
        segment(0xE2, b"MPF\0" + bytes(80)),
        *[segment(0xEB, bytes(3000))] * 200,
        segment(0xFE, b"hello"),
    ]
    notes = b"".join([segment(0xE1, exif.tobytes()), *profile, *further, b"\xff" * 9])
    content = plain[:20] + notes + plain[20:] + encoded(Image.new("RGB", (9, 9)), "JPEG")
    pixels = open_picture(content).pixels
    assert near(corners(pixels), TURNED[6], 4)
    assert pixels.tobytes() == open_picture(plain).pixels.transpose(Image.Transpose.ROTATE_270).tobytes()


def test_a_gif_of_thousands_of_frames_with_long_notes() -> None:
    frames = [Image.new("P", (8, 8), 1), Image.new("P", (8, 8), 2)]
    for frame in frames:
        frame.putpalette([0, 0, 0, *RED, *GREEN])
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50)
    last = content.rindex(b"!\xf9")
    start = content.index(b"!")
    note = b"!\xff\x0bXMP DataXMP" + b"\x7f" + bytes(range(127)) + b"\0"
    long = b"!\xfe" + (b"\x03abc" * 9_000) + b"\0"
    content = content[:start] + note + long + content[start:-1] + content[last:-1] * 5_000 + b";"
    assert open_picture(content).pixels.getpixel((4, 4)) == RED


def test_an_apng_of_thousands_of_frames() -> None:
    def control(number: int) -> bytes:
        return png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, 1, 1, 0, 0, 1, 10, 0, 0))

    rows = b"\0" + bytes(RED)
    first = png(1, 1, 8, 2, rows, png_chunk(b"acTL", struct.pack(">II", 3_001, 0)), control(0))
    green = zlib.compress(b"\0" + bytes(GREEN))
    frames = [
        control(2 * i + 1) + png_chunk(b"fdAT", struct.pack(">I", 2 * i + 2) + green) for i in range(3_000)
    ]
    content = first[:-12] + b"".join(frames) + first[-12:]
    assert open_picture(content).pixels.getpixel((0, 0)) == RED


def test_a_png_of_thousands_of_pieces_with_exif_behind_them() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (300, 350, 3), dtype=np.uint8)
    plain = png(350, 300, 8, 2, b"".join(b"\0" + row.tobytes() for row in noise))
    start, end = plain.index(b"IDAT"), plain.index(b"IEND")
    data = plain[start + 4 : end - 8]
    pieces = [png_chunk(b"IDAT", data[i : i + 100]) for i in range(0, len(data), 100)]
    assert len(pieces) > 3_000
    exif = png_chunk(b"eXIf", exif_of(">", 3, 3))
    content = plain[: start - 4] + b"".join(pieces) + exif + plain[end - 4 :]
    assert np.array_equal(np.asarray(open_picture(content).pixels), noise[::-1, ::-1])


def test_a_webp_of_thousands_of_frames_with_exif_behind_them() -> None:
    frames = [quadrants(), quadrants().transpose(Image.Transpose.ROTATE_180)]
    content = encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=True)
    last = content.rindex(b"ANMF")
    exif = exif_of("<", 3, 6)
    body = content[12:] + content[last:] * 3_000 + b"EXIF" + struct.pack("<I", len(exif)) + exif
    content = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    assert near(corners(open_picture(content).pixels), TURNED[6], 0)


def test_what_is_noted_beside_a_picture_is_never_unpacked() -> None:
    text = png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 9_000_000))
    profile = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(9_000_000)))
    content = png(2, 1, 8, 2, b"\0" + bytes([*RED, *BLUE]), text, profile)
    assert open_picture(content).pixels.tobytes() == bytes([*RED, *BLUE])


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


def test_list_pictures(tmp_path: Path) -> None:
    for name in ("b.JPG", "a.png", "c.webp", "notes.txt", ".hidden.png", "d.gif"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "phone.HEIC").write_bytes(b"x")
    Image.new("RGB", (4, 2)).save(tmp_path / "e.jfif", "JPEG")
    found, others = list_pictures(tmp_path)
    assert [path.name for path in found] == ["a.png", "b.JPG", "c.webp", "d.gif", "e.jfif"]
    assert [path.name for path in others] == ["folder.png", "phone.HEIC"]
    assert list_pictures(str(tmp_path)) == list_pictures(tmp_path)
    with pytest.raises(ImageError, match="no folder"):
        list_pictures(tmp_path / "none")
