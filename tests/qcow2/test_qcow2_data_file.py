"""Images whose guest data has a file of its own: QEMU's read by us and ours by it; and a raw data file is the disk at any time."""

import json
import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peers import peer
from qcow2.images import LONG, as_raw, assert_clean, qemu_img, qemu_io
from qcow2.memory import MemoryNode
from stillframe.block.create import create_qcow2
from stillframe.block.file import FileNode
from stillframe.block.graph import BlockGraph
from stillframe.block.node import ExtentKind, Node
from stillframe.block.options import parse_options
from stillframe.block.qcow2 import Qcow2Node, create_image
from stillframe.block.qcow2.check import check
from stillframe.errors import (
    AlreadyExists,
    ImageCorrupt,
    InvalidRequest,
    IOFailed,
    Refused,
    StillframeError,
    Unsupported,
)
from stillframe.snapshots.selection import snapshot_node

KIB = 1024
SIZE = 3 * KIB * KIB + 512


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU looks for a data file from its working directory on."""
    monkeypatch.chdir(tmp_path)


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[Node]:
    """The image with the data file that it names, as a machine opens it."""
    graph = BlockGraph()
    try:
        file = {"driver": "file", "filename": str(path)}
        yield graph.blockdev_add({"driver": "qcow2", "node-name": "node", "file": file, **options})
    finally:
        graph.close()


def made(path: Path, size: int = SIZE, **options: Any) -> Path:
    create_qcow2(str(path), size, options={"data_file": "data.raw", **options})
    return path


def exercise(node: Node, model: bytearray, chance: random.Random, steps: int) -> None:
    """Random requests, each checked against the model."""
    for _ in range(steps):
        length = chance.choice([1, 512, 4096, 65536, 100_000, 300_000])
        start = chance.randrange(0, len(model) - length)
        if chance.random() < 0.5:
            start &= ~65535
            length = min(length, len(model) - start)
        what = chance.choice(["write", "write", "write", "zero", "keep", "discard", "flush"])
        if what == "write":
            data = chance.randbytes(length)
            node.write(start, data)
            model[start : start + length] = data
        elif what == "flush":
            node.flush()
        elif what == "discard":
            node.discard(start, length)
            after = node.read(start, length)
            before = model[start : start + length]
            assert all(new in (old, 0) for old, new in zip(before, after, strict=True))
            model[start : start + length] = after
        else:
            node.write_zeroes(start, length, unmap=what == "zero")
            model[start : start + length] = bytes(length)
        assert node.read(0, len(model)) == model


@pytest.mark.usefixtures("every_qemu")
@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("cluster_size", [512, 65536, 2 << 20])
def test_both_sides_read_what_the_other_wrote(cluster_size: int, raw: bool, tmp_path: Path) -> None:
    path, data = tmp_path / "image.qcow2", tmp_path / "data.raw"
    made(path, cluster_size=cluster_size, data_file_raw=raw)
    model = bytearray(SIZE)
    for seed in range(12 if LONG else 3):
        with opened(path) as node:
            exercise(node, model, random.Random(seed), 25)
            assert all(
                each.host_offset == each.offset
                for each in node.extents(0, SIZE)
                if each.kind is ExtentKind.DATA
            )
        assert_clean(path)
        assert as_raw(path) == model
        assert data.stat().st_size <= SIZE
        if raw:
            assert data.read_bytes() == model
        file = FileNode("file", str(path), read_only=True)
        assert check(file).as_qapi()["check-errors"] == 0
        file.close()
        qemu_io(path, f"write -P {seed + 1} 70000 200000", "write -z -u 128k 64k", "discard 1M 64k")
        model[70_000:270_000] = bytes([seed + 1]) * 200_000
        model[128 * KIB : 192 * KIB] = bytes(64 * KIB)
        model[KIB * KIB :][: 64 * KIB] = bytes(64 * KIB)
        with opened(path, **{"read-only": True}) as node:
            model[KIB * KIB : KIB * KIB + 64 * KIB] = node.read(KIB * KIB, 64 * KIB)
            assert node.read(0, SIZE) == model == as_raw(path)


@pytest.mark.usefixtures("every_qemu")
@pytest.mark.parametrize("raw", ["on", "off"])
def test_an_image_of_qemus_is_read_written_and_described_as_qemu_does(raw: str, tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    options = f"data_file=data.raw,data_file_raw={raw}"
    qemu_img("create", "-f", "qcow2", "-o", options, path, str(SIZE))
    qemu_io(path, "write -P 5 0 100k", "write -P 6 1M 1M", "write -z 1200k 100k")
    model = bytearray(as_raw(path))
    with opened(path) as node:
        assert node.read(0, SIZE) == model
        exercise(node, model, random.Random(9), 40)
        ours = node.info()
    assert as_raw(path) == model
    assert_clean(path)
    theirs = json.loads(qemu_img("info", "--output=json", path))
    assert ours.format_specific == theirs["format-specific"]
    if "children" in theirs:
        assert [role for role, _ in ours.children] == [each["name"] for each in theirs["children"]]
    if raw == "on":
        # Theirs end with a cluster, not with the disk.
        assert (tmp_path / "data.raw").read_bytes().rstrip(b"\0") == model.rstrip(b"\0")


@pytest.mark.usefixtures("every_qemu")
@pytest.mark.parametrize("raw", [False, True])
def test_the_data_file_takes_every_size_of_the_disk(raw: bool, tmp_path: Path) -> None:
    path, data = made(tmp_path / "image.qcow2", data_file_raw=raw), tmp_path / "data.raw"
    model = bytearray(SIZE)
    chance = random.Random(4)
    for size in (SIZE + 70_144, 1024 * KIB + 1024, 40 * KIB * KIB, 700 * KIB):
        with opened(path) as node:
            exercise(node, model, chance, 6)
            node.truncate(size)
            model = model[:size].ljust(size, b"\0")
            assert node.read(0, size) == model
        assert_clean(path)
        assert as_raw(path) == model
        if raw:
            assert data.read_bytes() == model


def test_what_lay_behind_the_disk_in_the_data_file_does_not_become_the_guests(tmp_path: Path) -> None:
    for raw in (False, True):
        path, data = made(tmp_path / f"{raw}.qcow2", 65536, data_file_raw=raw), tmp_path / "data.raw"
        with opened(path) as node:
            node.write(0, b"a" * 65536)
        data.write_bytes(b"a" * 65536 + b"stale" * 30_000)
        with opened(path) as node:
            node.truncate(200_192)
            node.write(131_072, b"b")
            expected = (b"a" * 65536).ljust(131_072, b"\0") + b"b".ljust(200_192 - 131_072, b"\0")
            assert node.read(0, node.size) == expected
        if raw:
            assert data.read_bytes() == expected
        data.unlink()


def test_a_guest_that_fills_a_raw_data_file_by_other_means_finds_it_in_the_image(tmp_path: Path) -> None:
    path = made(tmp_path / "image.qcow2", data_file_raw=True)
    content = random.Random(1).randbytes(SIZE)
    (tmp_path / "data.raw").write_bytes(content)
    with opened(path) as node:
        assert node.read(0, SIZE) == content
    assert as_raw(path) == content


class Journal(MemoryNode):
    """A file in memory that tells what was done to it, and can lose what was not flushed."""

    def __init__(self, name: str, journal: list[tuple[str, str]]) -> None:
        super().__init__()
        self.name, self.journal = name, journal
        self.durable = b""
        self.fails = False

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.journal.append((self.name, "write"))
        super().write(offset, data)

    def flush(self) -> None:
        if self.fails:
            raise IOFailed("no", errno=5)
        self.journal.append((self.name, "flush"))
        self.durable = bytes(self.data)


def test_a_power_cut_brings_nothing_back_that_was_zeroed(tmp_path: Path) -> None:
    journal: list[tuple[str, str]] = []
    file, data = Journal("file", journal), Journal("data", journal)
    create_image(file, 1 << 20, data=data, data_file="data.raw")
    node = Qcow2Node("node", file, data=data)
    node.write(0, b"old" * 20_000)
    node.flush()
    node.write_zeroes(0, 65536, unmap=False)
    node.flush()

    def after_a_power_cut(tables: bytes) -> bytes:
        there = Qcow2Node(
            "after", MemoryNode(tables), data=MemoryNode(data.durable, read_only=True), read_only=True
        )
        return there.read(0, 60_000)

    node.write(0, b"new" * 20_000)
    assert after_a_power_cut(bytes(file.data)) == bytes(60_000)
    data.fails = True
    with pytest.raises(IOFailed):
        node.flush()
    assert after_a_power_cut(bytes(file.data)) == bytes(60_000)
    data.fails = False
    del journal[:]
    node.flush()
    assert journal.index(("data", "flush")) < journal.index(("file", "write"))
    assert after_a_power_cut(file.durable) == b"new" * 20_000


def test_snapshots_are_refused_by_name(tmp_path: Path) -> None:
    with opened(made(tmp_path / "image.qcow2")) as node:
        assert node.snapshot_store is None
        assert node.info().snapshots == ()
        with pytest.raises(Unsupported, match=r"^Device 'node' is writable but does not support snapshots$"):
            snapshot_node(node)


def test_neither_file_is_written_by_others_meanwhile(tmp_path: Path) -> None:
    path = made(tmp_path / "image.qcow2")
    with opened(path):
        for name, kind in (("image.qcow2", "qcow2"), ("data.raw", "raw")):
            refused = subprocess.run(
                [peer("qemu-io"), "-f", kind, "-c", "write 0 512", name], capture_output=True, text=True
            )
            assert 'Failed to get "write" lock' in refused.stderr
    other = subprocess.Popen(
        [peer("qemu-io"), "-f", "qcow2", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdin
        assert other.stdout
        other.stdin.write(b"write 0 512\n")
        other.stdin.flush()
        other.stdout.readline()
        with pytest.raises(StillframeError, match="lock"), opened(path):
            pass
    finally:
        other.communicate()


# What an image may name.


def naming(path: Path, name: str) -> Path:
    """An image that names any data file."""
    file = FileNode.create("new", str(path))
    create_image(file, 65536, data=MemoryNode(), data_file=name)
    file.close()
    return path


def test_an_image_chooses_no_file_of_others_to_be_written(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious".ljust(65536, b"\0"))
    os.symlink(victim, home / "link")
    for number, name in enumerate((str(victim), "../victim", "link", "file:../victim")):
        path = naming(home / f"{number}.qcow2", name)
        with pytest.raises(Refused, match="no file in the image's own directory"), opened(path):
            pass
        with opened(path, **{"read-only": True}) as node:
            assert node.read(0, 8) == bytes(8)
        asked = {"data-file": {"driver": "file", "filename": str(victim)}}
        with opened(path, **asked) as node:
            node.write(4096, b"asked for")
    assert victim.read_bytes()[:8] == b"\0" * 8 or victim.read_bytes()[:8] == b"precious"


@pytest.mark.parametrize(
    "name",
    [
        'json:{"driver": "file", "filename": "data.raw"}',
        "nbd://example.org/disk",
        "fat:rw:.",
        "/dev/null",
        ".",
        "",
        "nothing-there",
        "image.qcow2",
    ],
)
def test_a_data_file_is_a_plain_file_and_not_the_image(name: str, tmp_path: Path) -> None:
    path = naming(tmp_path / "image.qcow2", name)
    before = path.read_bytes()
    for read_only in (False, True):
        with pytest.raises(Refused), opened(path, **{"read-only": read_only}):
            pass
    assert path.read_bytes() == before


def test_beside_the_image_neither_hidden_files_nor_other_disks_are_written(tmp_path: Path) -> None:
    """An image put into a home directory, or among other machines' disks."""
    (tmp_path / ".profile").write_bytes(bytes(65536))
    (tmp_path / ".config").mkdir()
    (tmp_path / ".config" / "start").write_bytes(bytes(65536))
    create_qcow2(str(tmp_path / "other.qcow2"), 65536)
    (tmp_path / "visible").symlink_to(".profile")
    for number, name in enumerate((".profile", ".config/start", "visible", "other.qcow2", "a\0b")):
        path = naming(tmp_path / f"{number}.qcow2", name)
        with pytest.raises(Refused), opened(path):
            pass
    asked = {"data-file": {"driver": "file", "filename": str(tmp_path / ".profile")}}
    with opened(tmp_path / "0.qcow2", **asked) as node:
        node.write(0, b"asked for")
    assert (tmp_path / ".profile").read_bytes()[:9] == b"asked for"


