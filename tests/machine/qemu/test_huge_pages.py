import json
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


def test_memory_of_another_process_is_in_huge_pages_again_and_is_what_it_was() -> None:
    with other_process() as other:
        before = said(other)
        assert in_huge_pages(other.pid) == 0
        for _ in range(50):
            # A busy host takes its time, and is asked again at the next save.
            try:
                fold_other(other.pid, lambda: None)
            except OSError as error:
                pytest.skip(f"not here: {error.strerror}")
            if in_huge_pages(other.pid) >= SIZE - (4 << 20):
                break
        assert in_huge_pages(other.pid) >= SIZE - (4 << 20)
        assert other.stdin is not None
        other.stdin.write("\n")
        other.stdin.flush()
        assert said(other) == before


def test_save_that_is_cancelled_waits_for_no_memory_to_be_put_together() -> None:
    class GivenUp(Exception):
        pass

    def attend() -> None:
        raise GivenUp

    with other_process() as other:
        said(other)
        small = in_huge_pages(other.pid)
        try:
            with pytest.raises(GivenUp):
                fold_other(other.pid, attend)
        except OSError as error:
            pytest.skip(f"not here: {error.strerror}")
        assert in_huge_pages(other.pid) == small


def test_process_that_has_ended_is_told_as_the_hosts_answer() -> None:
    with other_process() as other:
        said(other)
    with pytest.raises(OSError, match="No such process"):
        fold_other(other.pid, lambda: None)


@pytest.mark.parametrize("allowed", [True, False])
def test_doctor_says_whether_memory_is_put_together_and_what_is_missing(allowed: bool) -> None:
    words = [sys.executable, "-m", "stillframe", "doctor", "--json"]
    if os.geteuid() != 0:
        pytest.skip("only root has a right to give up")
    if not allowed:
        words = ["setpriv", "--bounding-set", "-sys_nice", *words]
    ended = subprocess.run(words, capture_output=True, text=True)
    (line,) = [each for each in json.loads(ended.stdout) if each["name"] == "huge pages"]
    if allowed and line["verdict"] != "ok":
        pytest.skip(f"not here: {line['detail']}")
    assert line["verdict"] == ("ok" if allowed else "limited")
    assert ("CAP_SYS_NICE" in line["remedy"]) == (not allowed)
