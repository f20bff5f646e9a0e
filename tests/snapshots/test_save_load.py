"""Memory, devices and disks of one instant, all or nothing; and a guest that goes on as it was whatever
fails."""

import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest

from block.faults import ForwardingNode
from peers import peer
from snapshots.hosts import (
    DISK,
    Register,
    Steps,
    content,
    do_delete,
    do_load,
    do_save,
    events_of,
    everything,
    new_image,
    new_machine,
    opened,
    qemu_img_check,
)
from stillframe.block.node import Node, SnapshotRecord
from stillframe.errors import (
    Cancelled,
    IOFailed,
    Refused,
    StateMismatch,
    StillframeError,
    StreamCorrupt,
    Unsupported,
)
from stillframe.machine.machine import Machine
from stillframe.machine.run_state import RunState
from stillframe.snapshots import selection
from stillframe.snapshots.context import Unwatched
from stillframe.snapshots.keeping import KeepingOptions, keeping
from stillframe.snapshots.staging import _StagedBlock
from stillframe.vmstate import layout
from stillframe.vmstate.stream import RAM_SECTION_ID

RAM = 6 << 20
ROM = 64 << 10


def fill(machine: Machine, seed: int) -> None:
    """Random memory, half of its pages zero."""
    random = np.random.default_rng(seed)
    for block in machine.memory:
        pages = np.frombuffer(block.view, np.uint8).reshape(-1, 4096)
        pages[:] = random.integers(0, 256, pages.shape, np.uint8)
        pages[random.random(len(pages)) < 0.5] = 0


def memory_of(machine: Machine) -> list[bytes]:
    return [bytes(block.view) for block in machine.memory]


def machine_with(*devices: Register, memory: int = RAM, running: bool = True) -> Machine:
    return new_machine(*devices, memory={"ram": memory, "rom": ROM}, running=running)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Node, Node]]:
    with (
        opened(new_image(tmp_path / "a.qcow2"), "a") as a,
        opened(new_image(tmp_path / "b.qcow2", cluster_size=4096), "b") as b,
    ):
        a.write(0, b"first" * 1000)
        b.write(DISK - 4096, b"last" * 1000)
        yield a, b
    qemu_img_check(tmp_path / "a.qcow2")
    qemu_img_check(tmp_path / "b.qcow2")


def test_a_machine_comes_back_as_it_was(nodes: tuple[Node, Node]) -> None:
    device = Register(value=1 << 63)
    device.queue = b"in flight"
    machine = machine_with(device)
    fill(machine, 1)
    memory, disks = memory_of(machine), [content(node) for node in nodes]
    do_save(machine, nodes, "one")
    clock = nodes[0].info().snapshots[0].vm_clock_ns

    fill(machine, 2)
    device.value, device.queue = 5, b""
    nodes[0].write(4096, b"wrecked")
    nodes[1].write_zeroes(0, DISK)
    do_load(machine, nodes, "one")

    assert memory_of(machine) == memory
    assert (device.value, device.queue) == (1 << 63, b"in flight")
    assert [content(node) for node in nodes] == disks
    assert machine.run_state is RunState.RUNNING
    assert clock <= machine.clock.ns


def test_a_snapshot_loads_in_a_machine_that_never_ran(nodes: tuple[Node, Node]) -> None:
    machine = machine_with(Register(value=3))
    fill(machine, 1)
    do_save(machine, nodes, "one")
    other = machine_with(Register(value=4), running=False)
    do_load(other, nodes, "one")
    assert other.clock.ns == nodes[0].info().snapshots[0].vm_clock_ns
    assert memory_of(other) == memory_of(machine)
    assert other.run_state is RunState.PRELAUNCH


def test_only_what_is_loaded_changes(nodes: tuple[Node, Node]) -> None:
    """A node that is not listed keeps its content; so does a snapshot that is not loaded."""
    machine = machine_with()
    do_save(machine, nodes, "one")
    nodes[0].write(0, b"A")
    nodes[1].write(0, b"B")
    do_load(machine, nodes[:1], "one")
    assert nodes[0].read(0, 5) == b"first"
    assert nodes[1].read(0, 1) == b"B"


def test_the_guest_is_stopped_and_resumed_once(nodes: tuple[Node, Node]) -> None:
    machine = machine_with()
    names = events_of(machine)
    do_save(machine, nodes, "one")
    do_load(machine, nodes, "one")
    do_delete(nodes, "one")
    assert names == ["STOP", "RESUME", "STOP", "RESUME"]


