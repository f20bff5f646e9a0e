"""While we write an image nobody else may, and the reverse, with the real programs."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from block.qemu_dialogue import QemuBlockLayer
from peers import QEMU_VERSIONS, peer
from stillframe.block.file import FileNode
from stillframe.block.graph import BlockGraph
from stillframe.errors import InUse

WRITE = 'Failed to get "write" lock'
SHARED_WRITE = 'Failed to get shared "write" lock'


@pytest.fixture
def image(tmp_path: Path) -> str:
    path = str(tmp_path / "image.qcow2")
    subprocess.run([peer("qemu-img"), "create", "-q", "-f", "qcow2", path, "8M"], check=True)
    return path


def run(*command: str) -> str:
    """What a program prints; both streams."""
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


@contextmanager
def qemu_io(*arguments: str) -> Iterator[None]:
    """qemu-io holding an image open."""
    process = subprocess.Popen(
        [peer("qemu-io"), *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("length\n")
    process.stdin.flush()
    process.stdout.readline()
    try:
        yield
    finally:
        process.communicate("quit\n")


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_stock_programs_refuse_an_image_that_we_write(image: str, version: str) -> None:
    qemu_img, qemu_io = peer("qemu-img", version), peer("qemu-io", version)
    ours = FileNode("file", image)
    assert WRITE in run(qemu_io, "-c", "write 0 512", image)
    assert WRITE in run(qemu_img, "snapshot", "-c", "x", image)
    assert WRITE in run(qemu_img, "create", "-f", "qcow2", image, "1M")
    assert SHARED_WRITE in run(qemu_img, "info", image)
    assert SHARED_WRITE in run(qemu_img, "check", image)
    assert "file format: qcow2" in run(qemu_img, "info", "-U", image)
    ours.close()
    assert "wrote 512/512" in run(qemu_io, "-c", "write 0 512", image)


@pytest.mark.usefixtures("every_qemu")
def test_stock_programs_may_read_what_we_read_and_not_write_it(image: str) -> None:
    ours = FileNode("file", image, read_only=True)
    assert "read 512/512" in run(peer("qemu-io"), "-r", "-c", "read 0 512", image)
    assert WRITE in run(peer("qemu-io"), "-c", "write 0 512", image)
    ours.close()


@pytest.mark.usefixtures("every_qemu")
def test_we_refuse_an_image_that_qemu_io_writes(image: str) -> None:
    with qemu_io(image):
        with pytest.raises(InUse) as refused:
            FileNode("file", image)
        assert str(refused.value) == WRITE
        assert refused.value.remedy == f"Is another process using the image [{image}]?"
        with pytest.raises(InUse) as refused:
            FileNode("file", image, read_only=True)
        assert str(refused.value) == SHARED_WRITE
        FileNode("file", image, read_only=True, locking="off").close()
    FileNode("file", image).close()


@pytest.mark.usefixtures("every_qemu")
def test_we_refuse_to_write_an_image_that_qemu_io_reads(image: str) -> None:
    with qemu_io("-r", image):
        with pytest.raises(InUse) as refused:
            FileNode("file", image)
        assert str(refused.value) == WRITE
        FileNode("file", image, read_only=True).close()


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_we_and_a_running_qemu_refuse_each_other(image: str, tmp_path: Path, version: str) -> None:
    options = {
        "driver": "qcow2",
        "node-name": "disk",
        "file": {"driver": "file", "filename": image},
    }
    graph = BlockGraph()
    qemu = QemuBlockLayer(tmp_path, version)
    try:
        assert qemu.ask("blockdev-add", options) == {}
        with pytest.raises(InUse) as refused:
            graph.blockdev_add(options)
        assert str(refused.value) == WRITE
        assert qemu.ask("blockdev-del", {"node-name": "disk"}) == {}
        graph.blockdev_add(options)
        assert qemu.ask("blockdev-add", options) == WRITE
        graph.blockdev_del("disk")
        assert qemu.ask("blockdev-add", options) == {}
    finally:
        qemu.close()
        graph.close()


def test_two_nodes_of_one_process_refuse_each_other(image: str) -> None:
    ours = FileNode("file", image)
    with pytest.raises(InUse, match=WRITE):
        FileNode("other", image)
    with pytest.raises(InUse, match=SHARED_WRITE):
        FileNode("other", image, read_only=True)
    ours.close()


@pytest.mark.usefixtures("every_qemu")
def test_a_refused_change_of_permissions_keeps_the_locks_from_before(image: str) -> None:
    from stillframe.block.permissions import FORMAT_READER, FORMAT_WRITER

    first = FileNode("first", image, permissions=FORMAT_READER)
    second = FileNode("second", image, permissions=FORMAT_READER)
    with pytest.raises(InUse):
        first.set_permissions(FORMAT_WRITER)
    assert first.permissions == FORMAT_READER
    assert WRITE in run(peer("qemu-io"), "-c", "write 0 512", image)
    second.close()
    first.set_permissions(FORMAT_WRITER)
    assert SHARED_WRITE in run(peer("qemu-img"), "info", image)
    first.close()


@pytest.mark.usefixtures("every_qemu")
def test_a_raw_disk_is_locked_from_the_moment_a_device_uses_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    graph = BlockGraph()
    node = graph.blockdev_add(
        {"driver": "raw", "node-name": "r", "file": {"driver": "file", "filename": str(path)}}
    )
    command = (peer("qemu-io"), "-f", "raw", "-c", "write 0 512", str(path))
    assert "wrote 512" in run(*command)
    with graph.use(node, "disk0", writable=True):
        assert WRITE in run(*command)
    assert "wrote 512" in run(*command)
    graph.close()
