"""Whatever stands in shared memory where a record of ours is expected: it opens, nothing is followed, and the image stays whole."""

import os
import random
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from qcow2.killed import IdentifiedNode, Instant, Shelf, Watched, reopened, shared_image
from qcow2.memory import MemoryNode
from stillframe.block.node import FileIdentity
from stillframe.block.qcow2 import Qcow2Node, unflushed
from stillframe.block.qcow2.check import Walk, check
from stillframe.block.qcow2.replay import Outcome

SIZE = 4096 + (64 << 15)
OLD, NEW = b"\x11" * 4096, b"\x22" * 4096


@pytest.fixture
def left(shelf: Shelf) -> Instant:
    """Eight clusters overwritten, and killed."""
    watched = Watched(shared_image(), shelf)
    for cluster in range(8):
        watched.node.write(cluster * 4096, NEW)
    watched.mark()
    return watched.now()


def examine(instant: Instant, expected: Outcome) -> None:
    """It opens with this outcome, holds all or nothing of what was replayed, and is whole; so it is the next time."""
    file = IdentifiedNode(instant.image, instant.inode)
    node = Qcow2Node("node", file)
    assert node.image.recovery is not None
    assert node.image.recovery.outcome is expected, node.image.recovery
    content = node.read(0, 16 * 4096)
    assert content == (NEW if expected is Outcome.REPLAYED else OLD) * 8 + OLD * 8
    node.write(0, b"\x33" * 4096)
    node.close()
    assert check(MemoryNode(file.data)).corruptions == 0
    again = Qcow2Node("node", IdentifiedNode(file.data, instant.inode))
    assert again.read(0, 16 * 4096) == b"\x33" * 4096 + content[4096:]
    again.close()


def garbage(path: Path, data: bytes) -> None:
    path.write_bytes(random.Random(1).randbytes(SIZE))


def garbage_behind_the_first_part(path: Path, data: bytes) -> None:
    path.write_bytes(data[:4088] + random.Random(1).randbytes(SIZE - 4088))


def empty(path: Path, data: bytes) -> None:
    path.write_bytes(b"")


def cut(path: Path, data: bytes) -> None:
    path.write_bytes(data[:-1])


def huge(path: Path, data: bytes) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 40)


def readable_by_others(path: Path, data: bytes) -> None:
    path.chmod(0o644)


def link(path: Path, data: bytes) -> None:
    target = path.with_name("target")
    path.rename(target)
    path.symlink_to(target)


def directory(path: Path, data: bytes) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path, data: bytes) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def other_owner(path: Path, data: bytes) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    os.chown(path, 65534, 65534)


def directory_open_to_others(path: Path, data: bytes) -> None:
    path.parent.chmod(0o777)


def directory_of_another(path: Path, data: bytes) -> None:
    if os.geteuid():
        pytest.skip("only root can give a directory away")
    os.chown(path.parent, 65534, 65534)


def linked_directory(path: Path, data: bytes) -> None:
    real = path.parent.with_name("real")
    path.parent.rename(real)
    path.parent.symlink_to(real)


def another_version(path: Path, data: bytes) -> None:
    path.write_bytes(data[:4] + struct.pack("=I", 2) + data[8:])


def another_image(path: Path, data: bytes) -> None:
    path.write_bytes(data[:48] + struct.pack("=Q", 999) + data[56:])


def another_mount(path: Path, data: bytes) -> None:
    path.write_bytes(data[:56] + struct.pack("=Q", 999) + data[64:])


def more_entries_than_there_are(path: Path, data: bytes) -> None:
    state = struct.unpack("=Q", data[4088:4096])[0]
    path.write_bytes(data[:4088] + struct.pack("=Q", state + 1) + data[4096:])


def more_entries_than_fit(path: Path, data: bytes) -> None:
    path.write_bytes(data[:4088] + struct.pack("=Q", 1 << 32 | 0xFFFFFFFF) + data[4096:])


