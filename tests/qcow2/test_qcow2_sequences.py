"""Any sequence of operations leaves the bytes that a plain model holds, and an image that qemu-img agrees with.

Short runs are looked at after every step, long ones at their end. `make hunt` runs many, with a seed that it prints.
"""

import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from peers import installed_versions, peer, using
from qcow2.images import LONG, as_raw, assert_clean, assert_only_leaks, named, qemu_img, qemu_io
from qcow2.recipes import LARGEST_DISK, Recipe, patchy, recipes
from stillframe.block.graph import BlockGraph
from stillframe.block.node import SnapshotRecord
from stillframe.errors import LimitReached, Unsupported

HOW_A_CHANGE_ENDS = st.sampled_from(["finish", "finish", "finish", "abandon", "roll back"])


class Sequences(RuleBasedStateMachine):
    """One image and its model: the disk's bytes, and for each snapshot its disk's and its state's."""

    watches = st.sampled_from(["at the end", "while open", "closed"])

    def __init__(self) -> None:
        super().__init__()
        self.peers = ExitStack()
        self.directory = tempfile.TemporaryDirectory(prefix="stillframe-")
        self.taken: dict[str, tuple[bytes, bytes]] = {}
        self.number = 0
        self.graph: BlockGraph | None = None
        self.pending: Any = None
        self.frozen = b""
        self.state = b""

    @initialize(recipe=recipes(), qemu=st.sampled_from(installed_versions()), data=st.data())
    def create(self, recipe: Recipe, qemu: str, data: st.DataObject) -> None:
        self.peers.enter_context(using(qemu))
        self.recipe = recipe
        self.cluster = recipe.cluster_size
        self.watch = data.draw(self.watches)
        self.path, content = recipe.make(Path(self.directory.name))
        self.disk = bytearray(content)
        self._open()

    def _open(self) -> None:
        self.graph = BlockGraph()
        file = {"driver": "file", "filename": str(self.path)}
        self.node = self.graph.blockdev_add({"driver": "qcow2", "node-name": "node", "file": file})

    def _close(self) -> None:
        if self.pending is not None:
            self.abandon_pending()
        if self.graph is not None:
            graph, self.graph = self.graph, None
            graph.close()

    def _range(self, data: st.DataObject) -> tuple[int, int]:
        """A range in units that make whole, partial and crossing clusters all likely."""
        size = len(self.disk)
        unit = data.draw(st.sampled_from([1, 512, self.cluster]))
        start = min(data.draw(st.integers(0, size // unit)) * unit, size - 1)
        length = data.draw(st.integers(1, min(5 * self.cluster, 1 << 20) // unit + 1)) * unit
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

    @precondition(lambda self: not self.recipe.data_file)
    @rule(data=st.data(), seed=st.integers(0, 1000))
    def pack(self, data: st.DataObject, seed: int) -> None:
        start, length = self._range(data)
        start, end = start // self.cluster * self.cluster, -(-(start + length) // self.cluster) * self.cluster
        end = min(end, len(self.disk))
        content = patchy(seed, end - start, bytes(end - start))
        self.node.write_compressed(start, content)
        self.disk[start:end] = content

    @rule(data=st.data(), unmap=st.booleans())
    def zero(self, data: st.DataObject, unmap: bool) -> None:
        start, length = self._range(data)
        self.node.write_zeroes(start, length, unmap=unmap)
        self.disk[start : start + length] = bytes(length)

    @rule(data=st.data())
    def discard(self, data: st.DataObject) -> None:
        start, length = self._range(data)
        self.node.discard(start, length)
        self._take_over(start, self.node.read(start, length), 0)

    def _take_over(self, start: int, after: bytes, value: int) -> None:
        """Where the contract leaves it open: each byte is the old one or this value."""
        new = np.frombuffer(after, np.uint8)
        old = np.frombuffer(bytes(self.disk[start : start + len(after)]), np.uint8)
        assert bool(((new == old) | (new == value)).all())
        self.disk[start : start + len(after)] = after

    @rule()
    def flush(self) -> None:
        self.node.flush()

    # Snapshots.

    @precondition(lambda self: self.pending is None and len(self.taken) < 5 and not self.recipe.data_file)
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
    @rule(how=HOW_A_CHANGE_ENDS)
    def snapshot(self, how: str) -> None:
        name = f"snapshot {self.number}"
        self.number += 1
        try:
            change = self.pending.prepare(SnapshotRecord(name, 1, 2, vm_clock_ns=3))
        except LimitReached:
            assert self.recipe.is_narrow
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
    @rule(data=st.data(), how=HOW_A_CHANGE_ENDS)
    def apply(self, data: st.DataObject, how: str) -> None:
        name = data.draw(st.sampled_from(sorted(self.taken)))
        try:
            change = self.node.snapshot_store.prepare_revert(named(self.node, name))
        except LimitReached:
            assert self.recipe.is_narrow
            return
        except Unsupported:
            assert self.recipe.bitmap
            return
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
    @rule(data=st.data(), how=HOW_A_CHANGE_ENDS)
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
        size = max(512, min(clusters * self.cluster, LARGEST_DISK) + odd * 512)
        try:
            self.node.truncate(size)
        except Unsupported:
            assert self.recipe.bitmap or (self.recipe.is_v2 and self.taken)
            return
        self.disk = self.disk[:size].ljust(size, b"\0")

    @rule()
    def reopen(self) -> None:
        self._close()
        assert_clean(self.path)
        self._open()

    # The second implementation takes its turn.

    @precondition(lambda self: self.pending is None and not self.recipe.data_file)
    @rule(data=st.data())
    def peer_snapshots(self, data: st.DataObject) -> None:
        self._close()
        what = data.draw(st.sampled_from("cad" if self.taken else "c"))
        if what == "c" and len(self.taken) < 5:
            name = f"qemu {self.number}"
            self.number += 1
            if self._peer_can("-c", name):
                self.taken[name] = (bytes(self.disk), b"")
        elif what != "c":
            name = data.draw(st.sampled_from(sorted(self.taken)))
            if self._peer_can(f"-{what}", name):
                if what == "a":
                    self.disk = bytearray(self.taken[name][0])
                else:
                    del self.taken[name]
        assert_clean(self.path)
        self._open()

    def _peer_can(self, what: str, name: str) -> bool:
        """On its way qemu-img counts one reference more than it needs in the end, and cleans up by hand alone."""
        try:
            qemu_img("snapshot", what, name, self.path)
        except AssertionError:
            if self.recipe.bitmap and what == "-a":
                return False
            if not self.recipe.is_narrow:
                raise
            self.recipe.tidy(self.path)
            return False
        return True

    @precondition(lambda self: self.pending is None)
    @rule(
        data=st.data(), value=st.integers(1, 255), kind=st.sampled_from(["", "-z", "-z -u", "-c", "discard"])
    )
    def peer_writes(self, data: st.DataObject, value: int, kind: str) -> None:
        start, length = self._range(data)
        start, end = start // 512 * 512, -(-(start + length) // 512) * 512
        if kind == "-c":
            start = start // self.cluster * self.cluster
            end = min(-(-end // self.cluster) * self.cluster, len(self.disk))
        elif kind == "discard" and self.recipe.is_v2:
            kind = ""
        length = end - start
        self._close()
        if kind == "discard":
            qemu_io(self.path, f"discard {start} {length}")
            self._take_over(start, as_raw(self.path)[start:end], 0)
        elif kind == "-c":
            try:
                qemu_io(self.path, f"write -c -P {value} {start} {length}")
            except AssertionError as error:
                # It does not pack what has a place of its own already.
                if "Input/output error" not in str(error) and not self.recipe.data_file:
                    raise
            self._take_over(start, as_raw(self.path)[start:end], value)
        elif not kind:
            qemu_io(self.path, f"write -P {value} {start} {length}")
            self.disk[start:end] = bytes([value]) * length
        else:
            qemu_io(self.path, f"write {kind} {start} {length}")
            self.disk[start:end] = bytes(length)
        assert_clean(self.path)
        self._open()

    @precondition(lambda self: self.pending is None and self.recipe.lazy_refcounts)
    @rule(data=st.data(), value=st.integers(1, 255))
    def peer_dies(self, data: st.DataObject, value: int) -> None:
        """Its refcounts are late then, and the image is marked dirty."""
        start, length = self._range(data)
        self._close()
        commands = [f"write -P {value} {start} {length}", "flush", "abort"]
        words = [word for command in commands for word in ("-c", command)]
        died = subprocess.run([peer("qemu-io"), "-f", "qcow2", *words, str(self.path)], capture_output=True)
        assert died.returncode < 0
        self.disk[start : start + length] = bytes([value]) * length
        self._open()

    # What must hold.

    @invariant()
    def disk_reads_as_written(self) -> None:
        if self.graph is not None:
            assert self.node.size == len(self.disk)
            assert self.node.read(0, len(self.disk)) == self.disk

    @invariant()
    def states_read_as_written(self) -> None:
        if self.graph is not None and self.recipe.data_file:
            assert self.node.snapshot_store is None
        elif self.graph is not None:
            found = {each.name: each for each in self.node.snapshot_store.snapshots()}
            assert found.keys() == self.taken.keys()
            for name, (disk, state) in self.taken.items():
                assert found[name].disk_size == len(disk)
                assert found[name].state_size == len(state)
                assert self.node.snapshot_store.read_state(found[name], 0, 1 << 30) == state

    @invariant()
    def qemu_agrees(self) -> None:
        if self.graph is None or self.watch == "at the end":
            return
        if self.watch == "closed" and self.pending is None:
            self._close()
            assert_clean(self.path)
            self._assert_peer_reads_the_same()
            self._open()
            return
        # The lease of an open image looks like leaks.
        self.node.flush()
        assert_only_leaks(self.path)
        self._assert_peer_reads_the_same()

    def _assert_peer_reads_the_same(self) -> None:
        model = self.path.with_name("model.raw")
        model.write_bytes(self.disk)
        qemu_img("compare", "-U", "-f", "qcow2", "-F", "raw", self.path, model)
        if self.recipe.data_file == "raw":
            assert (self.path.parent / "data.raw").read_bytes()[: len(self.disk)] == self.disk

    def teardown(self) -> None:
        try:
            if self.graph is not None:
                note(f"{self.recipe}")
                self._close()
                assert_clean(self.path)
                self._assert_peer_reads_the_same()
                for name, (disk, _) in self.taken.items():
                    # The size that it shows is the present one.
                    seen = as_raw(self.path, "-l", f"snapshot.name={name}")
                    both = min(len(seen), len(disk))
                    assert seen[:both] == disk[:both]
        finally:
            if self.graph is not None:
                self.graph.close()
            self.peers.close()
            self.directory.cleanup()


class LongSequences(Sequences):
    """Looked at when they are over."""

    watches = st.just("at the end")


Sequences.TestCase.settings = settings(
    max_examples=600 if LONG else 50,
    stateful_step_count=25 if LONG else 12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
LongSequences.TestCase.settings = settings(
    Sequences.TestCase.settings, max_examples=300 if LONG else 20, stateful_step_count=120 if LONG else 40
)
TestSequences = pytest.mark.timeout(7200 if LONG else 180)(Sequences.TestCase)
TestLongSequences = pytest.mark.timeout(7200 if LONG else 180)(LongSequences.TestCase)
