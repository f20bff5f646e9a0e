"""The virtio block device (virtio 1.2, section 5.2) on a node.

    request   u32 type, u32 reserved, u64 sector | data to write      in the readable segments
              data read | u8 status                                   in the writable ones

The node's calls block, so they are made by a thread of the device's own, one after the other in the guest's order. What a
request reads goes to a buffer of ours first; RAM, ring and interrupt are touched at an instruction boundary, on the vCPU's
thread. With `icount` everything happens inside the guest's notification, so that every run sees the same.

A request that fails is told to the guest, ignored, or parked: then the machine stops with `io-error`, and the request is made
again when the guest goes on. Its descriptors stay the device's meanwhile, so its head is all that a save must keep.
"""

import errno
import logging
import queue
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from stillframe.block.node import Node
from stillframe.errors import IOFailed, NoSpace, StillframeError
from stillframe.events import EventBus
from stillframe.machine.devices.virtio_mmio import TRANSPORT_FIELDS, VirtioDevice
from stillframe.machine.devices.virtqueue import MAXIMUM_SIZE, Chain, QueueError, Segment
from stillframe.machine.mailbox import Mailbox
from stillframe.machine.memory import GuestMemory
from stillframe.machine.run_state import RunState
from stillframe.vmstate.fields import Description, Field, Values

_log = logging.getLogger(__name__)

SECTOR = 512
ID_LENGTH = 20

_READ, _WRITE, _FLUSH, _GET_ID, _DISCARD, _WRITE_ZEROES = 0, 1, 4, 8, 11, 13
_OK, _IO_ERROR, _UNSUPPORTED = 0, 1, 2
_F_SEG_MAX, _F_RO, _F_BLK_SIZE, _F_FLUSH, _F_DISCARD, _F_WRITE_ZEROES = (
    1 << 2,
    1 << 5,
    1 << 6,
    1 << 9,
    1 << 13,
    1 << 14,
)
_HEADER = struct.Struct("<IIQ")
_RANGE = struct.Struct("<QII")
_MAXIMUM_RANGE = (1 << 31) // SECTOR - 1
_MAXIMUM_DATA = 32 << 20
_IN_FLIGHT_LIMIT = 64 << 20
_UNMAP = 1


@dataclass(frozen=True, slots=True)
class ErrorPolicy:
    """What is done about an error of the node: "report", "ignore", "stop", or "enospc": stop for want of room, else report.

    QEMU's defaults are enospc for writes and report for reads.
    """

    werror: str = "enospc"
    rerror: str = "report"

    def action(self, *, is_read: bool, no_space: bool) -> str:
        """As the event BLOCK_IO_ERROR tells it: "report", "ignore" or "stop"."""
        policy = self.rerror if is_read else self.werror
        if policy == "enospc":
            return "stop" if no_space else "report"
        return policy


@dataclass(frozen=True, slots=True)
class _Request:
    """What the guest asks for, taken out of RAM.

    :param data: to be written; ranges for discard and write-zeroes.
    :param generation: the device's, which a reset by the guest raises.
    """

    head: int
    type: int
    offset: int
    data: bytes
    into: tuple[Segment, ...]
    status_at: int
    generation: int

    @property
    def length(self) -> int:
        """Bytes of a read."""
        return sum(segment.length for segment in self.into)

    @property
    def weight(self) -> int:
        return len(self.data) + self.length


