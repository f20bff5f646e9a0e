"""The virtio devices, spoken to as a driver would, and as one that lies would."""

import errno
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from machine.machines import RAM, Events, MemoryNode, load, machine, saved, wait_until
from machine.rv64 import Program
from stillframe.errors import StateMismatch
from stillframe.machine.build import DriveConfig
from stillframe.machine.devices.virtio_blk import ErrorPolicy, VirtioBlk
from stillframe.machine.devices.virtio_rng import VirtioRng
from stillframe.machine.mailbox import Mailbox
from stillframe.machine.memory import GuestMemory, MemoryBlock
from stillframe.machine.run_state import RunState

SIZE = 1 << 20
DESC, AVAIL, USED, BUFFERS = RAM + 0x1000, RAM + 0x2000, RAM + 0x3000, RAM + 0x10000
READ, WRITE, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
NEXT, WRITABLE, INDIRECT = 1, 2, 4
ENTRIES = 16


class Driver:
    """The guest's half of one device: registers, rings and buffers."""

    def __init__(self, device: VirtioBlk | VirtioRng, memory: GuestMemory) -> None:
        self.device = device
        self.memory = memory
        self.sent = 0
        self.seen = 0
        for status in (0, 1, 3):
            device.write(0x70, 4, status)
        device.write(0x24, 4, 1)
        device.write(0x20, 4, 1)
        device.write(0x24, 4, 0)
        device.write(0x20, 4, device.features & 0xFFFF_FFFF)
        device.write(0x70, 4, 11)
        assert device.read(0x70, 4) == 11, "features are accepted"
        device.write(0x38, 4, ENTRIES)
        for register, address in ((0x80, DESC), (0x90, AVAIL), (0xA0, USED)):
            device.write(register, 4, address & 0xFFFF_FFFF)
            device.write(register + 4, 4, address >> 32)
        device.write(0x44, 4, 1)
        device.write(0x70, 4, 15)

    def put(self, address: int, data: bytes) -> None:
        assert self.memory.write(address, data)

    def get(self, address: int, length: int) -> bytes:
        data = self.memory.read(address, length)
        assert data is not None
        return data

    def descriptor(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        self.put(DESC + 16 * index, struct.pack("<QIHH", address, length, flags, following))

    def offer(self, *heads: int) -> None:
        """Put heads into the available ring and notify."""
        for head in heads:
            self.put(AVAIL + 4 + 2 * (self.sent % ENTRIES), struct.pack("<H", head))
            self.sent = self.sent + 1 & 0xFFFF
        self.put(AVAIL + 2, struct.pack("<H", self.sent))
        self.device.write(0x50, 4, 0)

    @property
    def used(self) -> list[tuple[int, int]]:
        """What came back: heads and written lengths."""
        (count,) = struct.unpack("<H", self.get(USED + 2, 2))
        return [struct.unpack("<II", self.get(USED + 4 + 8 * (n % ENTRIES), 8)) for n in range(count)]


class Bench:
    """A block device, its node and its driver, without a processor."""

    def __init__(
        self, *, read_only: bool = False, policy: ErrorPolicy | None = None, synchronous: bool = False
    ) -> None:
        self.memory = GuestMemory((MemoryBlock.allocate("ram", RAM, SIZE, is_ram=True),))
        self.node = MemoryNode("disk", 1 << 20, read_only=read_only)
        self.events, self.mailbox = Events(), Mailbox()
        self.line = False
        self.stopped: list[RunState] = []
        self.blk = VirtioBlk(
            self.memory,
            self._set_line,
            node=self.node,
            device_id="disk0",
            serial="serial",
            policy=policy or ErrorPolicy(),
            mailbox=self.mailbox,
            events=self.events.bus,
            stop=self.stopped.append,
            synchronous=synchronous,
        )
        self.driver = Driver(self.blk, self.memory)

    def _set_line(self, raised: bool) -> None:
        self.line = raised

    def request(
        self,
        kind: int,
        sector: int = 0,
        *,
        data: bytes = b"",
        wanted: int = 0,
        pieces: int = 1,
        slot: int = 0,
    ) -> int:
        """One request, its data in `pieces` segments; not waited for. :return: where its status will be."""
        base, index = BUFFERS + slot * 0x8000, 4 * slot
        self.driver.put(base, struct.pack("<IIQ", kind, 0, sector))
        status = base + 0x7000
        self.driver.put(status, b"\xee")
        length = len(data) or wanted
        flags = 0 if data else WRITABLE
        if data:
            self.driver.put(base + 0x1000, data)
        parts = [(base, 16, 0)]
        step = -(-length // pieces) if length else 0
        for start in range(0, length, step or 1):
            parts.append((base + 0x1000 + start, min(step, length - start), flags))
        parts.append((status, 1, WRITABLE))
        for n, (address, size, flag) in enumerate(parts):
            last = n == len(parts) - 1
            self.driver.descriptor(index + n, address, size, flag | (0 if last else NEXT), index + n + 1)
        self.driver.offer(index)
        return status

    def finish(self, kind: int, sector: int = 0, **options: object) -> int:
        """One request, waited for; its status."""
        status = self.request(kind, sector, **options)  # type: ignore[arg-type]
        self.blk.drain()
        return self.driver.get(status, 1)[0]

    def data(self, length: int, slot: int = 0) -> bytes:
        return self.driver.get(BUFFERS + slot * 0x8000 + 0x1000, length)


@contextmanager
def bench(**options: object) -> Iterator[Bench]:
    made = Bench(**options)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.node.gate.set()
        made.blk.close()


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("synchronous", [False, True])
def test_what_was_written_is_read_back(synchronous: bool, pieces: int) -> None:
    with bench(synchronous=synchronous) as b:
        pattern = bytes(range(256)) * 8
        assert b.finish(WRITE, 5, data=pattern, pieces=pieces) == 0
        assert b.node.content[5 * 512 : 5 * 512 + len(pattern)] == pattern
        assert b.line
        assert b.finish(READ, 5, wanted=len(pattern), pieces=pieces) == 0
        assert b.data(len(pattern)) == pattern
        assert b.driver.used == [(0, 1), (0, len(pattern) + 1)]
        b.blk.write(0x64, 4, b.blk.read(0x60, 4))
        assert not b.line


def test_other_requests_do_what_the_standard_says() -> None:
    with bench() as b:
        assert b.finish(FLUSH) == 0
        assert b.node.log[-1][0] == "flush"
        assert b.finish(GET_ID, wanted=20) == 0
        assert b.data(20) == b"serial".ljust(20, b"\0")
        b.node.content[:] = b"x" * len(b.node.content)
        assert b.finish(WRITE_ZEROES, data=struct.pack("<QII", 2, 3, 1)) == 0
        assert bytes(b.node.content[: 6 * 512]) == b"x" * 1024 + bytes(1536) + b"x" * 512
        assert b.finish(DISCARD, data=struct.pack("<QII", 8, 8, 0)) == 0
        assert b.node.log[-1] == ("discard", 8 * 512, 8 * 512)
        assert b.finish(DISCARD, data=struct.pack("<QII", 0, 1, 1)) == 2, "a flag that discard does not have"
        assert b.finish(99) == 2
        capacity = b.blk.read(0x100, 4)
        assert capacity * 512 == b.node.size


@pytest.mark.parametrize("kind", [READ, WRITE])
@pytest.mark.parametrize(
    ("sector", "length"), [(2048, 512), (2047, 1024), (0, 100), ((1 << 64) // 512 - 1, 512)]
)
def test_requests_outside_the_disk_fail_and_touch_nothing(kind: int, sector: int, length: int) -> None:
    with bench() as b:
        options = {"data": b"y" * length} if kind == WRITE else {"wanted": length}
        assert b.finish(kind, sector, **options) == 1
        assert not b.node.log
        assert not any(b.node.content)


def test_read_only_disk_says_so_and_refuses_writes() -> None:
    with bench(read_only=True) as b:
        assert b.blk.features & 1 << 5
        assert b.finish(WRITE, data=b"z" * 512) == 1
        assert b.finish(WRITE_ZEROES, data=struct.pack("<QII", 0, 1, 0)) == 1
        assert not b.node.log


def test_failed_read_is_told_to_the_guest_and_as_an_event() -> None:
    with bench() as b:
        b.node.fail["read"] = errno.EIO
        assert b.finish(READ, wanted=512) == 1
        assert dict(b.events.seen[-1].data) == {
            "device": "disk0",
            "node-name": "disk",
            "operation": "read",
            "action": "report",
            "nospace": False,
            "reason": "Input/output error",
        }
        assert not b.stopped


def test_write_without_room_stops_the_guest_and_is_made_again() -> None:
    with bench() as b:
        b.node.fail["write"] = errno.ENOSPC
        status = b.request(WRITE, 3, data=b"a" * 512)
        b.blk.drain()
        assert b.stopped == [RunState.IO_ERROR]
        assert b.blk.io_status() == "nospace"
        assert b.events.seen[-1].data["action"] == "stop"
        assert b.events.seen[-1].data["nospace"] is True
        assert b.driver.used == []
        later = b.request(WRITE, 4, data=b"b" * 512, slot=1)
        b.blk.drain()
        assert b.driver.used == [], "nothing overtakes what was parked"
        b.node.fail.clear()
        b.blk.resumed()
        b.blk.drain()
        assert b.blk.io_status() == "ok"
        assert [b.driver.get(at, 1) for at in (status, later)] == [b"\0", b"\0"]
        assert [head for head, _ in b.driver.used] == [0, 4]
        assert b.node.content[3 * 512 : 5 * 512] == b"a" * 512 + b"b" * 512
        assert [entry for entry in b.node.log if entry[0] == "write"] == [
            ("write", 1536, 512),
            ("write", 1536, 512),
            ("write", 2048, 512),
        ]


def test_disk_gets_nothing_from_memory_that_has_not_come() -> None:
    """What the server of a load brings no more reads as zeroes: they must not reach a disk that no load brings back."""
    with bench() as b:
        b.node.write(0, b"kept" * 128)
        b.memory.is_whole = lambda: False
        b.request(WRITE, data=bytes(512))
        b.request(DISCARD, data=struct.pack("<QII", 0, 1, 0), slot=1)
        b.blk.drain()
        assert (b.node.read(0, 512), b.driver.used) == (b"kept" * 128, [])
        b.memory.is_whole = lambda: True
        b.blk.resumed()
        b.blk.drain()
        assert len(b.driver.used) == 2


def test_parked_request_survives_into_a_fresh_device() -> None:
    with bench() as b, bench() as fresh:
        b.node.fail["write"] = errno.ENOSPC
        b.request(WRITE, 3, data=b"a" * 512)
        b.blk.drain()
        state = b.blk.save_state()
        assert state["parked_count"] == 1
        fresh.memory.blocks[0].view[:] = b.memory.blocks[0].view
        fresh.blk.check_state(state)
        fresh.blk.load_state(state)
        assert fresh.blk.save_state() == state
        fresh.blk.resumed()
        fresh.blk.drain()
        assert fresh.node.content[3 * 512 : 4 * 512] == b"a" * 512
        assert fresh.driver.used == [(0, 1)]
        fresh.blk.resumed()
        fresh.blk.drain()
        assert len(fresh.node.log) == 1, "not done twice"


def test_ignored_error_is_success_for_the_guest() -> None:
    with bench(policy=ErrorPolicy(werror="ignore")) as b:
        b.node.fail["write"] = errno.EIO
        assert b.finish(WRITE, data=b"a" * 512) == 0
        assert b.events.seen[-1].data["action"] == "ignore"


def test_reset_forgets_requests_in_flight() -> None:
    with bench() as b:
        b.node.gate.clear()
        status = b.request(READ, wanted=512)
        b.blk.write(0x70, 4, 0)
        b.node.gate.set()
        b.blk.drain()
        assert b.driver.get(status, 1) == b"\xee", "memory of the former driver is left alone"
        assert b.driver.used == []


def test_defect_in_a_node_answers_the_request() -> None:
    with bench() as b:
        b.node.readinto = lambda offset, buffer: 1 / 0  # type: ignore[assignment,method-assign,return-value]
        assert b.finish(READ, wanted=512) == 1


def test_indirect_descriptors() -> None:
    with bench() as b:
        b.node.content[:512] = b"i" * 512
        driver, table = b.driver, BUFFERS + 0x4000
        driver.put(BUFFERS, struct.pack("<IIQ", READ, 0, 0))
        parts = [
            (BUFFERS, 16, NEXT, 1),
            (BUFFERS + 0x1000, 512, NEXT | WRITABLE, 2),
            (BUFFERS + 0x7000, 1, WRITABLE, 0),
        ]
        driver.put(table, b"".join(struct.pack("<QIHH", *part) for part in parts))
        driver.descriptor(0, table, 48, INDIRECT)
        driver.offer(0)
        b.blk.drain()
        assert b.data(512) == b"i" * 512
        assert driver.used == [(0, 513)]


def broken(b: Bench) -> bool:
    return bool(b.blk.read(0x70, 4) & 0x40)


HOSTILE = {
    "a loop": [(BUFFERS, 16, NEXT, 1), (BUFFERS, 16, NEXT, 0)],
    "outside of RAM": [(0x1000, 16, NEXT, 1), (BUFFERS, 1, WRITABLE, 0)],
    "over the end of RAM": [(RAM + SIZE - 8, 16, NEXT, 1), (BUFFERS, 1, WRITABLE, 0)],
    "an address that wraps": [((1 << 64) - 8, 16, NEXT, 1), (BUFFERS, 1, WRITABLE, 0)],
    "a length of 4 GiB": [(BUFFERS, 0xFFFF_FFFF, NEXT, 1), (BUFFERS, 1, WRITABLE, 0)],
    "no status": [(BUFFERS, 16, 0, 0)],
    "no header": [(BUFFERS, 1, WRITABLE, 0)],
    "a short header": [(BUFFERS, 8, NEXT, 1), (BUFFERS, 1, WRITABLE, 0)],
    "an empty segment": [(BUFFERS, 16, NEXT, 1), (BUFFERS, 0, WRITABLE, 0)],
    "a next outside of the table": [(BUFFERS, 16, NEXT, 999)],
    "readable after writable": [
        (BUFFERS, 16, NEXT, 1),
        (BUFFERS, 1, WRITABLE | NEXT, 2),
        (BUFFERS, 16, 0, 0),
    ],
    "an indirect table of odd size": [(BUFFERS, 17, INDIRECT, 0)],
    "an indirect table outside of RAM": [(0x10, 32, INDIRECT, 0)],
    "indirect and next": [(BUFFERS, 32, INDIRECT | NEXT, 1)],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_queue_that_lies_needs_a_reset_and_harms_nobody(name: str) -> None:
    with bench() as b:
        for index, part in enumerate(HOSTILE[name]):
            b.driver.descriptor(index, *part)
        b.driver.offer(0)
        b.blk.drain()
        assert broken(b)
        assert not b.node.log
        assert b.driver.used == []
        b.driver = Driver(b.blk, b.memory)
        b.driver.put(USED, bytes(4))
        b.driver.put(AVAIL, bytes(4))
        assert b.finish(WRITE, data=b"ok" * 256) == 0, "and works after it"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    table=st.lists(
        st.tuples(
            st.one_of(st.integers(0, (1 << 64) - 1), st.integers(RAM, RAM + SIZE)),
            st.one_of(st.integers(0, (1 << 32) - 1), st.integers(0, 64)),
            st.integers(0, 7),
            st.integers(0, ENTRIES + 1),
        ),
        min_size=ENTRIES,
        max_size=ENTRIES,
    ),
    heads=st.lists(st.integers(0, 0xFFFF), max_size=ENTRIES + 2),
    header=st.binary(min_size=16, max_size=64),
    rings=st.tuples(
        *[st.one_of(st.just(good), st.integers(0, (1 << 64) - 1)) for good in (DESC, AVAIL, USED)]
    ),
    size=st.one_of(st.just(ENTRIES), st.integers(0, 0xFFFF)),
)
def test_no_queue_at_all_can_crash_or_hang_the_device(
    table: list[tuple[int, int, int, int]],
    heads: list[int],
    header: bytes,
    rings: tuple[int, int, int],
    size: int,
) -> None:
    with bench() as b:
        b.blk.write(0x44, 4, 0)
        for address, register in zip(rings, (0x80, 0x90, 0xA0), strict=True):
            b.blk.write(register, 4, address & 0xFFFF_FFFF)
            b.blk.write(register + 4, 4, address >> 32)
        b.blk.write(0x38, 4, size)
        b.blk.write(0x44, 4, 1)
        b.driver.put(BUFFERS, header)
        for index, part in enumerate(table):
            b.driver.descriptor(index, *part)
        b.driver.offer(*heads)
        b.blk.drain()
        b.blk.check_state(b.blk.save_state())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("queue_size", 3),
        ("driver_features", 1 << 63),
        ("parked_count", 300),
        ("parked", (999,) + (0,) * 255),
    ],
)
def test_device_state_that_cannot_be_is_refused_by_field(field: str, value: object) -> None:
    with bench() as b:
        state = {**b.blk.save_state(), "parked_count": 1, field: value}
        with pytest.raises(StateMismatch) as caught:
            b.blk.check_state(state)  # type: ignore[arg-type]
        assert caught.value.section == "virtio-blk/disk0"
        assert caught.value.field == field


def test_entropy_is_delivered_and_repeats_only_where_it_is_to() -> None:
    drawn = []
    for deterministic in (True, True, False):
        memory = GuestMemory((MemoryBlock.allocate("ram", RAM, SIZE, is_ram=True),))
        device = VirtioRng(memory, lambda raised: None, deterministic=deterministic)
        driver = Driver(device, memory)
        driver.descriptor(0, BUFFERS, 64, WRITABLE)
        driver.offer(0)
        assert driver.used == [(0, 64)]
        drawn.append(driver.get(BUFFERS, 64))
    assert drawn[0] == drawn[1] != drawn[2]
    assert any(drawn[2])


def idle_program() -> Program:
    p = Program()
    p.label("loop")
    p.wfi()
    p.jump("loop")
    return p


def test_parked_write_is_saved_by_one_machine_and_made_by_another(tmp_path: Path) -> None:
    """The whole way: a full disk, io-error, a save, a fresh machine with room, cont."""
    nodes = [MemoryNode("root", 1 << 20) for _ in range(2)]
    nodes[0].fail["write"] = errno.ENOSPC
    states = []
    for node, fresh in zip(nodes, (False, True), strict=True):
        with machine(tmp_path, idle_program(), drives=(DriveConfig(node, "disk0"),)) as (built, _, events):
            built.start(paused=fresh)
            (blk,) = [device for device in built.devices if isinstance(device, VirtioBlk)]
            if not fresh:

                def write(blk: VirtioBlk = blk) -> None:
                    driver = Driver(blk, built.memory)
                    driver.put(BUFFERS, struct.pack("<IIQ", WRITE, 0, 1) + b"w" * 512)
                    driver.descriptor(0, BUFFERS, 528, NEXT, 1)
                    driver.descriptor(1, BUFFERS + 0x1000, 1, WRITABLE)
                    driver.offer(0)

                built.at_boundary(write)
                events.wait_for("STOP")
                wait_until(lambda: built.run_state is RunState.IO_ERROR, "io-error")
                assert events.names[-2:] == ["BLOCK_IO_ERROR", "STOP"]
                assert [disk.io_status() for disk in built.disks] == ["nospace"]
                built.cont()
                wait_until(lambda: events.names.count("BLOCK_IO_ERROR") == 2, "cont tries again")
                wait_until(lambda: built.run_state is RunState.IO_ERROR, "and stops again")
                states.append(saved(built))
                assert built.run_state is RunState.IO_ERROR
            else:
                load(built, states[0])
                assert built.run_state is RunState.PRELAUNCH
                built.cont()
                wait_until(lambda: node.content[512:1024] == b"w" * 512, "the write is made")  # noqa: B023
                assert "BLOCK_IO_ERROR" not in events.names
                assert built.run_state is RunState.RUNNING


def test_hold_waits_for_requests_in_flight(tmp_path: Path) -> None:
    import threading

    node = MemoryNode("root", 1 << 20)
    with machine(tmp_path, idle_program(), drives=(DriveConfig(node, "disk0"),)) as (built, _, _):
        built.start()
        (blk,) = [device for device in built.devices if isinstance(device, VirtioBlk)]
        node.gate.clear()

        def write() -> Driver:
            driver = Driver(blk, built.memory)
            driver.put(BUFFERS, struct.pack("<IIQ", WRITE, 0, 1) + b"w" * 512)
            driver.descriptor(0, BUFFERS, 528, NEXT, 1)
            driver.descriptor(1, BUFFERS + 0x1000, 1, WRITABLE)
            driver.offer(0)
            return driver

        driver = built.at_boundary(write)
        inside = threading.Event()

        def hold() -> None:
            with built.hold(RunState.SAVE_VM):
                assert driver.used == [(0, 1)]
                inside.set()

        other = threading.Thread(target=hold)
        other.start()
        assert not inside.wait(0.05)
        node.gate.set()
        other.join(20)
        assert inside.is_set()