def one_bit(path: Path, data: bytes) -> None:
    changed = bytearray(data)
    changed[4096 + 64 * 3 + 42] ^= 4
    path.write_bytes(changed)


def two_entries_exchanged(path: Path, data: bytes) -> None:
    a, b = 4096 + 64 * 2, 4096 + 64 * 3
    path.write_bytes(data[:a] + data[b : b + 64] + data[a : a + 64] + data[b + 64 :])


def an_older_epoch(path: Path, data: bytes) -> None:
    path.write_bytes(data[:4088] + struct.pack("=Q", 7 << 32 | 3) + data[4096:])


WRONG: list[Callable[[Path, bytes], None]] = [
    garbage,
    garbage_behind_the_first_part,
    empty,
    cut,
    huge,
    readable_by_others,
    link,
    directory,
    pipe,
    other_owner,
    directory_open_to_others,
    directory_of_another,
    linked_directory,
    another_version,
    another_image,
    another_mount,
    more_entries_than_there_are,
    more_entries_than_fit,
    one_bit,
    two_entries_exchanged,
    an_older_epoch,
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda each: each.__name__)
def test_a_record_that_is_not_as_we_left_it_counts_as_none(
    wrong: Callable[[Path, bytes], None], left: Instant, shelf: Shelf
) -> None:
    shelf.write(left.inode, left.record)
    path = shelf.record_of(left.inode)
    wrong(path, path.read_bytes())
    examine(left, Outcome.LOST)


def test_the_record_as_we_left_it_is_replayed(left: Instant, shelf: Shelf) -> None:
    shelf.write(left.inode, left.record)
    examine(left, Outcome.REPLAYED)


def test_a_child_that_outlives_its_killed_parent_holds_no_record(shelf: Shelf, tmp_path: Path) -> None:
    """As the copy of a guest's memory does, which closes its descriptors and keeps its address space."""
    watched = Watched(shared_image(), shelf)
    watched.node.write(0, NEW)
    record = watched.node.image.mapping.record
    assert record is not None
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.closerange(3, reader)
        os.closerange(reader + 1, 4096)
        os.read(reader, 1)
        os._exit(0)
    try:
        record.close(is_whole=False)
        instant = Instant(bytes(watched.file.data), watched.file.inode, None)
        again = Qcow2Node("node", IdentifiedNode(instant.image, instant.inode))
        assert again.image.recovery is not None
        assert again.image.recovery.outcome is Outcome.REPLAYED
        again.close()
    finally:
        os.close(writer)
        os.waitpid(child, 0)


def test_a_torn_last_entry_was_not_acknowledged(left: Instant, shelf: Shelf) -> None:
    assert left.record is not None
    shelf.write(left.inode, left.record + random.Random(1).randbytes(40))
    examine(left, Outcome.REPLAYED)


def test_a_record_that_somebody_alive_holds_is_not_taken(left: Instant, shelf: Shelf) -> None:
    import fcntl

    shelf.write(left.inode, left.record)
    with shelf.record_of(left.inode).open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        examine(left, Outcome.LOST)


def forged(record: bytes, entries: list[tuple[int, int, int, int, int]]) -> bytes:
    """A record with these entries, checksums right: kind, index, table, before, after."""
    state = struct.unpack_from("=Q", record, 4088)[0]
    seed = zlib.crc32(record[:64])
    made = bytearray(record[: 4096 + 64])
    for number, (kind, index, table, before, after) in enumerate(entries, 1):
        data = struct.pack("=IIIIQ16s16s", state >> 32, number, kind, index, table, *words(before, after))
        made += data + struct.pack("=II", zlib.crc32(data, seed), 0)
    struct.pack_into("=Q", made, 4088, state >> 32 << 32 | (len(entries) + 1))
    return bytes(made)


def words(*numbers: int) -> list[bytes]:
    return [each.to_bytes(8, "big").ljust(16, b"\0") for each in numbers]


