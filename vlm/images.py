"""The one door for untrusted image bytes.

    open_picture("photo.jpg").pixels  ->  an upright RGB picture without transparency

JPEG, PNG, WebP and GIF only, told apart by their first bytes and never by a name. The size that the
header claims is checked before anything is decoded, and Pillow sees no more of a file than its first
picture. Everything that can go wrong with the bytes is an `ImageError`, whose message is one line.
"""

from __future__ import annotations

import hashlib
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Final, Literal

from PIL import Image, ImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from vlm.container import Facts, Kind, Refused, ends_early, guess, parts_of
from vlm.errors import VLMError

Code = Literal["missing", "empty", "format", "truncated", "too_large", "damaged"]
Source = str | Path | bytes | Image.Image

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
MEMORY: Final = 280 << 20
"""Bytes that all decoding in this process may take together."""
# Classes that are called, and not Image.open, whose warning about large pictures would come before our check.
READERS: Final[dict[Kind, type[ImageFile.ImageFile]]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "GIF": GifImageFile,
    "WEBP": WebPImageFile,
}
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
    max_coefficients: int = 150_000_000
    """Bytes that a JPEG of several scans (a progressive one) keeps until it is complete: 2 a pixel and
    channel, that is 50 megapixels as cameras write them, 25 with full colour, 18 in CMYK."""


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
    digest, cut_off = hashlib.sha256(content).hexdigest(), ends_early(content)
    try:
        content, facts = _parts(content, label, limits)
        with _ROOM.taken(_memory(facts, limits)):
            image = READERS[facts.kind](BytesIO(content))
            del content  # what is no longer needed makes room for the pixels
            pixels = _loaded(image, label, limits)
            del image
            return Picture(_turned(pixels, facts.turn), digest, label)
    except Refused as refusal:
        raise ImageError("damaged", f"{label} {refusal}") from None
    except DECODER_ERRORS as problem:
        raise _damaged(label, problem, cut_off) from problem


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


def _damaged(label: str, problem: BaseException, cut_off: bool = False) -> ImageError:
    if isinstance(problem, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return ImageError("too_large", f"{label} has too many pixels")
    if cut_off or isinstance(problem, EOFError):
        return ImageError("truncated", f"{label} is cut off before its end")
    return ImageError("damaged", f"{label} is damaged and cannot be decoded")


class _Room:
    """Memory that threads share: who finds too little of it left waits until others have done."""

    def __init__(self, size: int) -> None:
        self._size = self._left = size
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, amount: int) -> Iterator[None]:
        """While this many bytes are in use; what is more than all takes all."""
        amount = min(amount, self._size)
        with self._changed:
            self._changed.wait_for(lambda: self._left >= amount)
            self._left -= amount
        try:
            yield
        finally:
            with self._changed:
                self._left += amount
                self._changed.notify_all()


_ROOM: Final = _Room(MEMORY)


def _parts(content: bytes, label: str, limits: Limits) -> tuple[bytes, Facts]:
    """What is decoded of a file and what is known of it, where that is within the limits."""
    if (parts := parts_of(content)) is None:
        raise ImageError("format", f"{label} is {guess(content)}: JPEG, PNG, WebP and GIF are read")
    facts = parts[1]
    _check_bounds(facts.size, facts.kind, label, limits)
    if facts.coefficients > limits.max_coefficients:
        raise ImageError(
            "too_large",
            f"{label} claims {facts.size[0]} x {facts.size[1]} pixels in a JPEG of several scans, "
            "which takes too much memory: save it smaller, or not as progressive",
        )
    return parts


def _loaded(image: ImageFile.ImageFile, label: str, limits: Limits) -> Image.Image:
    """The first frame of an image whose header has been read; RGB within the limits."""
    _check_size(image, label, limits)
    if image.width * image.height > limits.keep_pixels:
        image.draft(None, _halved(image.size, limits.keep_pixels))  # JPEG decodes straight to 1/2, 1/4, 1/8
    image.load()
    _check_size(image, label, limits)
    return _finish(image, limits)


def _memory(facts: Facts, limits: Limits) -> int:
    """Bytes that it will take to load, finish and turn a picture, at 4 a pixel in every mode."""
    pixels = facts.size[0] * facts.size[1]
    beside = 16 * min(pixels, STRIP_PIXELS) + facts.length
    if facts.kind == "WEBP":  # two canvases, a frame, and what Pillow makes of it
        return 16 * pixels + beside
    factor = _factor(facts.size, limits.keep_pixels)
    kept = 4 * pixels // factor**2
    loaded = 4 * pixels // (min(factor, 8) ** 2 if facts.kind == "JPEG" else 1)
    return max(loaded + facts.coefficients + kept, 2 * kept) + beside


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
        return Picture(_turned(_finish(image, limits), turn), digest.hexdigest(), label)
    except DECODER_ERRORS as problem:
        raise _damaged(label, problem) from problem


def _check_size(image: Image.Image, label: str, limits: Limits) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError("empty", f"{label} has no pixels ({width} x {height})")
    _check_bounds(image.size, image.format, label, limits)


def _check_bounds(size: tuple[int, int], kind: str | None, label: str, limits: Limits) -> None:
    width, height = size
    allowed = limits.max_pixels
    if kind == "WEBP":
        allowed = min(allowed, limits.max_webp_pixels)
    if width * height > allowed or max(width, height) > limits.max_side:
        raise ImageError(
            "too_large",
            f"{label} claims {width} x {height} pixels: at most {allowed / 1e6:.3g} million are read, "
            f"and {limits.max_side} a side",
        )


def _orientation(image: Image.Image) -> int:
    """EXIF orientation as Pillow has read it, 1 to 8; damaged EXIF is no reason to refuse a picture."""
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


def _turned(image: Image.Image, turn: int) -> Image.Image:
    return image.transpose(UPRIGHT[turn]) if turn in UPRIGHT else image


def _finish(image: Image.Image, limits: Limits) -> Image.Image:
    """RGB on white, within `keep_pixels`. Large pictures go strip by strip to save memory."""
    width, height = image.size
    if width * height <= STRIP_PIXELS:
        return _flatten(image)
    factor = _factor(image.size, limits.keep_pixels)
    result = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    rows = _strip_rows(image)
    for top in range(0, height, rows):
        strip = _flatten(image.crop((0, top, width, min(top + rows, height))))
        result.paste(strip.reduce(factor) if factor > 1 else strip, (0, top // factor))
    return result


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
