"""What is done to an image while the machine dies or its storage fails. Each is done by a `Witness`, who says at each step what
may be found."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qcow2.images import named
from qcow2.scenes import (
    STATE,
    Options,
    Scene,
    compressed,
    dirty,
    foreign,
    leaky,
    plain,
    resized,
    worn,
)
from qcow2.worlds import Witness, with_disk, with_snapshot, without_snapshot
from stillframe.block.node import Change, SnapshotRecord
from stillframe.block.qcow2.repair import repair
from stillframe.errors import Failed
from stillframe.snapshots.group import Step, all_or_none


class ChangedMyMind(Exception):
    """Somebody is not content with a change that is in force."""


class NotBroughtBack(Failed):
    """And then it could not be undone."""


def commit(prepare: Callable[[], Change]) -> None:
    """As every operation on snapshots is done: by a group, here of one image."""
    with all_or_none([Step("image", prepare, "Not done")]):
        pass


# A guest.


def allocate(witness: Witness) -> None:
    """Where nothing was, in pieces and at once, over the bounds of clusters and L2 tables."""
    cluster = witness.cluster
    witness.write(14 * cluster - 100, b"\x81" * 300)
    witness.write(20 * cluster + 3, b"\x82" * (2 * cluster))
    witness.flush()
    witness.write(20 * cluster - 512, b"\x83" * 512)
    witness.write(witness.node.size - 2 * cluster, b"\x84" * (2 * cluster))
    witness.write(20 * cluster + 10, b"\x85" * 5)
    witness.flush()
    witness.write(15 * cluster, b"\x86" * 1500)


def overwrite(witness: Witness) -> None:
    """Clusters shared with snapshots, and then the copies."""
    cluster = witness.cluster
    witness.write(512, b"\x71" * 1024)
    witness.write(3 * cluster - 700, b"\x72" * 2000)
    witness.write(5 * cluster + 512, b"\x73" * 512)
    witness.flush()
    witness.write(600, b"\x74" * 300)
    witness.write(19 * cluster + 100, b"\x75" * 20)
    witness.write(11 * cluster, b"\x76" * cluster)
    witness.flush()
    witness.write(600, b"\x77" * 300)


def zero_and_discard(witness: Witness) -> None:
    """With the place kept and not, and written again."""
    cluster = witness.cluster
    witness.discard(10 * cluster, 2 * cluster)
    witness.write_zeroes(5 * cluster, cluster)
    witness.write_zeroes(4 * cluster, cluster, unmap=False)
    witness.flush()
    witness.write(10 * cluster, b"\x99" * cluster)
    witness.write(4 * cluster + 100, b"\x9a" * 100)
    witness.write(8 * cluster + 5, b"\xaa" * 5)
    witness.write_zeroes(cluster - 20, cluster)
    witness.flush()
    witness.discard(4 * cluster, 7 * cluster)
    witness.write(5 * cluster, b"\x9b" * 700)


def unpack(witness: Witness) -> None:
    """Compressed clusters written over, in part and as a whole, and discarded."""
    cluster = witness.cluster
    witness.write(14 * cluster + 7, b"\xb1" * 100)
    witness.write(15 * cluster, b"\xb2" * cluster)
    witness.write(2 * cluster - 30, b"\xb3" * 60)
    witness.flush()
    witness.discard(16 * cluster, cluster)
    witness.write(14 * cluster, b"\xb4" * 512)
    witness.flush()
    witness.write(16 * cluster, b"\xb5" * 600)


def close(witness: Witness) -> None:
    """Written to, closed, and written to once more."""
    cluster = witness.cluster
    witness.write(6 * cluster - 100, b"\xc1" * 200)
    witness.discard(cluster, 2 * cluster)
    witness.flush()
    witness.node.close()
    witness.open_again()
    witness.write(6 * cluster, b"\xc2" * 200)
    witness.flush()


# The disk's size.


def grow(witness: Witness) -> None:
    """Past the L2 table, and the last cluster's tail is written to before and after."""
    size = witness.node.size
    witness.write(size - 700, b"\xd1" * 700)
    witness.flush()
    larger = size + witness.cluster * witness.node.image.header.l2_entries
    # Of the larger clusters that is much: some more suffices, the next table is covered by the smaller ones.
    larger = larger if witness.cluster < 4096 else size + 5 * witness.cluster
    with witness.becoming(with_disk(witness.present().ljust(larger, b"\0"))):
        witness.node.truncate(larger)
    witness.write(size - 100, b"\xd2" * 1000)
    witness.flush()


