"""What the crash and error tests of others rest on: the log replays to the file, and faults come where they are ordered."""

import errno
from pathlib import Path

import pytest

from block.faults import FaultyNode, Flush, Punch, RecordingNode, apply
from stillframe.block.file import FileNode
from stillframe.block.qcow2 import Qcow2Node, create_image
from stillframe.errors import IOFailed, StillframeError

MIB = 1 << 20


def work(file: RecordingNode | FaultyNode) -> None:
    """Some of everything that a format does to its file."""
    create_image(file, MIB, cluster_size=4096)
    node = Qcow2Node("q", file)
    try:
        node.write(10_000, b"x" * 100_000)
        node.flush()
        node.discard(8192, 65536)
        node.write_zeroes(90_000, 30_000)
    finally:
        node.close()


def test_the_log_of_a_recording_replays_to_the_same_file(tmp_path: Path) -> None:
    file = FileNode.create("file", str(tmp_path / "image"))
    recording = RecordingNode(file)
    work(recording)
    image = bytearray()
    for step in recording.log:
        apply(image, step)
    file.close()
    assert image == (tmp_path / "image").read_bytes()
    assert isinstance(recording.log[-1], Flush)


def test_a_fault_comes_at_its_call_and_at_each_call_can_be_one(tmp_path: Path) -> None:
    def attempt(fail_at: int | None) -> int:
        file = FileNode.create("file", str(tmp_path / "image"), replace=True)
        faulty = FaultyNode(file, fail_at, errno.ENOSPC)
        try:
            work(faulty)
        finally:
            calls = faulty.calls
            file.close()
        return calls

    recording = RecordingNode(FileNode.create("file", str(tmp_path / "recorded")))
    work(recording)
    assert len(recording.log) == attempt(None) > 10
    for fail_at, step in enumerate(recording.log):
        if isinstance(step, Punch):
            # Space that is not given back harms nobody: a format need not tell.
            attempt(fail_at)
            continue
        with pytest.raises(StillframeError):
            attempt(fail_at)


def test_a_disk_that_died_stays_dead(tmp_path: Path) -> None:
    file = FileNode.create("file", str(tmp_path / "image"))
    file.truncate(MIB)
    faulty = FaultyNode(file, 1, errno.EIO, forever=True)
    faulty.write(0, b"x")
    for _ in range(3):
        with pytest.raises(IOFailed, match="Input/output error"):
            faulty.flush()
    assert file.read(0, 1) == b"x"
    file.close()
