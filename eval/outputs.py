"""Places that a command writes to: checked before the work begins, and one clear line where one fails."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vlm.errors import ConfigError, DataError


def check(path: Path | None, flag: str = "--out", *, page: bool = False, spare: Sequence[Path] = ()) -> None:
    """Makes the folder of a file that is to be written, and sees that it can be.

    Args:
        path: the file; None is fine.
        flag: the option that names it, for the message.
        page: an HTML page goes beside it, under its name with .html.
        spare: files that it must not replace.

    Raises:
        ConfigError: a folder, one of the files to spare, the page's own name, or a place where nothing can be
            written.
    """
    if path is None:
        return
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder: name a file in it, such as {path / 'report.json'}")
    if page and path.suffix.lower() in (".html", ".htm"):
        raise ConfigError(
            f"{flag} {path} would be replaced by the page of that name: give {path.with_suffix('.json')}"
        )
    if any(path.resolve() == other.resolve() for other in spare):
        raise ConfigError(
            f"{flag} {path} would replace a file that is read or written too: give another name"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A probe with a name of its own: another process may be looking at the same moment.
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {error.strerror or error}") from None


@contextmanager
def writing(path: Path, hint: str = "") -> Iterator[None]:
    """Turns what the system says of a file that cannot be written (a full disk) into one line.

    Args:
        hint: what to do about it, after that.

    Raises:
        DataError: the file cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}{hint}") from error
