"""What must hold at the image door of any bytes, and a target that lets atheris look for those that break it.

    pip install atheris
    python tests/vlm/fuzz_images.py -max_total_time=600 build/pictures

Options are libFuzzer's. The folder is the corpus: it begins with a small picture of every kind, and what
atheris finds interesting stays there. Bytes that break the door are left in a file `crash-...`.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

# Nothing that is to be watched may be imported up here: atheris instruments what `main` imports.
CODES = {"empty", "format", "truncated", "too_large", "damaged"}
MEGABYTES = 300


def one_input(content: bytes) -> bool:
    """Whether the door reads these bytes; if not, it must say so with an `ImageError` of one line.

    Raises:
        AssertionError: what came out is no upright RGB picture within the limits, or the complaint is odd.
    """
    from vlm.images import DEFAULT_LIMITS, ImageError, Picture, open_picture

    try:
        picture = open_picture(content)
    except ImageError as error:
        assert error.code in CODES, error.code
        assert "\n" not in str(error), str(error)
        return False
    assert isinstance(picture, Picture)
    assert picture.pixels.mode == "RGB", picture.pixels.mode
    assert picture.pixels.width * picture.pixels.height <= DEFAULT_LIMITS.keep_pixels, picture.pixels.size
    return True


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """A file of this kind."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seeds() -> dict[str, bytes]:
    """Small pictures of every kind that is read, with something in every corner of the format."""
    import numpy as np
    from PIL import Image

    ramp = Image.fromarray((np.add.outer(np.arange(24), np.arange(32)) * 4).astype(np.uint8))
    colour = Image.merge("RGB", (ramp, ramp.transpose(Image.Transpose.FLIP_LEFT_RIGHT), ramp))
    clear = colour.copy()
    clear.putalpha(ramp)
    deep = Image.fromarray((np.arange(24 * 32).reshape(24, 32) * 80).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    return {
        "jpeg": encoded(colour, "JPEG", exif=exif),
        "progressive": encoded(colour, "JPEG", progressive=True),
        "cmyk": encoded(colour.convert("CMYK"), "JPEG"),
        "png": encoded(clear, "PNG", exif=exif),
        "png16": encoded(deep, "PNG"),
        "palette": encoded(colour.quantize(16), "PNG", transparency=3),
        "apng": encoded(colour, "PNG", save_all=True, append_images=[ramp.convert("RGB")]),
        "gif": encoded(colour.quantize(32), "GIF", save_all=True, append_images=[ramp.quantize(16)]),
        "webp": encoded(colour, "WEBP", save_all=True, append_images=[colour.rotate(90)]),
        "lossless": encoded(clear, "WEBP", lossless=True, exif=exif),
    }  # fmt: skip


def resident() -> int:
    """Megabytes that this process holds."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) // 1024


def main(argv: list[str]) -> None:
    """Hunt until libFuzzer's options say stop; ends the process."""
    import atheris

    with atheris.instrument_imports(include=["vlm.container", "vlm.images", "PIL"]):
        import vlm.images  # noqa: F401
    for folder in [Path(word) for word in argv[1:] if not word.startswith("-")][:1]:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in seeds().items():
            (folder / f"seed-{name}").write_bytes(content)

    def target(content: bytes) -> None:
        one_input(content)

    # A picture that takes more than its share is found, too.
    atheris.Setup([argv[0], f"-rss_limit_mb={resident() + MEGABYTES}", *argv[1:]], target)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    main(sys.argv)