HOSTS = st.integers(0, 80).map(lambda cluster: cluster * 4096)
ENTRIES = st.builds(
    lambda host, flags, extra: host | flags | extra,
    HOSTS,
    st.sampled_from([0, 1, 1 << 63, 1 << 63 | 1]),
    st.sampled_from([0, 0, 0, 512, 1 << 61, 1 << 55]),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_entries_that_were_made_up_never_corrupt_the_image(
    data: st.DataObject, left: Instant, shelf: Shelf
) -> None:
    """With checksums that are right, the entries before as they are in the file, and everything else at random.

    But for what refcounts cannot tell, compressed entries and clusters that another tree alone uses: who can make up checksums
    in a file of ours can write the image, too.
    """
    assert left.record is not None
    file = MemoryNode(left.image)
    image = Qcow2Node("node", file, read_only=True).image
    tables = [int.from_bytes(image.world.l1[:8], "big") & 0x00FFFFFFFFFFFE00]
    references = Walk(image).references
    used_once = {
        index * image.header.refcounts_in_block + int(n)
        for index in references
        for n in (references[index] == 1).nonzero()[0]
    }
    entries = []
    for _ in range(data.draw(st.integers(1, 6))):
        table = data.draw(st.one_of(st.sampled_from(tables), HOSTS, st.integers(0, (1 << 64) - 1)))
        index = data.draw(st.one_of(st.integers(0, 15), st.integers(0, (1 << 32) - 1)))
        at = table + index * 8
        there = int.from_bytes(file.data[at : at + 8], "big") if at + 8 <= file.size else 0
        before = data.draw(st.one_of(st.just(there), ENTRIES))
        after = data.draw(ENTRIES)
        assume(not (after >> 63 and (after & 0x00FFFFFFFFFFFE00) >> 12 in used_once))
        entries.append((data.draw(st.sampled_from([1, 1, 1, 1, 2, 3, 9])), index, table, before, after))
    # The world that the record begins with is the image's own.
    with reopened(Instant(left.image, left.inode, forged(left.record, entries)), shelf) as node:
        assert node.image.recovery is not None
        assert isinstance(node._file, IdentifiedNode)
        assert check(node._file).corruptions == 0


def test_records_of_images_that_are_gone_are_removed_after_a_day(shelf: Shelf, tmp_path: Path) -> None:
    class Here(IdentifiedNode):
        """A file that is, or was, at a path."""

        def __init__(self, path: Path) -> None:
            super().__init__(shared_image())
            self.path = path
            about = path.stat()
            self._identity = FileIdentity(about.st_dev, about.st_ino, 2)

        @property
        def identity(self) -> FileIdentity:
            return self._identity

        def info(self):  # type: ignore[no-untyped-def]
            from dataclasses import replace

            return replace(super().info(), filename=str(self.path))

    def left_behind(name: str) -> Path:
        path = tmp_path / name
        path.touch()
        node = Qcow2Node("node", Here(path))
        node.write(0, NEW)
        assert node.image.mapping.record is not None
        node.image.mapping.record.close(is_whole=False)
        (about,) = shelf.path.glob(f"*/{path.stat().st_dev:x}-{path.stat().st_ino:x}.unflushed")
        return about

    old, young, present, busy = (left_behind(name) for name in ("old", "young", "present", "busy"))
    yesterday = old.stat().st_mtime - unflushed.STALE_SECONDS - 10
    for record in (old, present, busy):
        os.utime(record, (yesterday, yesterday))
    for name in ("old", "young", "busy"):
        (tmp_path / name).unlink()
    import fcntl

    with busy.open("r+b") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        Qcow2Node("node", IdentifiedNode(shared_image())).write(0, NEW)
    assert [each.exists() for each in (old, young, present, busy)] == [False, True, True, True]


def test_the_number_of_a_machine_of_another_byte_order_is_no_record_of_ours(
    left: Instant, shelf: Shelf
) -> None:
    assert left.record is not None
    swapped = b"SFUF" + left.record[7:3:-1] + left.record[8:]
    assert int.from_bytes(swapped[4:8], sys.byteorder) != 1
    shelf.write(left.inode, swapped)
    examine(left, Outcome.LOST)
