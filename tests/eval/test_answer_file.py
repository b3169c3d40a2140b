"""The file of answers on a disk that is full, and where it is no file of answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from parrot import Parrot, run, work

from vlm.errors import DataError


@pytest.mark.parametrize("share", [0.01, 0.3, 0.55, 0.9])
def test_a_full_disk_keeps_the_answers_that_are_there(share: float, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk's end: in the header, in a line, between two."""
    import resource

    path, todo = tmp_path / "a.jsonl", work(11, task="x")
    whole = run(Parrot(), todo, tmp_path / "whole.jsonl")
    size = (tmp_path / "whole.jsonl").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), hard))
        with pytest.raises(
            DataError, match=r"a\.jsonl cannot be written: File too large; .*are kept: make room"
        ):
            run(Parrot(), todo, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    kept = max(path.read_text(encoding="utf-8").count("\n") - 1, 0)
    assert path.stat().st_size == int(share * size) and (kept > 0) == (share > 0.1)
    again = Parrot()
    assert run(again, todo, path) == whole
    assert len(again.asked) == 11 - kept


def test_a_file_of_answers_that_is_no_text_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"run": {}}\n\xff\xfe\n')
    with pytest.raises(DataError, match=r"a\.jsonl is not UTF-8 text \(byte 12\); --restart drops it"):
        run(Parrot(), work(), tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").mkdir()
    with pytest.raises(DataError, match=r"b\.jsonl cannot be written: Is a directory"):
        run(Parrot(), work(), tmp_path / "b.jsonl")
