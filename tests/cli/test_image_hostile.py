"""What the command line shows of a stranger's image, and what it does about files that are no images."""

import json
import os
import struct
from pathlib import Path

import pytest

from cli.commands import in_process, stillframe
from stillframe.block.create import create_qcow2
from stillframe.block.file import FileNode
from stillframe.block.qcow2 import Qcow2Node
from stillframe.errors import IOFailed, StillframeError

NASTY = b"\x1b[2J\x1b]0;own\x07\nroot: done\r\xff\xfe\xe2\x80\xae"


def image(path: Path, backing: bytes = b"", snapshot: bytes = b"") -> Path:
    """An image with any bytes as its backing name and its snapshot's name."""
    create_qcow2(str(path), 1 << 20)
    data = bytearray(path.read_bytes())
    if backing:
        data[4096 : 4096 + len(backing)] = backing
        struct.pack_into(">QI", data, 8, 4096, len(backing))
    if snapshot:
        at = len(data)
        entry = struct.pack(">QIHHIIQII", 0, 0, 1, len(snapshot), 0, 0, 0, 0, 16)
        data += (entry + struct.pack(">QQ", (1 << 64) - 1, 1 << 20) + b"1" + snapshot).ljust(65536, b"\0")
        struct.pack_into(">IQ", data, 60, 1, at)
    path.write_bytes(data)
    return path


def test_names_of_an_image_cannot_steer_the_terminal(tmp_path: Path) -> None:
    hostile = image(tmp_path / "hostile.qcow2", NASTY, NASTY)
    for words in (["info"], ["snapshot", "list"], ["check"]):
        shown = stillframe("image", *words, hostile)
        assert shown.code in (0, 1, 2, 3)
        assert shown.stdout + shown.stderr
        for text in (shown.stdout, shown.stderr):
            assert "Traceback" not in text
            assert not {"\x1b", "\x07", "\r", "\u202e"} & set(text)
            assert "\nroot: done" not in text
    told = stillframe("image", "info", "--json", hostile)
    assert json.loads(told.stdout)["backing-filename"].startswith("\x1b[2J")


def test_info_opens_nothing_that_an_image_names(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for name in (b"/dev/tty", os.fsencode(fifo), b"nbd://127.0.0.1:1/x", b'json:{"driver": "nbd"}'):
        told = in_process("image", "info", image(tmp_path / "top.qcow2", name))
        assert told.code == 0, told.stderr
        (tmp_path / "top.qcow2").unlink()


@pytest.mark.parametrize("words", [["info"], ["check"], ["snapshot", "list"]])
def test_what_is_no_file_is_refused_and_waited_for_by_nobody(words: list[str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    for path in (tmp_path / "fifo", tmp_path / "loop", tmp_path / "dangling", Path("/dev/zero"), tmp_path):
        refused = stillframe("image", *words, path)
        assert refused.code == 1
        assert refused.stderr.startswith("stillframe: ")
        assert "Traceback" not in refused.stderr


def test_a_file_that_shrinks_while_it_is_open_is_an_io_error(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    create_qcow2(str(path), 1 << 20)
    file = FileNode("file", str(path))
    node = Qcow2Node("node", file)
    node.write(0, b"x" * 200_000)
    node.flush()
    os.truncate(path, 65536)
    with pytest.raises(IOFailed, match=r"Could not read from .*: Input/output error"):
        node.read(0, 200_000)
    for step in (lambda: node.write(500_000, b"y" * 1000), node.close, file.close):
        try:
            step()
        except StillframeError:
            pass


def test_an_image_as_long_as_a_file_can_be_costs_no_more_than_a_short_one(tmp_path: Path) -> None:
    """Most file systems end at 16 TiB."""
    path = tmp_path / "long.qcow2"
    create_qcow2(str(path), 1 << 20)
    for bits in (62, 60, 43, 40):
        try:
            os.truncate(path, 1 << bits)
            break
        except OSError:
            continue
    assert path.stat().st_size >= 1 << 40
    for words in (["info"], ["check"], ["snapshot", "create", path, "s"], ["snapshot", "list"]):
        done = stillframe("image", *words, *([] if path in words else [path]))
        assert done.code == 0, (words, done.stderr)
