import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stillframe.machine.engines.qemu.huge_pages import fold_other

SIZE = 32 << 20
# As a QEMU's memory is after a save: small pages in a range that asks for huge ones.
OTHER = f"""
import hashlib, mmap, sys
memory = mmap.mmap(-1, {SIZE}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for at in range(0, {SIZE}, 4096):
    memory[at : at + 8] = at.to_bytes(8, "little")
memory.madvise(mmap.MADV_HUGEPAGE)
print(hashlib.sha256(memory).hexdigest(), flush=True)
sys.stdin.readline()
print(hashlib.sha256(memory).hexdigest(), flush=True)
"""


@contextmanager
def other_process() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", OTHER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        try:
            yield other
        finally:
            other.kill()


def said(other: subprocess.Popen[str]) -> str:
    assert other.stdout is not None
    return other.stdout.readline()


def in_huge_pages(pid: int) -> int:
    """Bytes."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(text.split("AnonHugePages:")[1].split()[0]) << 10


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a kernel without huge pages")
def test_memory_of_another_process_is_in_huge_pages_again_and_is_what_it_was() -> None:
    with other_process() as other:
        before = said(other)
        assert in_huge_pages(other.pid) == 0
        attended = []
        for _ in range(50):
            # A busy host takes its time, and is asked again at the next save.
            fold_other(other.pid, lambda: attended.append(None))
            if in_huge_pages(other.pid) >= SIZE - (4 << 20):
                break
        if not attended:
            pytest.skip("this kernel does not say which pages are small (before Linux 6.7)")
        if os.geteuid() != 0:
            pytest.skip("not with our rights")
        assert in_huge_pages(other.pid) >= SIZE - (4 << 20)
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
        assert said(other) == before


def test_a_save_that_is_cancelled_waits_for_no_memory_to_be_put_together() -> None:
    class GivenUp(Exception):
        pass

    def attend() -> None:
        raise GivenUp

    with other_process() as other:
        said(other)
        small = in_huge_pages(other.pid)
        try:
            fold_other(other.pid, attend)
        except GivenUp:
            assert in_huge_pages(other.pid) == small
        else:
            pytest.skip("this kernel does not say which pages are small (before Linux 6.7)")


def test_a_process_that_has_ended_is_left_alone() -> None:
    with other_process() as other:
        said(other)
    fold_other(other.pid, lambda: None)