def test_the_option_and_the_header_must_agree(tmp_path: Path) -> None:
    create_qcow2(str(tmp_path / "plain.qcow2"), 65536)
    (tmp_path / "data").write_bytes(bytes(65536))
    asked = {"data-file": {"driver": "file", "filename": "data"}}
    with (
        pytest.raises(
            InvalidRequest, match="'data-file' can only be set for images with an external data file"
        ),
        opened(tmp_path / "plain.qcow2", **asked),
    ):
        pass
    file, data = MemoryNode(), MemoryNode()
    create_image(file, 65536, data=data, data_file="x")
    with pytest.raises(InvalidRequest, match="'data-file' is required for this image"):
        Qcow2Node("node", file)
    text = "qcow2,file.driver=file,file.filename=a,data-file.driver=raw,data-file.file=b"
    assert parse_options(text).children["data-file"].driver == "raw"  # type: ignore[union-attr]


def test_an_option_names_the_data_file_instead_and_any_driver_may_hold_it(tmp_path: Path) -> None:
    path = made(tmp_path / "image.qcow2")
    os.rename("data.raw", "moved.raw")
    with pytest.raises(StillframeError, match=r"data\.raw"), opened(path):
        pass
    file = {"driver": "file", "filename": "moved.raw"}
    asked = {"data-file": {"driver": "raw", "node-name": "below", "file": file}}
    with opened(path, **asked) as node:
        node.write(1000, b"x" * 100_000)
        node.truncate(SIZE // 2 // 512 * 512)
        assert node.children["data-file"].node_name == "below"
    assert (tmp_path / "moved.raw").read_bytes()[1000:101_000] == b"x" * 100_000
    assert (tmp_path / "moved.raw").stat().st_size == SIZE // 2 // 512 * 512


# What an image may hold.


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        (1 << 63 | 65536, "does not match guest cluster offset"),
        (1 << 62, "Invalid compressed cluster"),
        (1 << 63 | 512, "unaligned"),
    ],
)
def test_entries_that_no_data_file_can_have_are_corruption(entry: int, text: str) -> None:
    file, data = MemoryNode(), MemoryNode()
    create_image(file, 1 << 20, data=data, data_file="x", data_file_raw=True)
    table = file.data.index((1 << 63).to_bytes(8, "big") + (1 << 63 | 65536).to_bytes(8, "big"))
    file.data[table : table + 8] = entry.to_bytes(8, "big")
    node = Qcow2Node("node", file, data=data)
    with pytest.raises(ImageCorrupt, match=text):
        node.read(0, 512)
    with pytest.raises(ImageCorrupt, match=text):
        node.write(0, b"x" * 512)
    node.write(65536, b"y" * 512)
    assert node.read(65536, 1) == b"y"


