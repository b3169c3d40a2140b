"""The one door for untrusted image bytes.

    open_picture("photo.jpg").pixels  ->  an upright RGB picture without transparency

JPEG, PNG, WebP and GIF only, told apart by their first bytes and never by a name. The size that the
header claims is checked before anything is decoded. Everything that can go wrong with the bytes is an
`ImageError`, whose message is one line.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final, Literal

from PIL import Image, ImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vlm.errors import VLMError

Code = Literal["missing", "empty", "format", "truncated", "too_large", "damaged"]
Source = str | Path | bytes | Image.Image

SUFFIXES: Final = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif"})
PNG_MAGIC: Final = b"\x89PNG\r\n\x1a\n"
ORIENTATION: Final = 0x0112
UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STRIP_PIXELS: Final = 1 << 20
# What Pillow's readers raise on bytes that are not what they claim to be.
DECODER_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    struct.error,
    zlib.error,
    MemoryError,
    RuntimeError,
    Image.DecompressionBombError,
    Warning,  # where the host turns warnings into errors
)


class ImageError(VLMError):
    """A picture that cannot be used; `code` says why in one word, for programs."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code: Code = code


@dataclass(frozen=True, slots=True)
class Limits:
    """What is refused before decoding, and what is made smaller while decoding."""

    max_bytes: int = 32 << 20
    """Bytes of a file."""
    max_pixels: int = 50_000_000
    """Width times height, as the header claims."""
    max_side: int = 65_535
    """Width or height (JPEG's own limit): rows cost memory and time however short they are."""
    keep_pixels: int = 16_000_000
    """A larger picture is halved until it is within this, so that reading it never takes 300 MB."""
    max_webp_pixels: int = 16_777_216
    """As `max_pixels`, for WebP, whose decoder takes four times the memory of the others."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An upright RGB picture, with the hash of what it came from.

    `sha256` is taken over the file's bytes, or, for a Pillow image, over its mode, size and pixels.
    """

    pixels: Image.Image
    sha256: str
    name: str


DEFAULT_LIMITS: Final = Limits()


