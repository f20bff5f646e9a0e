"""The windows of raw, and the disk that forgets."""

from pathlib import Path

import pytest

from stillframe.block.file import FileNode
from stillframe.block.node import ExtentKind
from stillframe.block.null import NullNode
from stillframe.block.raw import RawNode
from stillframe.errors import InvalidRequest, Refused, Unsupported


@pytest.fixture
def file(tmp_path: Path):
    node = FileNode.create("file", str(tmp_path / "image"))
    node.truncate(8192)
    node.write(0, bytes(range(256)) * 32)
    yield node
    node.close()


def test_a_window_shows_its_part_and_changes_nothing_else(file: FileNode) -> None:
    window = RawNode("window", file, offset=100, size=1024)
    assert window.size == 1024
    assert window.read(0, 4) == bytes([100, 101, 102, 103])
    window.write(1020, b"abcd")
    window.write_zeroes(0, 10)
    before = bytes(range(256)) * 32
    expected = before[:100] + bytes(10) + before[110:1120] + b"abcd" + before[1124:]
    assert file.read(0, 8192) == expected
    for offset, length in ((1024, 1), (1020, 5), (-1, 1)):
        with pytest.raises(InvalidRequest):
            window.read(offset, length)
        with pytest.raises(InvalidRequest):
            window.write(offset, bytes(length))
    assert [(each.offset, each.length, each.host_offset) for each in window.extents(0, 1024)] == [
        (0, 1024, 100)
    ]


def test_without_a_size_the_window_moves_with_the_file(file: FileNode) -> None:
    window = RawNode("window", file, offset=512)
    assert window.size == 8192 - 512
    window.truncate(1024)
    assert (window.size, file.size) == (1024, 1536)
    with pytest.raises(Unsupported, match="Cannot resize fixed-size raw disks"):
        RawNode("fixed", file, size=512).truncate(0)


def test_windows_outside_the_file_are_refused_in_qemus_words(file: FileNode) -> None:
    with pytest.raises(
        InvalidRequest, match=r"Offset \(9000\) cannot be greater than size of the containing"
    ):
        RawNode("window", file, offset=9000)
    with pytest.raises(
        InvalidRequest, match=r"The sum of offset \(512\) and size \(8192\) has to be smaller"
    ):
        RawNode("window", file, offset=512, size=8192)
    with pytest.raises(InvalidRequest, match="Specified size is not multiple of 512"):
        RawNode("window", file, size=1000)


def test_ignored_discards_leave_the_bytes(file: FileNode) -> None:
    RawNode("raw", file, discard=False).discard(0, 8192)
    assert file.read(0, 256) == bytes(range(256))
    RawNode("raw", file).discard(0, 8192)
    assert file.read(0, 256) == bytes(256)


def test_a_read_only_window_takes_no_change(file: FileNode) -> None:
    window = RawNode("window", file, read_only=True)
    for change in (
        lambda: window.write(0, b"x"),
        lambda: window.write_zeroes(0, 1),
        lambda: window.discard(0, 1),
        lambda: window.truncate(0),
    ):
        with pytest.raises(Refused):
            change()


def test_the_null_disk_has_a_size_and_forgets_what_is_written() -> None:
    node = NullNode("null")
    assert node.size == 1 << 30
    node.write(5, b"x" * 100)
    buffer = bytearray(b"y" * 100)
    node.readinto(0, memoryview(buffer))
    assert buffer == bytes(100)
    assert [each.kind for each in node.extents(0, 10)] == [ExtentKind.DATA]
    assert [each.kind for each in NullNode("n", read_zeroes=True).extents(0, 10)] == [ExtentKind.ZERO]
    with pytest.raises(InvalidRequest):
        node.read(node.size, 1)


def test_a_null_disk_of_negative_size_is_refused_where_qemu_aborts() -> None:
    with pytest.raises(InvalidRequest, match="size is invalid"):
        NullNode("null", size=-5)
    with pytest.raises(InvalidRequest, match="latency-ns is invalid"):
        NullNode("null", latency_ns=-1)