# Creating.


def test_what_cannot_be_made_is_refused_in_qemus_words_and_leaves_no_file(tmp_path: Path) -> None:
    for options in (
        {"data_file_raw": True},
        {"data_file": "data", "compat": "0.10"},
        {"data_file": "data", "data_file_raw": True, "backing_file": "b", "backing_format": "raw"},
    ):
        words = {"compat": "1.1"} | {
            {"backing_format": "backing_fmt"}.get(name, name): "on" if value is True else value
            for name, value in options.items()
        }
        text = ",".join(f"{name}={value}" for name, value in words.items())
        command = [peer("qemu-img"), "create", "-u", "-f", "qcow2", "-o", text, "theirs.qcow2", "1M"]
        theirs = subprocess.run(command, capture_output=True, text=True).stderr
        for each in ("theirs.qcow2", "data"):
            (tmp_path / each).unlink(missing_ok=True)
        with pytest.raises(InvalidRequest) as refused:
            create_qcow2("ours.qcow2", 1 << 20, options=options)
        assert str(refused.value) in theirs
        assert not list(tmp_path.iterdir())


def test_an_existing_data_file_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "data.raw").write_bytes(b"precious")
    with pytest.raises(AlreadyExists, match=r"data\.raw"):
        made(tmp_path / "image.qcow2")
    with pytest.raises(InvalidRequest, match="the image itself"):
        create_qcow2("image.qcow2", 65536, replace=True, options={"data_file": "./image.qcow2"})
    assert [each.name for each in tmp_path.iterdir()] == ["data.raw"]
    assert (tmp_path / "data.raw").read_bytes() == b"precious"
