"""API keys: made once, kept as hashes, refused when the file is not what it should be."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest

pytest.importorskip("fastapi")

from vlm.errors import ConfigError
from vlm.serve.keys import Keys, add_key


def test_added_keys_open_and_the_file_never_holds_them(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first, second = add_key(path, "alice"), add_key(path, "bob")
    keys = Keys.read(path)
    assert len(keys) == 2 and first != second
    assert keys.opens(f"Bearer {first}") and keys.opens(f"bearer {second}")
    assert first not in path.read_text() and second not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "{key}", "Basic {key}", "Bearer {key}x", "Bearer {hash}", "Bearer \udcff"],
)
def test_anything_else_stays_shut(tmp_path: Path, value: str) -> None:
    path = tmp_path / "keys"
    key = add_key(path, "alice")
    stored = path.read_text().split()[1]
    assert not Keys.read(path).opens(value.format(key=key, hash=stored))


def test_a_last_line_without_its_end_is_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    first = add_key(path, "a")
    path.write_text("# ours\n" + path.read_text().rstrip("\n"))
    second = add_key(path, "b")
    assert all(Keys.read(path).opens(f"Bearer {key}") for key in (first, second))


@pytest.mark.parametrize("text", ["", "# nothing\n", "my-secret-key\n", "a b c\n", "name " + "g" * 64])
def test_files_without_usable_keys_are_errors_that_do_not_show_them(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Keys.read(path)
    assert "my-secret-key" not in str(caught.value)


def test_a_missing_file_and_a_bad_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        Keys.read(tmp_path / "none")
    with pytest.raises(ConfigError, match="key name"):
        add_key(tmp_path / "keys", "a b")


def test_a_file_that_begins_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    key = add_key(path, "alice")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Keys.read(path).opens(f"Bearer {key}")