def shrink(witness: Witness) -> None:
    """Data behind the new end goes, and it does not come back."""
    size = witness.node.size
    smaller = 9 * witness.cluster + 512
    with witness.becoming(with_disk(witness.present()[:smaller])):
        witness.node.truncate(smaller)
    witness.write(smaller - 600, b"\xd3" * 600)
    witness.flush()
    with witness.becoming(with_disk(witness.present().ljust(size, b"\0"))):
        witness.node.truncate(size)


# Snapshots.


def create(witness: Witness) -> None:
    """A snapshot "third", with state, and a guest that writes between freeze and commit."""
    cluster = witness.cluster
    witness.write(2 * cluster, b"\x51" * 600)
    frozen = witness.present()
    pending = witness.node.snapshot_store.freeze()
    try:
        pending.write_state(0, STATE)
        witness.write(cluster + 1, b"\x55" * cluster)
        witness.discard(6 * cluster, cluster)
        witness.flush()
        witness.write(2 * cluster, b"\x56" * 700)
        pending.write_state(len(STATE), b"tail")
        with witness.becoming(with_snapshot("third", (frozen, STATE + b"tail"))):
            commit(lambda: pending.prepare(SnapshotRecord("third", 1, 2)))
    except BaseException:
        pending.abandon()
        raise
    witness.write(cluster + 2, b"\x57" * 100)
    witness.flush()


def create_plain(witness: Witness) -> None:
    """Of the disk alone, and another behind it."""
    for name in ("third", "fourth"):
        witness.write(3 * witness.cluster, name.encode())
        _create(witness, name)


def _create(witness: Witness, name: str) -> None:
    pending = witness.node.snapshot_store.freeze()
    try:
        with witness.becoming(with_snapshot(name, (witness.present(), b""))):
            commit(lambda: pending.prepare(SnapshotRecord(name, 1, 2)))
    except BaseException:
        pending.abandon()
        raise


def abandon(witness: Witness) -> None:
    """Frozen, state written, written to, and given up."""
    cluster = witness.cluster
    pending = witness.node.snapshot_store.freeze()
    try:
        pending.write_state(0, STATE)
        witness.write(cluster + 1, b"\x55" * cluster)
        witness.flush()
        witness.write(4 * cluster, b"\x56" * 700)
    finally:
        pending.abandon()
    witness.flush()
    witness.write(cluster + 2, b"\x57" * 100)


def revert(witness: Witness) -> None:
    """Back to "first", and on from there."""
    witness.write(600, b"\x61" * 300)
    _revert(witness, "first")
    witness.write(600, b"\x62" * 300)
    witness.flush()


def revert_to_another_size(witness: Witness) -> None:
    """To "second" of a larger disk, and back to "first"."""
    _revert(witness, "second")
    _revert(witness, "first")


def _revert(witness: Witness, name: str) -> None:
    with witness.becoming(with_disk(witness.snapshot_of(name)[0])):
        commit(lambda: witness.node.snapshot_store.prepare_revert(named(witness.node, name)))


def delete(witness: Witness) -> None:
    """ "second" goes, and clusters that were shared with it are the guest's own."""
    _delete(witness, "second")
    witness.write(4 * witness.cluster, b"\x63" * 300)
    witness.flush()


def delete_all(witness: Witness) -> None:
    """The older first; no table of snapshots is left."""
    _delete(witness, "first")
    _delete(witness, "second")


def _delete(witness: Witness, name: str) -> None:
    with witness.becoming(without_snapshot(name)):
        commit(lambda: witness.node.snapshot_store.prepare_delete(named(witness.node, name)))