def open_picture(
    source: Source | Picture, *, name: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> Picture:
    """Read a picture from a path, bytes or a Pillow image.

    EXIF orientation is applied, transparency laid on white, 16 bits scaled to 8, and of an animation
    the first frame is taken.

    Args:
        source: where the picture comes from; a `Picture` is returned as it is.
        name: what error messages call it; a path names itself.
        limits: caps on bytes and pixels.

    Raises:
        ImageError: `code` is "missing", "empty", "format", "truncated", "too_large" or "damaged".
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, Image.Image):
        return _from_pillow(source, name or "image", limits)
    if isinstance(source, bytes | bytearray | memoryview):
        content, label = bytes(source), name or "image"
    else:
        label = name or str(source)
        content = _read(source, label, limits)
    if not content:
        raise ImageError("empty", f"{label} is empty")
    if len(content) > limits.max_bytes:
        raise _too_many_bytes(label, limits)
    try:
        pixels = _decode(_reader(content, label)(BytesIO(content)), label, limits)
    except DECODER_ERRORS as problem:
        raise _damaged(label, problem, cut_off=_ends_early(content)) from problem
    return Picture(pixels, hashlib.sha256(content).hexdigest(), label)


def list_pictures(folder: str | Path) -> list[Path]:
    """The pictures of a folder (not of its subfolders), by name; told by their suffix alone."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ImageError("missing", f"there is no folder {folder}")
    found = (p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def _read(source: str | Path, label: str, limits: Limits) -> bytes:
    """A regular file's bytes, or one more than the limit."""
    if not isinstance(source, str | Path):
        raise TypeError(f"a picture is a path, bytes or a Pillow image, not {type(source).__name__}")
    if str(source).startswith(("http://", "https://")):
        raise ImageError("missing", f"{label} is a web address: download the picture first")
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            raise ImageError("missing", f"{label} is a folder, not a picture")
        if not path.exists():
            raise ImageError("missing", f"there is no file {label}")
        if not path.is_file():  # a pipe would block, a device never end
            raise ImageError("missing", f"{label} is no regular file")
        with path.open("rb") as file:
            return file.read(limits.max_bytes + 1)
    except (OSError, ValueError, RuntimeError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem)
        raise ImageError("missing", f"{label} cannot be read: {reason}") from problem


def _too_many_bytes(label: str, limits: Limits) -> ImageError:
    return ImageError("too_large", f"{label} has more than {limits.max_bytes >> 20} MB")


def _reader(content: bytes, label: str) -> type[ImageFile.ImageFile]:
    """The one reader that the first bytes call for.

    Its class is called and not Image.open, whose warning about large pictures would come before our check.
    """
    if content.startswith(b"\xff\xd8\xff"):
        return JpegImageFile
    if content.startswith(PNG_MAGIC):
        _check_png(content)
        return PngImageFile
    if content.startswith((b"GIF87a", b"GIF89a")):
        return GifImageFile
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return WebPImageFile
    raise ImageError("format", f"{label} is {_guess(content)}: JPEG, PNG, WebP and GIF are read")


def _check_png(content: bytes) -> None:
    """Compare the checksums of the chunks that make the picture.

    Pillow does not, and where compressed data is damaged it returns black rows in silence.
    """
    place = len(PNG_MAGIC)
    while place + 12 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 8 + length
        if end + 4 > len(content) or kind == b"IEND":
            return  # Pillow tells whether what is missing matters
        critical = not kind[0] & 0x20
        if critical and zlib.crc32(memoryview(content)[place + 4 : end]) != int.from_bytes(
            content[end : end + 4]
        ):
            raise ValueError(f"chunk {kind!r} has the wrong checksum")
        place = end + 4


def _ends_early(content: bytes) -> bool:
    """True where the mark that ends a file of its format is missing."""
    tail = content[-4096:].rstrip(b"\0")
    if content.startswith(b"\xff"):
        return not tail.endswith(b"\xff\xd9")
    if content.startswith(b"\x89"):
        return b"IEND" not in tail
    if content.startswith(b"GIF"):
        return not tail.endswith(b";")
    return len(content) < 8 + int.from_bytes(content[4:8], "little")


def _guess(content: bytes) -> str:
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


def _damaged(label: str, problem: BaseException, cut_off: bool = False) -> ImageError:
    if isinstance(problem, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return ImageError("too_large", f"{label} has too many pixels")
    if cut_off or isinstance(problem, EOFError):
        return ImageError("truncated", f"{label} is cut off before its end")
    return ImageError("damaged", f"{label} is damaged and cannot be decoded")


def _decode(image: ImageFile.ImageFile, label: str, limits: Limits) -> Image.Image:
    """Decode the first frame of an image whose header has been read; upright RGB within the limits."""
    _check_size(image, label, limits)
    turn = _orientation(image)
    if image.width * image.height > limits.keep_pixels:
        image.draft(None, _halved(image.size, limits.keep_pixels))  # JPEG decodes straight to 1/2, 1/4, 1/8
    image.load()
    _check_size(image, label, limits)  # a GIF frame may reach beyond the screen that its header gave
    return _finish(image, turn, limits)


def _from_pillow(image: Image.Image, label: str, limits: Limits) -> Picture:
    """A picture that somebody has already opened, or drawn."""
    _check_size(image, label, limits)
    try:
        image.load()
        digest = hashlib.sha256(f"{image.mode} {image.size}".encode())
        for top in range(0, image.height, rows := _strip_rows(image)):
            digest.update(image.crop((0, top, image.width, min(top + rows, image.height))).tobytes())
        if image.palette is not None:
            digest.update(image.palette.tobytes())
        # An image that has been worked on keeps its EXIF though its pixels may have been turned.
        turn = _orientation(image) if isinstance(image, ImageFile.ImageFile) else 1
        return Picture(_finish(image, turn, limits), digest.hexdigest(), label)
    except DECODER_ERRORS as problem:
        raise _damaged(label, problem) from problem


def _check_size(image: Image.Image, label: str, limits: Limits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError("empty", f"{label} has no pixels ({width} x {height})")
    allowed = limits.max_pixels
    if isinstance(image, WebPImageFile):
        allowed = min(allowed, limits.max_webp_pixels)
    if width * height > allowed or max(width, height) > limits.max_side:
        raise ImageError(
            "too_large",
            f"{label} claims {width} x {height} pixels: at most {allowed / 1e6:.3g} million are read, "
            f"and {limits.max_side} a side",
        )


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8; damaged EXIF is no reason to refuse a picture."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except DECODER_ERRORS:
        return 1
    return value if isinstance(value, int) and value in UPRIGHT else 1


def _halved(size: tuple[int, int], pixels: int) -> tuple[int, int]:
    """The size after as many halvings as bring it within `pixels`."""
    factor = _factor(size, pixels)
    return max(1, size[0] // factor), max(1, size[1] // factor)


def _factor(size: tuple[int, int], pixels: int) -> int:
    factor = 1
    while (size[0] // factor) * (size[1] // factor) > pixels:
        factor *= 2
    return factor


def _strip_rows(image: Image.Image) -> int:
    """Rows of about a megapixel; a multiple of 64, so that halvings fall on whole cells."""
    return max(64, STRIP_PIXELS // image.width // 64 * 64)


def _finish(image: Image.Image, turn: int, limits: Limits) -> Image.Image:
    """RGB on white, within `keep_pixels`, upright. Large pictures go strip by strip to save memory."""
    width, height = image.size
    if width * height <= STRIP_PIXELS:
        result = _flatten(image)
    else:
        factor = _factor(image.size, limits.keep_pixels)
        result = Image.new("RGB", (-(-width // factor), -(-height // factor)))
        rows = _strip_rows(image)
        for top in range(0, height, rows):
            strip = _flatten(image.crop((0, top, width, min(top + rows, height))))
            result.paste(strip.reduce(factor) if factor > 1 else strip, (0, top // factor))
    return result.transpose(UPRIGHT[turn]) if turn in UPRIGHT else result


def _flatten(image: Image.Image) -> Image.Image:
    """Any mode to RGB: 16 and 32 bits scaled to 8, transparency laid on white."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _scaled(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return image.convert("RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits: 0 to 65535 onto 0 to 255, rounded; floats are taken as 0 to 1."""
    import numpy as np

    values = np.asarray(image)
    if image.mode == "F":
        grey = np.nan_to_num(values).clip(0, 1) * 255
    else:
        grey = values.astype(np.float32).clip(0, 65535) / 257
    result = Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    clear = image.info.get("transparency")
    if isinstance(clear, int):
        mask = Image.fromarray(np.where(values == clear, 255, 0).astype(np.uint8))
        result.paste((255, 255, 255), mask=mask)
    return result