def test_a_load_and_nothing_else_gives_a_new_generation_id(nodes: tuple[Node, Node]) -> None:
    device = Register()
    machine = machine_with(device)
    do_save(machine, nodes, "one")
    device.refuses_check = True
    refused_load(machine, nodes, StateMismatch)
    assert device.generation == 0
    device.refuses_check, device.fails_load = False, 1
    with pytest.raises(IOFailed):
        do_load(machine, nodes, "one")
    assert device.generation == 0
    do_load(machine, nodes, "one")
    assert device.generation == 1


@pytest.mark.parametrize("state", [RunState.SHUTDOWN, RunState.INTERNAL_ERROR])
def test_a_machine_that_cannot_go_on_can_after_a_load(nodes: tuple[Node, Node], state: RunState) -> None:
    machine = machine_with()
    do_save(machine, nodes, "one")
    with machine.hold(RunState.SAVE_VM):
        machine.set_run_state(state)
    with pytest.raises(Refused):
        machine.cont()
    do_load(machine, nodes, "one")
    assert machine.run_state is RunState.PAUSED
    machine.cont()
    assert machine.run_state is RunState.RUNNING


def test_progress_is_in_bytes_and_its_total_is_known_from_the_start(nodes: tuple[Node, Node]) -> None:
    machine = machine_with()
    fill(machine, 1)
    for operation in (do_save, do_load):
        steps = Steps()
        operation(machine, nodes, "one", steps)
        totals = {total for _, total in steps.reports}
        done = [each for each, _ in steps.reports]
        assert len(totals) == 1
        assert done == sorted(done)
        assert done[0] == 0
        assert done[-1] == totals.pop()
        assert len(done) > 4
    assert steps.reports[-1][0] == nodes[0].info().snapshots[0].state_size + 1


def checkpoints_of(machine: Machine, nodes: tuple[Node, Node]) -> tuple[int, int]:
    saving, loading = Steps(), Steps()
    do_save(machine, nodes, "measured", saving)
    do_load(machine, nodes, "measured", loading)
    do_delete(nodes, "measured")
    return saving.checkpoints, loading.checkpoints


