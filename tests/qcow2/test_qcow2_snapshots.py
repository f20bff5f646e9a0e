"""Freezing, the machine state, the record of where a snapshot comes from, and what is refused."""

import subprocess
import sys
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from block.faults import RecordingNode
from qcow2.images import assert_clean, make, named, opened, qemu_img, take
from qcow2.memory import MemoryNode
from stillframe.block.node import GroupMember, Lineage, SnapshotRecord
from stillframe.block.qcow2 import Qcow2Node, create_image
from stillframe.block.qcow2.lineage import pack_lineage, unpack_lineage
from stillframe.errors import InUse, InvalidRequest, LimitReached, NotFound, Unsupported


def in_memory(size: int = 4 << 20, cluster_size: int = 4096) -> tuple[RecordingNode, Qcow2Node]:
    file = RecordingNode(MemoryNode())
    create_image(file, size, cluster_size=cluster_size)
    return file, Qcow2Node("node", file)


def test_freezing_touches_nothing_and_frozen_clusters_are_not_overwritten() -> None:
    file, node = in_memory()
    node.write(0, b"before" * 10_000)
    node.flush()
    held = [
        (each.host_offset, each.length) for each in node.extents(0, 60_000) if each.host_offset is not None
    ]
    before = {place: bytes(file.read(*place)) for place in held}
    file.log.clear()
    pending = node.snapshot_store.freeze()
    assert file.log == []
    node.write(0, b"after" * 10_000)
    node.write_zeroes(0, 10_000)
    node.discard(0, 60_000)
    node.flush()
    assert {place: bytes(file.read(*place)) for place in held} == before
    pending.abandon()
    node.flush()
    node.close()


def test_only_one_snapshot_is_pending_and_nothing_else_changes_the_list_meanwhile() -> None:
    _, node = in_memory()
    take(node, "old")
    pending = node.snapshot_store.freeze()
    with pytest.raises(InUse):
        node.snapshot_store.freeze()
    with pytest.raises(InUse):
        node.snapshot_store.prepare_revert(named(node, "old"))
    with pytest.raises(InUse):
        node.snapshot_store.prepare_delete(named(node, "old"))
    with pytest.raises(InUse):
        node.truncate(8 << 20)
    change = pending.prepare(SnapshotRecord("new", 1, 2))
    with pytest.raises(InUse):
        node.write(0, b"the thread that holds the change would wait for itself")
    change.abandon()
    change.abandon()
    pending.abandon()
    node.snapshot_store.freeze().abandon()


