"""Options that commands share: what `keep_memory` spares."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

TAKE_AND_FREE = """
import resource
from vlm.options import keep_memory
{first}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
begin = faults()
for _ in range(12):
    bytearray(96 << 20)
print(faults() - begin)
"""


def faults(first: str) -> int:
    """Pages of memory that a process is given while it takes and frees the same 96 MiB twelve times."""
    code = TAKE_AND_FREE.format(first=first)
    return int(
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    )


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc alone")
def test_freed_memory_is_kept() -> None:
    assert 4 * faults("keep_memory()") < faults("")