def test_a_save_cancelled_at_any_moment_leaves_nothing(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    machine = machine_with(Register())
    fill(machine, 1)
    do_save(machine, nodes, "older")
    paths = (tmp_path / "a.qcow2", tmp_path / "b.qcow2")
    older = [everything(path) for path in paths]
    fill(machine, 2)
    count, _ = checkpoints_of(machine, nodes)
    assert count > 8
    memory, names = memory_of(machine), events_of(machine)
    for number in range(count):
        with pytest.raises(Cancelled, match="Operation canceled"):
            do_save(machine, nodes, "one", Steps(cancel_at=number))
        assert machine.run_state is RunState.RUNNING
        assert [[s.name for s in node.info().snapshots] for node in nodes] == [["older"], ["older"]]
    assert names.count("STOP") == names.count("RESUME")
    assert memory_of(machine) == memory
    assert [everything(path) for path in paths] == older
    do_save(machine, nodes, "one")


def test_the_space_of_a_cancelled_save_is_given_back(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    machine = machine_with()
    fill(machine, 1)
    sizes = []
    for _ in range(5):
        for number in (6, 7, 8):
            with pytest.raises(Cancelled):
                do_save(machine, nodes, "one", Steps(cancel_at=number))
        do_save(machine, nodes, "one")
        do_delete(nodes, "one")
        sizes.append((tmp_path / "a.qcow2").stat().st_blocks)
    assert sizes[-1] <= sizes[1]


def test_a_load_cancelled_at_any_moment_changes_nothing(nodes: tuple[Node, Node]) -> None:
    device = Register(value=1)
    machine = machine_with(device)
    fill(machine, 1)
    do_save(machine, nodes, "one")
    _, count = checkpoints_of(machine, nodes)
    fill(machine, 2)
    device.value = 2
    nodes[0].write(0, b"later")
    memory, disks = memory_of(machine), [content(node) for node in nodes]
    for number in range(count):
        with pytest.raises(Cancelled):
            do_load(machine, nodes, "one", Steps(cancel_at=number))
        assert machine.run_state is RunState.RUNNING
    assert memory_of(machine) == memory
    assert device.value == 2
    assert [content(node) for node in nodes] == disks


def refused_load(machine: Machine, nodes: tuple[Node, Node], kind: type[StillframeError]) -> StillframeError:
    """A load that must fail, and must not even stop the guest."""
    memory, disks, names = memory_of(machine), [content(node) for node in nodes], events_of(machine)
    with pytest.raises(kind) as refused:
        do_load(machine, nodes, "one")
    assert machine.run_state is RunState.RUNNING
    assert names == []
    assert memory_of(machine) == memory
    assert [content(node) for node in nodes] == disks
    return refused.value


@pytest.mark.parametrize("size", [DISK // 2, 2 * DISK])
def test_disk_that_was_resized_meanwhile_has_the_size_of_the_snapshot_again_as_with_qemu(
    size: int, tmp_path: Path
) -> None:
    path = new_image(tmp_path / "a.qcow2")
    machine = machine_with()
    with opened(path, "a") as node:
        node.write(DISK - 4096, b"last" * 1024)
        before = content(node)
        do_save(machine, [node], "one")
    subprocess.run([peer("qemu-img"), "resize", "-q", "--shrink", str(path), str(size)], check=True)
    with opened(path, "a") as node:
        assert node.size == size
        do_load(machine, [node], "one")
        assert (node.size, content(node)) == (DISK, before)
    qemu_img_check(path)


def test_machine_of_this_process_is_not_replaced_by_another(nodes: tuple[Node, Node]) -> None:
    machine = machine_with()
    do_save(machine, nodes, "one")
    chosen = selection.for_load([selection.snapshot_node(node) for node in nodes], "one", None)
    with pytest.raises(Unsupported, match="no other that could replace it"):
        keeping(machine, KeepingOptions(), nullcontext).load(chosen, Unwatched(), replace=True)
    assert machine.run_state is RunState.RUNNING


def test_another_size_of_memory_is_refused_by_name(nodes: tuple[Node, Node]) -> None:
    do_save(machine_with(), nodes, "one")
    error = refused_load(machine_with(memory=2 * RAM), nodes, StateMismatch)
    assert str(error) == "Error -22 while loading VM state: Size mismatch: ram: 0x600000 != 0xc00000"
    assert error.remedy == "Start the machine with --memory 6M."


def test_another_board_is_refused_by_name(nodes: tuple[Node, Node]) -> None:
    do_save(new_machine(board="virt"), nodes, "one")
    error = refused_load(new_machine(running=True), nodes, StateMismatch)
    assert "Machine type received is 'virt' and local is 'none'" in str(error)


@pytest.mark.parametrize(
    ("saved", "here", "words"),
    [
        (
            [Register("nic", 2)],
            [],
            "Unknown savevm section or instance 'nic' 2. Make sure that your current VM setup",
        ),
        ([], [Register("nic", 2)], "The machine state has no section 'nic' 2, which this machine has"),
    ],
    ids=["left over", "missing"],
)
def test_other_devices_are_refused_by_name(
    nodes: tuple[Node, Node], saved: list[Register], here: list[Register], words: str
) -> None:
    do_save(machine_with(*saved), nodes, "one")
    error = refused_load(machine_with(*here), nodes, StateMismatch)
    assert str(error).startswith(f"Error -22 while loading VM state: {words}")
    assert isinstance(error, StateMismatch)
    assert error.section == "nic"


@pytest.mark.parametrize(
    ("saved", "here"),
    [({"ram": RAM}, {"ram": RAM, "rom": ROM}), ({"ram": RAM, "vram": ROM}, {"ram": RAM}), ({}, {"ram": RAM})],
    ids=["missing", "left over", "none"],
)
def test_other_memory_is_refused_by_name(
    nodes: tuple[Node, Node], saved: dict[str, int], here: dict[str, int]
) -> None:
    do_save(new_machine(memory=saved), nodes, "one")
    error = refused_load(new_machine(memory=here, running=True), nodes, StateMismatch)
    differing = (saved.keys() ^ here.keys()).pop()
    assert re.search(rf"""['"]{differing}['"]""", str(error))


def test_a_field_that_a_device_does_not_take_is_named_before_anything_stops(nodes: tuple[Node, Node]) -> None:
    do_save(machine_with(Register("uart/0")), nodes, "one")
    device = Register("uart/0")
    device.refuses_check = True
    error = refused_load(machine_with(device), nodes, StateMismatch)
    assert "'uart/0'" in str(error)
    assert "'value'" in str(error)
    assert isinstance(error, StateMismatch)
    assert (error.section, error.field) == ("uart/0", "value")


def test_a_damaged_state_is_refused_before_anything_stops(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    machine = machine_with(Register())
    fill(machine, 1)
    do_save(machine, nodes, "one")
    a, b = nodes
    a.close()
    path = tmp_path / "a.qcow2"
    data = path.read_bytes()
    assert data.count(b"QEVM") == 1
    damaged = tmp_path / "damaged.qcow2"
    damaged.write_bytes(data.replace(b"QEVM", b"QEVN"))
    with opened(damaged, "a") as node:
        error = refused_load(machine, (node, b), StreamCorrupt)
    assert "Error -22 while loading VM state: Not a migration stream" in str(error)


def test_a_device_that_fails_in_the_middle_of_a_load_undoes_all_of_it(nodes: tuple[Node, Node]) -> None:
    first, failing, last = Register("first", value=1), Register("failing", value=1), Register("last", value=1)
    machine = machine_with(first, failing, last)
    fill(machine, 1)
    do_save(machine, nodes, "one")
    for device in (first, failing, last):
        device.value = 2
    fill(machine, 2)
    nodes[0].write(0, b"later")
    nodes[1].write(0, b"later")
    memory, disks = memory_of(machine), [content(node) for node in nodes]
    failing.fails_load = 1
    with pytest.raises(IOFailed, match="'failing' could not reach its disk") as failed:
        do_load(machine, nodes, "one")
    assert failed.value.left is None
    assert memory_of(machine) == memory
    assert [device.value for device in (first, failing, last)] == [2, 2, 2]
    assert [content(node) for node in nodes] == disks
    assert machine.run_state is RunState.RUNNING
    do_load(machine, nodes, "one")
    assert [device.value for device in (first, failing, last)] == [1, 1, 1]


@pytest.mark.parametrize("state", [RunState.SHUTDOWN, RunState.INTERNAL_ERROR])
def test_a_failed_load_makes_no_guest_runnable_that_was_not(
    nodes: tuple[Node, Node], state: RunState
) -> None:
    device = Register(value=1)
    machine = machine_with(device)
    do_save(machine, nodes, "one")
    with machine.hold(RunState.SAVE_VM):
        machine.set_run_state(state)
    device.fails_load = 1
    with pytest.raises(IOFailed):
        do_load(machine, nodes, "one")
    assert machine.run_state is state


def test_a_load_that_runs_out_of_memory_in_the_middle_of_the_memory_puts_all_of_it_back(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = new_machine(Register(value=1), memory={"ram": 4 << 20}, running=True)
    machine.memory.blocks[0].view[:] = b"\1" * (4 << 20)
    do_save(machine, nodes, "one")
    machine.memory.blocks[0].view[:] = b"\2" * (4 << 20)
    nodes[0].write(0, b"later")
    memory, disks = memory_of(machine), [content(node) for node in nodes]
    exchange, calls = _StagedBlock.exchange, 0

    def scarce(block: _StagedBlock, start: int) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise MemoryError
        exchange(block, start)

    monkeypatch.setattr(_StagedBlock, "exchange", scarce)
    with pytest.raises(MemoryError):
        do_load(machine, nodes, "one")
    assert calls > 3
    assert memory_of(machine) == memory
    assert [content(node) for node in nodes] == disks
    assert machine.run_state is RunState.RUNNING


def test_a_device_that_cannot_be_brought_back_is_named(nodes: tuple[Node, Node]) -> None:
    failing, other = Register("failing", value=1), Register("other", value=1)
    machine = machine_with(failing, other)
    do_save(machine, nodes, "one")
    failing.fails_load, other.value = 2, 2
    with pytest.raises(IOFailed) as failed:
        do_load(machine, nodes, "one")
    assert "Device 'failing' could not be brought back" in (failed.value.left or "")
    assert other.value == 2


def test_a_load_without_memory_to_gather_it_in_is_refused_first(
    nodes: tuple[Node, Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    from stillframe.snapshots import load as loading

    machine = machine_with()
    fill(machine, 1)
    do_save(machine, nodes, "one")
    real = loading.refuse_without_room
    monkeypatch.setattr(loading, "refuse_without_room", lambda needed: real(needed + (1 << 60)))
    error = refused_load(machine, nodes, Refused)
    assert "MiB of memory beside the guest's own" in str(error)


def test_an_older_release_is_loaded(nodes: tuple[Node, Node]) -> None:
    """A device of version 1, which had no `late` yet."""
    from stillframe.vmstate.fields import Description

    old = Register("register")
    old.description = Description("register", 1, Register.description.fields[:3])
    old.value = 77
    do_save(machine_with(old), nodes, "one")
    device = Register("register")
    do_load(machine_with(device), nodes, "one")
    assert device.value == 77


class Journal(ForwardingNode):
    """Notes flushes and the writes that switch an image's tables: those of header bytes 24 to 71."""

    def __init__(self, inner: Node, journal: list[str]) -> None:
        super().__init__(inner)
        self.journal = journal
        self.name = inner.node_name.removesuffix("-file")

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        before = self.world()
        super().write(offset, data)
        if self.world() != before:
            self.journal.append(f"switch {self.name}")

    def world(self) -> bytes:
        return self.inner.read(24, 48)

    def flush(self) -> None:
        self.journal.append(f"flush {self.name}")
        super().flush()


def test_the_state_nodes_switch_is_the_commit_of_the_group(tmp_path: Path) -> None:
    """Last in a save and a load, first in a delete; and what can be flushed is flushed while the guest
    runs."""
    machine = machine_with()
    journal: list[str] = []
    with (
        opened(new_image(tmp_path / "a"), "state", lambda inner: Journal(inner, journal)) as state,
        opened(new_image(tmp_path / "b"), "member", lambda inner: Journal(inner, journal)) as member,
    ):
        machine.events.subscribe(lambda event: journal.append(event.name))
        nodes = [state, member]

        def switches_of(operation: Callable[[], None]) -> list[str]:
            journal.clear()
            operation()
            return [each for each in journal if each.startswith("switch")]

        assert switches_of(lambda: do_save(machine, nodes, "one", vmstate="state")) == [
            "switch member",
            "switch state",
        ]
        before = journal[: journal.index("STOP")]
        assert {"flush member", "flush state"} <= set(before)
        assert switches_of(lambda: do_load(machine, nodes, "one", vmstate="state")) == []
        for node in nodes:
            node.write(0, b"a disk that is to be reverted")
        assert switches_of(lambda: do_load(machine, nodes, "one", vmstate="state")) == [
            "switch member",
            "switch state",
        ]
        assert switches_of(lambda: do_delete(nodes[::-1], "one")) == ["switch state", "switch member"]


def test_a_page_that_became_zero_later_in_the_state_is_zero(nodes: tuple[Node, Node]) -> None:
    """An incremental state holds stale pages, and what they became behind them."""
    machine = machine_with()
    fill(machine, 1)
    do_save(machine, nodes, "stale")
    for block in machine.memory:
        block.view[::4096] = bytes(len(block.view) // 4096)
        block.view[: len(block.view) // 2] = bytes(len(block.view) // 2)
    memory = memory_of(machine)
    do_save(machine, nodes, "fresh")
    store = nodes[0].snapshot_store
    assert store is not None
    stale, fresh = (store.read_state(found, 0, found.state_size) for found in store.snapshots())
    part, end = layout.mark(layout.PART, RAM_SECTION_ID), layout.mark(layout.END, RAM_SECTION_ID)
    pending = store.freeze()
    pending.write_state(0, stale[: stale.index(end)] + fresh[fresh.index(part) :])
    change = pending.prepare(SnapshotRecord("both", 0, 0))
    change.commit()
    change.finish()
    fill(machine, 2)
    do_load(machine, nodes[:1], "both")
    assert memory_of(machine) == memory


def test_of_several_snapshots_of_a_name_the_one_of_the_same_save_is_loaded(
    nodes: tuple[Node, Node], tmp_path: Path
) -> None:
    """Stock tools make second ones of a name."""
    a, b = nodes
    machine = machine_with()
    b.write(0, b"other")
    do_save(machine, [b], "one")
    b.write(0, b"right")
    do_save(machine, [a], "one")
    # As qemu-img would: a snapshot of a name that is there.
    state = a.info().snapshots[0]
    assert state.lineage is not None
    pending = b.snapshot_store.freeze() if b.snapshot_store else None
    assert pending is not None
    change = pending.prepare(SnapshotRecord("one", 0, 0, lineage=replace(state.lineage, snapshot=uuid4())))
    change.commit()
    change.finish()
    b.write(0, b"later")
    do_load(machine, [a, b], "one", vmstate="a")
    assert b.read(0, 5) == b"right"
