"""The mark of an operation over several images: one write puts it into any header, QEMU keeps it or refuses it, and what
was there before comes back."""

import contextlib
import json
import subprocess
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from block.faults import ForwardingNode, RecordingNode, Write
from peers import QEMU_VERSIONS, peer, using
from qcow2.images import assert_clean, make, opened, qemu_img, qemu_io, take
from qcow2.memory import MemoryNode
from stillframe.block.file import FileNode
from stillframe.block.node import GroupKind, GroupMark, GroupStage, Node, SnapshotRecord
from stillframe.block.qcow2 import Qcow2Node
from stillframe.block.qcow2.check import check
from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.layout import EXTENSION_FEATURE_NAMES, feature_names, pack_extensions
from stillframe.block.qcow2.marks import EXTENSION_MARK, Mark, pack_mark, unpack_mark
from stillframe.block.qcow2.repair import repair
from stillframe.block.qcow2.unfinished import write_mark
from stillframe.errors import InUse, IOFailed, LimitReached, Unsupported

GROUP = GroupMark(uuid.UUID(int=7), GroupKind.SAVE, GroupStage.UNDER_WAY, True, 3, "root.qcow2")
SAVE = Mark(GROUP, b"s" * 16)
LOAD = Mark(replace(GROUP, kind=GroupKind.LOAD), bytes(16), b"b" * 48, b"a" * 48)

LAYOUTS = {
    "ours": ["ours"],
    "ours, 512": ["ours", "cluster_size=512"],
    "v3": [],
    "v3, 512": ["cluster_size=512"],
    "v2": ["compat=0.10"],
    "v2, 512": ["compat=0.10", "cluster_size=512"],
    "v3, name": ["short name"],
    "v3, 512, name": ["short name", "cluster_size=512"],
    "v2, name": ["short name", "compat=0.10"],
    "v2, 512, name": ["short name", "compat=0.10", "cluster_size=512"],
    "v3, long name": ["long name"],
    "v2, long name": ["long name", "compat=0.10"],
    "v2, 4096, long name": ["long name", "compat=0.10", "cluster_size=4096"],
}