def roll_back(witness: Witness) -> None:
    """Back to "first", and undone."""

    def prepare() -> Change:
        return witness.node.snapshot_store.prepare_revert(named(witness.node, "first"))

    with witness.perhaps(with_disk(witness.snapshot_of("first")[0])):
        try:
            with all_or_none([Step("image", prepare, "Not done")]):
                raise ChangedMyMind
        except ChangedMyMind as error:
            if hasattr(error, "__notes__"):
                raise NotBroughtBack(str(error.__notes__)) from error
    witness.write(600, b"\x64" * 300)
    witness.flush()


# What is done to an image by others, or at the open.


def repair_leaks(witness: Witness) -> None:
    """As `check --repair leaks`."""
    repair(witness.files[0], "leaks")


def first_write(witness: Witness) -> None:
    """Opened for writing and written to: what stands in the way of that is done at the open."""
    witness.write(600, b"\x65" * 300)
    witness.flush()


@dataclass(frozen=True)
class Operation:
    """What is done, and to what."""

    scene: Callable[[Options], Scene]
    work: Callable[[Witness], None]


OPERATIONS: Mapping[str, Operation] = {
    "allocate": Operation(worn, allocate),
    "overwrite": Operation(worn, overwrite),
    "zero and discard": Operation(worn, zero_and_discard),
    "overwrite compressed": Operation(compressed, unpack),
    "close": Operation(worn, close),
    "grow": Operation(plain, grow),
    "shrink": Operation(plain, shrink),
    "grow with snapshots": Operation(worn, grow),
    "shrink with snapshots": Operation(worn, shrink),
    "create": Operation(worn, create),
    "create of compressed": Operation(compressed, create),
    "create twice": Operation(worn, create_plain),
    "abandon": Operation(worn, abandon),
    "revert": Operation(worn, revert),
    "revert to compressed": Operation(compressed, revert),
    "revert to another size": Operation(resized, revert_to_another_size),
    "delete": Operation(worn, delete),
    "delete all": Operation(worn, delete_all),
    "roll back": Operation(worn, roll_back),
    "repair leaks": Operation(leaky, repair_leaks),
    "open a dirty image": Operation(dirty, first_write),
    "open with foreign bits": Operation(foreign, first_write),
    "allocate in a plain image": Operation(plain, allocate),
    "discard in a plain image": Operation(plain, zero_and_discard),
}

_NOT_OF_VERSION_2 = frozenset(
    {
        "grow with snapshots",
        "shrink with snapshots",
        "revert to another size",
        "open a dirty image",
        "open with foreign bits",
    }
)
_WITHOUT_SNAPSHOTS = ("allocate in a plain image", "discard in a plain image", "grow", "shrink")

_WITH_EXTENDED_L2 = (
    "allocate",
    "overwrite",
    "zero and discard",
    "overwrite compressed",
    "grow with snapshots",
    "shrink with snapshots",
    "create",
    "revert",
    "delete",
    "repair leaks",
)

_DATA_FILES = ((512, "own"), (4096, "raw"), (65536, "own"))


def _cases() -> list[tuple[str, Options]]:
    cases = [(name, Options(cluster_size)) for name in OPERATIONS for cluster_size in (512, 65536)]
    cases += [(name, Options(4096, 64)) for name in OPERATIONS]
    # A table of 512 bytes with refcounts of 64 bits is full at 2 MiB: it grows with the first lease of that size.
    cases += [
        (name, Options(512, 64, lease=2 << 20))
        for name in ("allocate", "overwrite", "create", "revert", "delete")
    ]
    cases += [(name, Options(4096, 16, "0.10")) for name in OPERATIONS if name not in _NOT_OF_VERSION_2]
    cases += [(name, Options(512, 1)) for name in _WITHOUT_SNAPSHOTS]
    cases += [(name, Options(16384, extended_l2=True)) for name in _WITH_EXTENDED_L2]
    cases += [
        (name, Options(size, data_file=kind)) for name in _WITHOUT_SNAPSHOTS for size, kind in _DATA_FILES
    ]
    return cases


CASES = _cases()
"""Every operation with every kind of image that is worth it."""