def test_closing_gives_up_what_is_pending(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    with opened(path) as node:
        pending = node.snapshot_store.freeze()
        pending.write_state(0, b"s" * 1_000_000)
        node.write(0, b"x" * 300_000)
    assert_clean(path)
    assert path.stat().st_blocks * 512 < 1_000_000


def test_state_is_written_in_any_order_and_gaps_read_as_zeroes() -> None:
    _, node = in_memory(cluster_size=512)
    pending = node.snapshot_store.freeze()
    pending.write_state(1_000_000, b"z" * 5)
    pending.write_state(100, b"a" * 10_000)
    pending.write_state(5_000, b"b" * 10)
    change = pending.prepare(SnapshotRecord("s", 1, 2))
    change.commit()
    change.finish()
    info = named(node, "s")
    assert info.state_size == 1_000_005
    expected = bytearray(1_000_005)
    expected[100:10_100] = b"a" * 10_000
    expected[5_000:5_010] = b"b" * 10
    expected[1_000_000:] = b"z" * 5
    assert node.snapshot_store.read_state(info, 0, 2_000_000) == expected
    assert node.snapshot_store.read_state(info, 1_000_001, 100) == b"z" * 4
    assert node.snapshot_store.read_state(info, 5_000_000, 100) == b""


def lineage(members: int = 2, description: str = "before the upgrade") -> Lineage:
    return Lineage(
        uuid4(),
        uuid4(),
        uuid4(),
        tuple(GroupMember(f"node{number}", uuid4()) for number in range(members)),
        description,
    )


@pytest.mark.usefixtures("every_qemu")
def test_where_a_snapshot_comes_from_survives_stock_tools(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    record = lineage()
    with opened(path) as node:
        node.write(0, b"x" * 100_000)
        take(node, "ours", b"state", lineage=record)
    qemu_img("snapshot", "-c", "theirs", path)
    qemu_img("snapshot", "-a", "ours", path)
    qemu_img("snapshot", "-d", "theirs", path)
    with opened(path) as node:
        take(node, "another")
        assert named(node, "ours").lineage == record
        assert named(node, "another").lineage is None


@given(
    st.builds(
        Lineage,
        st.uuids(),
        st.one_of(st.none(), st.uuids().filter(lambda value: value != UUID(int=0))),
        st.uuids(),
        st.lists(
            st.builds(GroupMember, st.text(st.characters(codec="ascii"), max_size=31), st.uuids()), max_size=8
        ).map(tuple),
        st.text(max_size=120),
    )
)
def test_the_record_reads_back_as_written(value: Lineage) -> None:
    data = pack_lineage(value)
    assert unpack_lineage(data) == value
    assert unpack_lineage(data + b"what a later version appends") == value


@given(st.binary(max_size=1000))
def test_a_damaged_record_is_no_record_and_no_error(junk: bytes) -> None:
    unpack_lineage(junk)
    unpack_lineage(b"SFRM" + junk)
    data = bytearray(pack_lineage(lineage()))
    data[4 : 4 + len(junk)] = junk[: len(data) - 4]
    unpack_lineage(bytes(data))


def test_items_that_a_later_version_adds_are_skipped() -> None:
    value = lineage()
    data = bytearray(pack_lineage(value)) + b"\x00\x77\x00\x03abc"
    data[6:8] = len(data).to_bytes(2, "big")
    data[4:6] = b"\0\2"
    assert unpack_lineage(bytes(data)) == value


def test_a_record_that_does_not_fit_is_refused_before_anything_is_touched() -> None:
    file, node = in_memory()
    file.log.clear()
    with pytest.raises(LimitReached, match="40 nodes"):
        take(node, "s", lineage=lineage(members=40))
    with pytest.raises(InvalidRequest, match="501"):
        take(node, "s", lineage=lineage(description="x" * 501))
    with pytest.raises(InvalidRequest, match="256 bytes"):
        take(node, "x" * 256)
    assert not any(hasattr(step, "data") for step in file.log)
    assert not node.snapshot_store.snapshots()


def test_eighteen_nodes_with_the_longest_names_fit() -> None:
    members = tuple(GroupMember("n" * 31, uuid4()) for _ in range(18))
    value = Lineage(uuid4(), None, uuid4(), members)
    assert unpack_lineage(pack_lineage(value)) == value


def test_ids_count_on_from_the_largest(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    with opened(path) as node:
        for name in ("a", "b", "c"):
            take(node, name)
        first = named(node, "a")
        change = node.snapshot_store.prepare_delete(named(node, "b"))
        change.commit()
        change.finish()
        take(node, "d")
        assert [each.id for each in node.snapshot_store.snapshots()] == ["1", "3", "4"]
        change = node.snapshot_store.prepare_delete(first)
        change.commit()
        change.finish()
        with pytest.raises(NotFound):
            node.snapshot_store.prepare_delete(first)


def test_an_old_image_with_snapshots_keeps_its_size(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20, compat="0.10")
    with opened(path) as node:
        take(node, "s")
        with pytest.raises(Unsupported, match=r"^Can't resize a v2 image which has snapshots$"):
            node.truncate(2 << 20)
    assert_clean(path)


@pytest.mark.usefixtures("every_qemu")
def test_what_qemu_left_of_a_loaded_state_never_shows_in_a_disk_made_larger(tmp_path: Path) -> None:
    """QEMU's own load leaves the active L1 pointing into the state; the new bytes are zeroes all the same."""
    path = make(tmp_path / "image.qcow2", 1 << 20, cluster_size=512)
    with opened(path) as node:
        node.write(0, b"disk" * 1000)
        take(node, "s", b"state" * 100_000)
    qemu_img("snapshot", "-a", "s", path)
    with opened(path) as node:
        node.truncate(3 << 20)
        assert node.read(1 << 20, 2 << 20) == bytes(2 << 20)
        assert node.snapshot_store.read_state(named(node, "s"), 0, 1 << 30) == b"state" * 100_000
        take(node, "t")
    assert_clean(path)


def test_looking_at_an_image_does_without_heavy_libraries(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    with opened(path) as node:
        take(node, "s", b"state")
    code = (
        "import sys; from stillframe.block.file import FileNode; from stillframe.block.qcow2 import Qcow2Node\n"
        f"node = Qcow2Node('n', FileNode('f', {str(path)!r}, read_only=True), read_only=True)\n"
        "node.info(); node.read(0, 4096); node.snapshot_store.read_state(node.snapshot_store.snapshots()[0], 0, 5)\n"
        "sys.exit('numpy' in sys.modules or 'asyncio' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_new_snapshot_in_the_place_of_a_deleted_one_reads_its_own_state(tmp_path: Path) -> None:
    path = make(tmp_path / "image.qcow2", 1 << 20)
    with opened(path) as node:
        for number in range(1, 6):
            take(node, "s", bytes([number]) * 70_000)
            info = named(node, "s")
            assert node.snapshot_store.read_state(info, 0, 1 << 20) == bytes([number]) * 70_000
            change = node.snapshot_store.prepare_delete(info)
            change.commit()
            change.finish()


def test_snapshots_made_and_deleted_over_and_over_take_no_more_room() -> None:
    file, node = in_memory()
    sizes = []
    for _ in range(4):
        take(node, "one", bytes(range(256)) * 8192)
        change = node.snapshot_store.prepare_delete(named(node, "one"))
        change.commit()
        change.finish()
        sizes.append(file.size)
    assert max(sizes) < sizes[0] + (1 << 20)