@pytest.fixture(params=LAYOUTS)
def image(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Headers as they come, each with some data behind them."""
    words = list(LAYOUTS[request.param])
    path = tmp_path / "image.qcow2"
    options = [word for word in words if "=" in word]
    if "ours" in words:
        make(path, 1 << 20, **{k: int(v) for k, v in (each.split("=") for each in options)})
    else:
        name = "b" * 230 + ".raw" if "long name" in words else "b.raw"
        backing: list[str] = []
        if any("name" in word for word in words):
            (tmp_path / name).write_bytes(b"\x42" * (1 << 20))
            backing = ["-b", name if "long name" not in words else f"{tmp_path}/{name}", "-F", "raw"]
        with using("host"):
            qemu_img("create", "-f", "qcow2", "-o", ",".join(options) or "compat=1.1", *backing, path, "1M")
    with using("host"):
        qemu_io(path, "write -P 7 64k 64k")
    return path


def described(path: Path) -> dict[str, object]:
    """What qemu-img says of the header, its size on disk left out."""
    found = json.loads(qemu_img("info", "--output=json", path))
    return {key: value for key, value in found.items() if key not in ("actual-size", "children")}


@contextlib.contextmanager
def recording(path: Path) -> Iterator[tuple[Image, RecordingNode]]:
    file = FileNode("file", str(path))
    try:
        recorder = RecordingNode(file)
        image = Image(recorder, None, read_only=False)
        recorder.log.clear()
        yield image, recorder
    finally:
        file.close()


@pytest.mark.parametrize("mark", [SAVE, LOAD], ids=["save", "load"])
def test_a_mark_comes_by_one_write_of_the_first_sector_and_what_was_there_comes_back(
    image: Path, mark: Mark
) -> None:
    before, seen = image.read_bytes(), described(image)
    cluster = 1 << before[23]
    with recording(image) as (opened_image, file):
        write_mark(opened_image, mark, barred=mark is LOAD)
        writes = [step for step in file.log if isinstance(step, Write)]
        assert [(step.offset, len(step.data)) for step in writes if step.offset < 512] == [(0, 512)]
        # A name that leaves the sector goes where nobody reads, within the header's cluster.
        for step in writes[:-1]:
            assert 512 <= step.offset < step.offset + len(step.data) <= cluster
            assert before[step.offset : step.offset + len(step.data)] == bytes(len(step.data))
        file.log.clear()
        write_mark(opened_image, None, barred=False)
        writes = [step for step in file.log if isinstance(step, Write)]
        assert [(step.offset, len(step.data)) for step in writes] == [(0, 512)]
    assert image.read_bytes()[:512] == before[:512]
    assert described(image) == seen
    assert_clean(image)


@pytest.mark.parametrize("version", QEMU_VERSIONS)
@pytest.mark.parametrize("mark", [SAVE, LOAD], ids=["save", "load"])
def test_a_mark_that_a_crash_left_is_read_and_taken_off_without_a_trace(
    image: Path, mark: Mark, version: str
) -> None:
    with using(version):
        seen = described(image)
        with recording(image) as (opened_image, _):
            write_mark(opened_image, mark, barred=mark is LOAD)
        if mark is SAVE:
            assert described(image) == seen
            assert_content(image)
            assert_clean(image)
        with recording(image) as (opened_image, _):
            found = opened_image.sector.mark
            assert found is not None
            assert found.group == mark.group
            assert (found.before, found.after, found.snapshot) == (mark.before, mark.after, mark.snapshot)
            write_mark(opened_image, None, barred=False)
        assert described(image) == seen
        assert_content(image)
        assert_clean(image)
    with recording(image) as (opened_image, _):
        assert opened_image.sector.mark is None


def assert_content(path: Path) -> None:
    below = 0x42 if "backing-filename" in described(path) else 0
    qemu_io(path, "read -P 7 64k 64k", f"read -P {below} 0 64k")


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_stock_tools_refuse_an_image_in_the_middle_of_a_load(image: Path, version: str) -> None:
    with recording(image) as (opened_image, _):
        write_mark(opened_image, LOAD, barred=True)
    before = image.read_bytes()
    said = (
        "Unsupported qcow2 version" if before[7] == 2 and before[4] else "unfinished load of several images"
    )
    with using(version):
        for words in (
            ["qemu-img", "check", "-r", "all", "-f", "qcow2"],
            ["qemu-img", "snapshot", "-c", "x"],
            ["qemu-io", "-c", "write 0 64k"],
        ):
            run = subprocess.run([peer(words[0]), *words[1:], str(image)], capture_output=True, text=True)
            assert run.returncode != 0, words
            assert said in run.stderr + run.stdout, (words, run.stderr)
    assert image.read_bytes() == before


@pytest.mark.parametrize("version", QEMU_VERSIONS)
@pytest.mark.parametrize("compat", ["1.1", "0.10"])
def test_qemu_keeps_the_mark_of_a_save_whatever_it_does_to_the_image(
    tmp_path: Path, compat: str, version: str
) -> None:
    path, base = tmp_path / "image.qcow2", tmp_path / "base.raw"
    base.write_bytes(bytes(1 << 20))
    with using(version):
        qemu_img("create", "-f", "qcow2", "-o", f"compat={compat}", path, "1M")
        qemu_io(path, "write -P 7 0 128k")
        with recording(path) as (opened_image, _):
            write_mark(opened_image, SAVE, barred=False)
        qemu_img("rebase", "-u", "-f", "qcow2", "-b", base, "-F", "raw", path)
        assert_mark(path)
        for words in (["-c", "a"], ["-c", "b"], ["-a", "a"], ["-d", "a"]):
            qemu_img("snapshot", *words, path)
            assert_mark(path)
        qemu_img("check", "-r", "leaks", path)
        qemu_img("check", "-r", "all", path)
        if compat == "1.1":
            qemu_img("amend", "-f", "qcow2", "-o", "lazy_refcounts=on", path)
            qemu_img("bitmap", "--add", path, "b0")
            qemu_img("bitmap", "--remove", path, "b0")
        qemu_io(path, "write -P 9 64k 64k")
        assert_mark(path)


def assert_mark(path: Path) -> None:
    with opened(path, read_only=True) as node:
        assert node.image.sector.mark is not None
        assert node.image.sector.mark.group == SAVE.group


def test_a_header_without_room_refuses_the_mark_before_anything_is_written(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    data = bytearray(path.read_bytes())
    area = pack_extensions(((0x12345678, bytes(300)),))
    data[112 : 112 + len(area)] = area
    path.write_bytes(data)
    with recording(path) as (image, file):
        with pytest.raises(LimitReached, match="no room for the mark"):
            write_mark(image, LOAD, barred=True)
        assert file.log == []
        assert image.broken is None
    with opened(path) as node, pytest.raises(LimitReached, match="no room for the mark"):
        node.snapshot_store.refuse_if_unmarkable()


@pytest.mark.parametrize("call", ["write", "flush"])
def test_a_header_that_needs_a_second_try_keeps_its_extensions_beyond_the_sector(
    tmp_path: Path, call: str
) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    data = bytearray(path.read_bytes())
    area = pack_extensions(((0x12345678, bytes(range(250)) * 8), (EXTENSION_FEATURE_NAMES, feature_names())))
    data[112 : 112 + len(area)] = area
    file = FailingHeader(MemoryNode(data), call)
    node = Qcow2Node("node", file)
    change = node.snapshot_store.freeze().prepare(SnapshotRecord("s", 1, 2))
    file.failures = 2
    with pytest.raises(IOFailed):
        change.commit()
    change.abandon()
    assert not node.image.broken
    assert file.read(112, len(area)) == area
    take(node, "s")
    node.close()
    assert file.read(112, len(area)) == area
    path.write_bytes(bytes(file.read(0, file.size)))
    assert_clean(path)


class FailingHeader(ForwardingNode):
    """Fails at the next writes of the header, or at the flushes after them."""

    def __init__(self, inner: Node, call: str) -> None:
        super().__init__(inner)
        self.call, self.failures, self.is_header = call, 0, False

    def _fail(self) -> None:
        self.failures -= 1
        raise IOFailed("the header could not be written", errno=5)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.is_header = offset < 512
        if self.is_header and self.failures and self.call == "write":
            self._fail()
        super().write(offset, data)

    def flush(self) -> None:
        if self.is_header and self.failures and self.call == "flush":
            self._fail()
        super().flush()


@pytest.mark.parametrize("what", ["leaks", "all"])
def test_an_image_in_the_middle_of_a_load_is_checked_and_not_repaired(
    tmp_path: Path, what: Literal["leaks", "all"]
) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    with recording(path) as (image, _):
        write_mark(image, LOAD, barred=True)
    before = path.read_bytes()
    file = MemoryNode(before)
    assert check(file).corruptions == 0
    with pytest.raises(InUse, match="interrupted"):
        repair(file, what)
    assert bytes(file.data) == before


def test_unknown_extensions_and_a_later_marks_stay(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    data = bytearray(path.read_bytes())
    later = bytes([2]) + bytes(59)
    extensions = ((0x12345678, b"someone else's"), (EXTENSION_MARK, later))
    area = pack_extensions(extensions)
    data[112 : 112 + len(area)] = area
    path.write_bytes(data)
    with opened(path) as node:
        with pytest.raises(InUse, match="later version"):
            node.snapshot_store.refuse_if_unmarkable()
        assert node.snapshot_store.unfinished is None
        node.write(0, b"x" * 512)
    assert path.read_bytes()[112 : 112 + len(area)] == area
    data[72] |= 0x40
    with pytest.raises(Unsupported, match="cannot resolve"):
        Qcow2Node("node", MemoryNode(data))


def test_nothing_is_read_or_written_through_an_image_in_the_middle_of_a_load(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    with recording(path) as (image, _):
        write_mark(image, LOAD, barred=True)
    before = path.read_bytes()
    with opened(path) as node:
        store = node.snapshot_store
        for use in (
            lambda: node.read(0, 512),
            lambda: node.write(0, bytes(512)),
            lambda: node.write_zeroes(0, 65536),
            lambda: node.discard(0, 65536),
            lambda: node.truncate(2 << 20),
            lambda: list(node.extents(0, 512)),
            store.freeze,
        ):
            with pytest.raises(InUse, match="interrupted"):
                use()
        assert store.is_withheld
        node.flush()
        assert node.info().virtual_size == 1 << 20
    assert path.read_bytes() == before


@given(
    st.builds(
        Mark,
        st.builds(
            GroupMark,
            st.uuids(),
            st.sampled_from(GroupKind),
            st.sampled_from(GroupStage),
            st.booleans(),
            st.integers(0, 65535),
            st.text(st.characters(codec="ascii"), max_size=64),
        ),
        st.binary(min_size=16, max_size=16),
        names_dropped=st.booleans(),
    ),
    st.integers(0, 300),
)
def test_a_mark_is_read_as_it_was_written_and_a_damaged_one_is_none(mark: Mark, cut: int) -> None:
    if mark.group.kind is GroupKind.LOAD:
        mark = replace(mark, before=b"b" * 48, after=b"a" * 48)
    data = pack_mark(mark)
    assert unpack_mark(data) == mark
    assert len(data) <= 200
    assert cut >= len(data) or unpack_mark(data[:cut]) is None
    assert unpack_mark(data + b"x") is None


@given(st.binary(max_size=220))
def test_no_bytes_in_place_of_a_mark_raise_anything(data: bytes) -> None:
    unpack_mark(data)
