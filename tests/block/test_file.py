"""What a user loses if files are not read, written and flushed as promised."""

import errno
import os
import subprocess
import threading
from pathlib import Path

import pytest

from stillframe.block.file import FileNode, remove_file
from stillframe.block.node import ExtentKind
from stillframe.errors import (
    AlreadyExists,
    InUse,
    InvalidRequest,
    IOFailed,
    NoSpace,
    NotFound,
    Refused,
    Unsupported,
)

MIB = 1 << 20


@pytest.fixture
def node(tmp_path: Path):
    file = FileNode.create("file", str(tmp_path / "image"))
    file.truncate(4 * MIB)
    yield file
    file.close()


def test_what_is_written_is_read_back_and_is_in_the_file(node: FileNode) -> None:
    node.write(5, b"hello")
    node.write(4 * MIB - 3, memoryview(b"end"))
    assert node.read(4, 7) == b"\0hello\0"
    node.flush()
    with open(node.filename, "rb") as file:
        assert file.read()[-3:] == b"end"


def test_nothing_is_read_or_written_beyond_the_end(node: FileNode) -> None:
    for offset, length in ((4 * MIB, 1), (4 * MIB - 1, 2), (-1, 1)):
        with pytest.raises(InvalidRequest):
            node.read(offset, length)
        with pytest.raises(InvalidRequest):
            node.write(offset, bytes(length))
        with pytest.raises(InvalidRequest):
            node.write_zeroes(offset, length)
        with pytest.raises(InvalidRequest):
            node.discard(offset, length)
    assert os.path.getsize(node.filename) == 4 * MIB


def test_short_reads_and_writes_of_the_kernel_are_gone_on_with(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_write, whole_read = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole_write(fd, data[:1000], at))
    monkeypatch.setattr(os, "preadv", lambda fd, into, at: whole_read(fd, [into[0][:700]], at))
    data = os.urandom(10_000)
    node.write(123, data)
    assert node.read(123, 10_000) == data


@pytest.mark.parametrize("unmap", [True, False])
def test_zeroes_of_any_range_touch_nothing_else(node: FileNode, unmap: bool) -> None:
    node.write(0, b"x" * MIB)
    node.write_zeroes(1000, 100_000, unmap=unmap)
    assert node.read(0, MIB) == b"x" * 1000 + bytes(100_000) + b"x" * (MIB - 101_000)