class VirtioBlk(VirtioDevice):
    """:param device_id: of the device, as events name it. :param serial: what the guest reads as the disk's id.

    :param stop: asks for the machine to be stopped in a run state.
    :param synchronous: complete requests inside the notification.
    """

    device_type = 2
    description = Description(
        "virtio-blk",
        version=1,
        fields=(
            *TRANSPORT_FIELDS,
            Field("capacity", "uint64"),
            Field("parked_count", "uint16"),
            Field("parked", "uint16", count=MAXIMUM_SIZE),
        ),
    )

    def __init__(
        self,
        memory: GuestMemory,
        line: Callable[[bool], None],
        *,
        node: Node,
        device_id: str,
        serial: str,
        policy: ErrorPolicy,
        mailbox: Mailbox,
        events: EventBus,
        stop: Callable[[RunState], None],
        synchronous: bool,
    ) -> None:
        super().__init__(memory, line)
        self.section_name = f"virtio-blk/{device_id}"
        self.node = node
        self.device_id = device_id
        self._memory = memory
        self._serial = serial.encode()[:ID_LENGTH].ljust(ID_LENGTH, b"\0")
        self._policy = policy
        self._mailbox = mailbox
        self._events = events
        self._stop = stop
        self._synchronous = synchronous
        self.features = _F_SEG_MAX | _F_BLK_SIZE | _F_FLUSH | _F_DISCARD | _F_WRITE_ZEROES
        if node.read_only:
            self.features = _F_SEG_MAX | _F_BLK_SIZE | _F_FLUSH | _F_RO
        self._parked: list[int] = []
        self._generation = 0
        self._in_flight = 0
        self._weight = 0
        self._stopping = False
        self._io_status = "ok"
        self._done = threading.Condition()
        self._work: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None

    def config(self) -> bytes:
        """Layout of section 5.2.4."""
        return struct.pack(
            "<QIIHBBIBBHIHBBIIIIIIB3x",
            self.node.size // SECTOR,
            0,
            MAXIMUM_SIZE - 2,
            0,
            0,
            0,
            SECTOR,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            _MAXIMUM_RANGE,
            1,
            4096 // SECTOR,
            _MAXIMUM_RANGE,
            1,
            0,
            1,
        )

    # From the guest

    def notified(self) -> None:
        while self._weight < _IN_FLIGHT_LIMIT and not self._stopping:
            chain = self.queue.pop()
            if chain is None:
                return
            self._submit(chain)

    def _submit(self, chain: Chain) -> None:
        request = self._parse(chain)
        if request is None:
            return
        if not self._memory.is_whole():
            # Zeroes may stand for what has not come: no disk gets them. The guest is being stopped for good.
            self._parked.append(request.head)
            self._stopping = True
            return
        self._in_flight += 1
        self._weight += request.weight
        if self._synchronous:
            self._complete(request, *self._perform(request))
            return
        if self._worker is None:
            self._worker = threading.Thread(
                target=self._run, name=f"virtio-blk-{self.device_id}", daemon=True
            )
            self._worker.start()
        self._work.put(request)

    def _parse(self, chain: Chain) -> _Request | None:
        """The request; None where it was answered here. :raise QueueError: it is none."""
        if chain.readable_length < _HEADER.size or chain.writable_length < 1:
            raise QueueError("a request without header or status")
        if max(chain.readable_length, chain.writable_length) > _MAXIMUM_DATA:
            last = chain.writable[-1]
            self._answer(chain.head, last.address + last.length - 1, _IO_ERROR, 0)
            return None
        sent = self.queue.gather(chain.readable)
        kind, _, sector = _HEADER.unpack_from(sent)
        *whole, last = chain.writable
        into = (*whole, *((Segment(last.address, last.length - 1),) if last.length > 1 else ()))
        status_at = last.address + last.length - 1
        data = sent[_HEADER.size :]
        return _Request(chain.head, kind, sector * SECTOR, data, into, status_at, self._generation)

    # On the worker's thread: no device state, no RAM

    def _run(self) -> None:
        while (request := self._work.get()) is not None:
            self._mailbox.post(partial(self._complete, request, *self._perform(request)))
            with self._done:
                self._done.notify_all()

    def _perform(self, request: _Request) -> tuple[int, bytearray | bytes, StillframeError | None]:
        """Status, what was read, and the error behind a status that the policy decides about."""
        node = self.node
        try:
            if request.type == _READ:
                if not self._is_inside(request.offset, request.length):
                    return _IO_ERROR, b"", None
                read = bytearray(request.length)
                node.readinto(request.offset, memoryview(read))
                return _OK, read, None
            if request.type == _GET_ID:
                return _OK, self._serial, None
            if request.type == _FLUSH:
                node.flush()
                return _OK, b"", None
            if request.type not in (_WRITE, _DISCARD, _WRITE_ZEROES):
                return _UNSUPPORTED, b"", None
            if node.read_only:
                return _IO_ERROR, b"", None
            if request.type == _WRITE:
                if not self._is_inside(request.offset, len(request.data)):
                    return _IO_ERROR, b"", None
                node.write(request.offset, request.data)
                return _OK, b"", None
            return self._perform_range(request), b"", None
        except StillframeError as error:
            return _IO_ERROR, b"", error
        except Exception as error:
            _log.exception("Node '%s' failed by a defect of stillframe", node.node_name)
            return _IO_ERROR, b"", IOFailed(str(error), errno=errno.EIO)

    def _is_inside(self, offset: int, length: int) -> bool:
        return length % SECTOR == 0 and offset + length <= self.node.size // SECTOR * SECTOR

    def _perform_range(self, request: _Request) -> int:
        if len(request.data) != _RANGE.size:
            return _UNSUPPORTED if len(request.data) > _RANGE.size else _IO_ERROR
        sector, count, flags = _RANGE.unpack(request.data)
        offset, length = sector * SECTOR, count * SECTOR
        if count > _MAXIMUM_RANGE or not self._is_inside(offset, length):
            return _IO_ERROR
        if flags & ~_UNMAP or (request.type == _DISCARD and flags):
            return _UNSUPPORTED
        if length:
            if request.type == _DISCARD:
                self.node.discard(offset, length)
            else:
                self.node.write_zeroes(offset, length, unmap=bool(flags & _UNMAP))
        return _OK

    # At a boundary

    def _complete(
        self,
        request: _Request,
        status: int,
        read: bytearray | bytes,
        error: StillframeError | None,
    ) -> None:
        self._in_flight -= 1
        self._weight -= request.weight
        if request.generation != self._generation:
            return
        if error is not None:
            action = self._report(request, error)
            if action == "stop":
                self._parked.append(request.head)
                self._stopping = True
                self._stop(RunState.IO_ERROR)
                return
            if action == "ignore":
                status = _OK
        try:
            written = self.queue.scatter(request.into, memoryview(read)) if status == _OK else 0
        except QueueError:
            self._break()
            return
        self._answer(request.head, request.status_at, status, written)
        if not self._synchronous:
            self.serve()

    def _answer(self, head: int, status_at: int, status: int, written: int) -> None:
        if self.queue.put(status_at, bytes((status,))):
            self.give_back(head, written + 1)
        else:
            self._break()

    def _report(self, request: _Request, error: StillframeError) -> str:
        is_read = request.type == _READ
        no_space = isinstance(error, NoSpace) or (isinstance(error, IOFailed) and error.errno == errno.ENOSPC)
        action = self._policy.action(is_read=is_read, no_space=no_space)
        self._events.emit(
            "BLOCK_IO_ERROR",
            device=self.device_id,
            node_name=self.node.node_name,
            operation="read" if is_read else "write",
            action=action,
            nospace=no_space,
            reason=error.strerror if isinstance(error, IOFailed) else str(error),
        )
        if action == "stop":
            self._io_status = "nospace" if no_space else "failed"
        return action

    def io_status(self) -> str:
        """In QEMU's words: "ok", or why the guest was stopped, "nospace" or "failed", until it goes on."""
        return self._io_status

    # The machine's moments

    def drain(self) -> None:
        """Every request ends: the storage answers, or the machine's process does."""
        while self._in_flight:
            with self._done:
                if not self._mailbox.waiting:
                    self._done.wait(1.0)
            self._mailbox.run()

    def resumed(self) -> None:
        """What was parked is asked for again, in its order, before anything new."""
        self._stopping = False
        self._io_status = "ok"
        parked, self._parked = self._parked, []
        for head in parked:
            try:
                self._submit(self.queue.chain(head))
            except QueueError:
                self._break()
                return
        self.serve()

    def cancel(self) -> None:
        self._generation += 1
        self._parked.clear()
        self._stopping = False
        self._io_status = "ok"

    def close(self) -> None:
        if self._worker is not None:
            self._work.put(None)
            self._worker.join()
            self._worker = None

    def save_state(self) -> Values:
        return {
            **self.transport_state(),
            "capacity": self.node.size // SECTOR,
            "parked_count": len(self._parked),
            "parked": tuple(self._parked) + (0,) * (MAXIMUM_SIZE - len(self._parked)),
        }

    def check_state(self, values: Values) -> None:
        super().check_state(values)
        self.integer(values, "capacity")
        count = self.integer(values, "parked_count", maximum=MAXIMUM_SIZE)
        heads = self.integers(values, "parked", MAXIMUM_SIZE)[:count]
        if any(head >= self.integer(values, "queue_size") for head in heads):
            raise self.refuse("parked", "names a descriptor that the queue does not have")

    def load_state(self, values: Values) -> None:
        super().load_state(values)
        self.cancel()
        count = self.integer(values, "parked_count")
        self._parked = list(self.integers(values, "parked", MAXIMUM_SIZE)[:count])
