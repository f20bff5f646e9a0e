"""Any sequence of operations leaves the bytes that a plain model holds, and an image that qemu-img calls clean."""

import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peers import installed_versions, using
from qcow2.images import LONG, as_raw, assert_clean, make, named, opened, qemu_img
from stillframe.block.node import SnapshotRecord
from stillframe.errors import LimitReached, Unsupported

KINDS: list[dict[str, Any]] = [
    {"cluster_size": 512, "refcount_bits": 16},
    {"cluster_size": 512, "refcount_bits": 64},
    {"cluster_size": 1024, "refcount_bits": 2},
    {"cluster_size": 4096, "refcount_bits": 1},
    {"cluster_size": 4096, "refcount_bits": 4},
    {"cluster_size": 65536, "refcount_bits": 16},
    {"cluster_size": 65536, "refcount_bits": 8},
    {"cluster_size": 65536, "refcount_bits": 32},
    {"cluster_size": 512, "compat": "0.10"},
    {"cluster_size": 65536, "compat": "0.10"},
    {"cluster_size": 2 << 20, "refcount_bits": 16},
]


class Sequences(RuleBasedStateMachine):
    """One image and its model: the disk's bytes, and for each snapshot its disk's and its state's."""

    def __init__(self) -> None:
        super().__init__()
        self.peers = ExitStack()
        self.directory = tempfile.TemporaryDirectory(prefix="stillframe-")
        self.path = Path(self.directory.name) / "image.qcow2"
        self.disk = bytearray()
        self.taken: dict[str, tuple[bytes, bytes]] = {}
        self.number = 0
        self.pending: Any = None
        self.frozen = b""
        self.state = b""

    @initialize(
        kind=st.sampled_from(KINDS),
        clusters=st.integers(1, 300),
        odd=st.integers(0, 3),
        qemu=st.sampled_from(installed_versions()),
    )
    def create(self, kind: dict[str, Any], clusters: int, odd: int, qemu: str) -> None:
        self.peers.enter_context(using(qemu))
        cluster = kind["cluster_size"]
        size = min(clusters * cluster, 6 << 20) + odd * 512
        self.cluster = cluster
        self.is_v2 = kind.get("compat") == "0.10"
        make(self.path, size, **kind)
        self.disk = bytearray(size)
        self._open()

    def _open(self) -> None:
        self.context = opened(self.path)
        self.node = self.context.__enter__()

    def _close(self) -> None:
        if self.pending is not None:
            self.abandon_pending()
        self.context.__exit__(None, None, None)

    def _range(self, data: st.DataObject) -> tuple[int, int]:
        """A range in units that make whole, partial and crossing clusters all likely."""
        size = len(self.disk)
        unit = data.draw(st.sampled_from([1, 512, self.cluster]))
        start = min(data.draw(st.integers(0, size // unit)) * unit, size - 1)
        length = data.draw(st.integers(1, 5 * self.cluster // unit + 1)) * unit
        return start, min(length, size - start)

    @rule(data=st.data(), seed=st.integers(1, 255))
    def write(self, data: st.DataObject, seed: int) -> None:
        start, length = self._range(data)
        content = (
            bytes((seed + i // 512) % 255 + 1 for i in range(length))
            if length < 4096
            else (bytes(range(seed, 256)) * (length // (256 - seed) + 1))[:length]
        )
        self.node.write(start, content)
        self.disk[start : start + length] = content

    @rule(data=st.data(), unmap=st.booleans())
    def zero(self, data: st.DataObject, unmap: bool) -> None:
        start, length = self._range(data)
        self.node.write_zeroes(start, length, unmap=unmap)
        self.disk[start : start + length] = bytes(length)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        start, length = self._range(data)
        before = self.disk[start : start + length]
        self.node.discard(start, length)
        # Not defined by the contract: each byte is the old one or a zero.
        after = self.node.read(start, length)
        assert all(new in (old, 0) for old, new in zip(before, after, strict=True))
        self.disk[start : start + length] = after

    @rule()
    def flush(self) -> None:
        self.node.flush()

    @precondition(lambda self: self.pending is None and len(self.taken) < 5)
    @rule()
    def freeze(self) -> None:
        self.pending = self.node.snapshot_store.freeze()
        self.frozen = bytes(self.disk)
        self.state = b""

    @precondition(lambda self: self.pending is not None)
    @rule(length=st.integers(1, 200_000), gap=st.sampled_from([0, 0, 0, 5, 70_000]))
    def write_state(self, length: int, gap: int) -> None:
        content = bytes([self.number % 255 + 1]) * length
        self.pending.write_state(len(self.state) + gap, content)
        self.state += bytes(gap) + content

    @precondition(lambda self: self.pending is not None)
    @rule(how=st.sampled_from(["finish", "finish", "finish", "abandon", "roll back"]))
    def snapshot(self, how: str) -> None:
        name = f"snapshot {self.number}"
        self.number += 1
        try:
            change = self.pending.prepare(SnapshotRecord(name, 1, 2, vm_clock_ns=3))
        except LimitReached:
            self.abandon_pending()
            return
        if how == "abandon":
            change.abandon()
        else:
            change.commit()
            if how == "finish":
                change.finish()
                self.taken[name] = (self.frozen, self.state)
            else:
                change.roll_back()
        self.pending = None

    @precondition(lambda self: self.pending is not None)
    @rule()
    def abandon_pending(self) -> None:
        self.pending.abandon()
        self.pending = None

    @precondition(lambda self: self.pending is None and self.taken)
    @rule(data=st.data(), how=st.sampled_from(["finish", "finish", "abandon", "roll back"]))
    def apply(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.taken)))
        change = self.node.snapshot_store.prepare_revert(named(self.node, name))
        if how == "abandon":
            change.abandon()
            return
        change.commit()
        assert self.node.read(0, self.node.size) == self.taken[name][0]
        if how == "finish":
            change.finish()
            self.disk = bytearray(self.taken[name][0])
        else:
            change.roll_back()

    @precondition(lambda self: self.pending is None and self.taken)
    @rule(data=st.data(), how=st.sampled_from(["finish", "finish", "abandon", "roll back"]))
    def delete(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.taken)))
        change = self.node.snapshot_store.prepare_delete(named(self.node, name))
        if how == "abandon":
            change.abandon()
            return
        change.commit()
        if how == "finish":
            change.finish()
            del self.taken[name]
        else:
            change.roll_back()

    @precondition(lambda self: self.pending is None)
    @rule(clusters=st.integers(0, 400), odd=st.integers(0, 2))
    def resize(self, clusters: int, odd: int) -> None:
        size = max(512, min(clusters * self.cluster, 6 << 20) + odd * 512)
        try:
            self.node.truncate(size)
        except Unsupported:
            assert (self.is_v2, bool(self.taken)) == (True, True)
            return
        self.disk = self.disk[:size].ljust(size, b"\0")

    @rule()
    def reopen(self) -> None:
        self._close()
        assert_clean(self.path)
        self._open()

    @precondition(lambda self: self.pending is None)
    @rule(data=st.data())
    def peer_snapshots(self, data: st.DataObject) -> None:
        """qemu-img takes, applies or deletes a snapshot in between."""
        self._close()
        what = data.draw(st.sampled_from("cad" if self.taken else "c"))
        if what == "c" and len(self.taken) < 5:
            name = f"qemu {self.number}"
            self.number += 1
            try:
                qemu_img("snapshot", "-c", name, self.path)
            except AssertionError:
                assert self.cluster in (1024, 4096), "only narrow refcounts may refuse"
                qemu_img("check", "-r", "leaks", self.path)
            else:
                self.taken[name] = (bytes(self.disk), b"")
        elif what != "c":
            name = data.draw(st.sampled_from(sorted(self.taken)))
            try:
                qemu_img("snapshot", f"-{what}", name, self.path)
            except AssertionError:
                assert self.cluster in (1024, 4096), "only narrow refcounts may refuse"
                qemu_img("check", "-r", "all", self.path)
            else:
                if what == "a":
                    self.disk = bytearray(self.taken[name][0])
                else:
                    del self.taken[name]
        assert_clean(self.path)
        self._open()

    @invariant()
    def disk_reads_as_written(self) -> None:
        if hasattr(self, "node"):
            assert self.node.size == len(self.disk)
            assert self.node.read(0, len(self.disk)) == self.disk

    @invariant()
    def states_read_as_written(self) -> None:
        if hasattr(self, "node"):
            found = {each.name: each for each in self.node.snapshot_store.snapshots()}
            assert found.keys() == self.taken.keys()
            for name, (disk, state) in self.taken.items():
                assert found[name].disk_size == len(disk)
                assert found[name].state_size == len(state)
                assert self.node.snapshot_store.read_state(found[name], 0, 1 << 30) == state

    def teardown(self) -> None:
        try:
            if hasattr(self, "node"):
                self._close()
                assert_clean(self.path)
                assert as_raw(self.path) == self.disk
                for name, (disk, _) in self.taken.items():
                    if len(disk) == len(self.disk):
                        assert as_raw(self.path, "-l", f"snapshot.name={name}") == disk
        finally:
            self.peers.close()
            self.directory.cleanup()


Sequences.TestCase.settings = settings(
    max_examples=400 if LONG else 25,
    stateful_step_count=40 if LONG else 25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestSequences = pytest.mark.timeout(3600 if LONG else 180)(Sequences.TestCase)