def test_zeroes_are_written_where_the_file_system_cannot_make_them(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not here")

    monkeypatch.setattr("stillframe.block.file._fallocate_call", lambda: refuse)
    node.write(0, b"x" * 3 * MIB)
    node.write_zeroes(10, 2 * MIB)
    assert node.read(0, 3 * MIB) == b"x" * 10 + bytes(2 * MIB) + b"x" * (MIB - 10)
    node.discard(0, MIB)


def test_discarded_space_is_given_back_and_ignored_discard_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "image"
    for discard, left in ((True, 0), (False, MIB)):
        path.write_bytes(b"x" * MIB)
        file = FileNode("file", str(path), discard=discard)
        file.discard(0, MIB)
        assert file.info().actual_size == left
        file.close()


def test_extents_cover_the_range_and_tell_holes_from_data(node: FileNode) -> None:
    node.write(MIB, b"x" * MIB)
    kinds = [(extent.offset, extent.length, extent.kind) for extent in node.extents(0, node.size)]
    assert kinds == [
        (0, MIB, ExtentKind.ZERO),
        (MIB, MIB, ExtentKind.DATA),
        (2 * MIB, 2 * MIB, ExtentKind.ZERO),
    ]
    assert [each.length for each in node.extents(MIB - 10, 20)] == [10, 10]


def test_many_threads_do_not_mix_their_ranges(node: FileNode) -> None:
    def work(number: int) -> None:
        for turn in range(50):
            node.write(number * 4096, bytes([number, turn]) * 2048)
            assert node.read(number * 4096, 4096) == bytes([number, turn]) * 2048

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(8):
        assert node.read(number * 4096, 2) == bytes([number, 49])


def test_a_flush_that_failed_once_never_succeeds_again(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "lost")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        with pytest.raises(IOFailed) as first:
            node.flush()
    with pytest.raises(IOFailed) as second:
        node.flush()
    assert first.value.errno == second.value.errno == errno.EIO
    with pytest.raises(IOFailed):
        node.close()


def test_a_durable_write_that_failed_in_the_storage_counts_as_a_flush_that_failed(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "lost")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", fail)
        with pytest.raises(IOFailed, match="Could not flush"):
            node.write_durable(0, b"x")
    with pytest.raises(IOFailed):
        node.write_durable(0, b"x")
    with pytest.raises(IOFailed):
        node.flush()
    with pytest.raises(IOFailed):
        node.close()


def test_no_room_for_a_durable_write_leaves_the_file_usable(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        with pytest.raises(NoSpace):
            node.write_durable(0, b"x")
    node.write_durable(1, b"after")
    node.flush()
    assert node.read(0, 6) == b"\0after"


def test_where_the_storage_knows_no_durable_write_the_file_is_flushed(
    node: FileNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "unknown flag")

    flushed: list[int] = []
    monkeypatch.setattr(os, "pwritev", fail)
    monkeypatch.setattr(os, "fdatasync", flushed.append)
    node.write_durable(2, b"x")
    assert flushed
    assert node.read(2, 1) == b"x"


def test_the_storages_errno_reaches_the_caller(node: FileNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_with(number: int):
        def fail(*_: object) -> int:
            raise OSError(number, "no")

        return fail

    monkeypatch.setattr(os, "pwrite", fail_with(errno.ENOSPC))
    with pytest.raises(NoSpace, match="No space left on device") as caught:
        node.write(0, b"x")
    assert caught.value.errno == errno.ENOSPC
    assert node.filename in str(caught.value)
    monkeypatch.setattr(os, "preadv", fail_with(errno.EIO))
    with pytest.raises(IOFailed, match="Input/output error"):
        node.read(0, 1)


def test_a_file_cut_short_by_somebody_else_is_an_error_and_no_hang(node: FileNode) -> None:
    os.truncate(node.filename, 10)
    with pytest.raises(IOFailed):
        node.read(0, 100)


def test_read_only_nodes_take_no_change(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"x" * 4096)
    file = FileNode("file", str(path), read_only=True)
    for change in (
        lambda: file.write(0, b"y"),
        lambda: file.write_zeroes(0, 1),
        lambda: file.discard(0, 1),
        lambda: file.truncate(1),
    ):
        with pytest.raises(Refused, match="read-only"):
            change()
    file.flush()
    file.close()
    file.close()
    assert path.read_bytes() == b"x" * 4096


def test_resizing_gives_zeroes_and_refuses_what_is_no_size(node: FileNode) -> None:
    node.write(MIB, b"x")
    node.truncate(MIB)
    node.truncate(2 * MIB)
    assert node.read(MIB, 1) == b"\0"
    for size in (-1, 1 << 63, 1 << 70):
        with pytest.raises(InvalidRequest):
            node.truncate(size)


def test_missing_and_odd_files_are_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"^Could not open '/nx/y': No such file or directory$"):
        FileNode("file", "/nx/y")
    with pytest.raises(InvalidRequest, match=rf"^Could not open '{tmp_path}': Is a directory$"):
        FileNode("file", str(tmp_path))
    with pytest.raises(InvalidRequest, match=rf"^Could not open '{tmp_path}': Is a directory$"):
        FileNode("file", str(tmp_path), read_only=True)
    with pytest.raises(InvalidRequest):
        FileNode("file", "a\0b")
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for read_only in (False, True):
        with pytest.raises(InvalidRequest, match="Neither a regular file nor a block device"):
            FileNode("file", str(fifo), read_only=read_only)
    with pytest.raises(InvalidRequest):
        FileNode("file", "/dev/null")


def test_a_new_file_replaces_an_old_one_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"precious")
    with pytest.raises(AlreadyExists):
        FileNode.create("file", str(path))
    assert path.read_bytes() == b"precious"
    FileNode.create("file", str(path), replace=True).close()
    assert path.read_bytes() == b""
    remove_file(str(path))
    assert not path.exists()


def test_descriptors_are_not_inherited_and_not_left_open(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = open_files()
    path = tmp_path / "image"
    file = FileNode.create("file", str(path))
    assert not os.get_inheritable(file._fd)
    file.close()
    for name in (str(tmp_path), "/dev/null", str(tmp_path / "nx")):
        with pytest.raises(Refused):
            FileNode("file", name)
    assert open_files() == before


@pytest.mark.skipif(os.getuid() != 0, reason="a loop device needs root")
def test_a_block_device_is_as_good_as_a_file(tmp_path: Path) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(MIB))
    made = subprocess.run(["losetup", "--find", "--show", str(backing)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"this host gives no loop device: {made.stderr.strip()}")
    device = made.stdout.strip()
    try:
        node = FileNode("device", device)
        assert (node.driver, node.size) == ("host_device", MIB)
        node.write(5000, b"x" * 50_000)
        node.write_zeroes(10_000, 20_000)
        assert node.read(5000, 50_000) == b"x" * 5000 + bytes(20_000) + b"x" * 25_000
        with pytest.raises(Unsupported):
            node.truncate(2 * MIB)
        with pytest.raises(InUse):
            FileNode("other", device)
        node.close()
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
    assert backing.read_bytes()[5000:10_000] == b"x" * 5000
