"""A split virtqueue (virtio 1.2, section 2.7), read as what it is: bytes that the guest may have made up.

    descriptor table   16 bytes each: address u64, length u32, flags u16 (1 next, 2 writable, 4 indirect), next u16
    available ring     flags u16 (1 no interrupt), index u16, heads u16[size]
    used ring          flags u16, index u16, (head u32, written u32)[size]

Every address is checked against RAM, every chain is bounded by its table, and whatever does not hold raises `QueueError`: the
device then needs a reset, as the standard says.
"""

import struct
from dataclasses import dataclass

from stillframe.machine.memory import GuestMemory

MAXIMUM_SIZE = 256

_NEXT, _WRITABLE, _INDIRECT = 1, 2, 4
_NO_INTERRUPT = 1
_DESCRIPTOR = struct.Struct("<QIHH")
_USED = struct.Struct("<II")


class QueueError(Exception):
    """The guest's queue contradicts the standard. Never leaves the device."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a request's buffer in RAM."""

    address: int
    length: int


@dataclass(frozen=True, slots=True)
class Chain:
    """One request. :param head: its first descriptor, by which it is given back."""

    head: int
    readable: tuple[Segment, ...]
    writable: tuple[Segment, ...]

    @property
    def readable_length(self) -> int:
        return sum(segment.length for segment in self.readable)

    @property
    def writable_length(self) -> int:
        return sum(segment.length for segment in self.writable)


def is_valid_size(size: int) -> bool:
    """A power of two, not above ours."""
    return 0 < size <= MAXIMUM_SIZE and not size & (size - 1)


class Virtqueue:
    """The device's side. Addresses are guest-physical; `size`, addresses and `ready` are the guest's to set."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.reset()

    def reset(self) -> None:
        """As after power-on."""
        self.size = 0
        self.ready = False
        self.descriptors = self.available = self.used = 0
        self.next_available = self.next_used = 0

    def _view(self, address: int, length: int) -> memoryview:
        view = self._memory.view(address, length)
        if view is None:
            raise QueueError(f"{length} bytes at {address:#x} are not RAM")
        return view

    def _u16(self, address: int) -> int:
        return int.from_bytes(self._view(address, 2), "little")

    def _check(self) -> None:
        if not (self.ready and self.size_is_valid):
            raise QueueError("the queue is not ready")

    @property
    def size_is_valid(self) -> bool:
        return is_valid_size(self.size)

    @property
    def wants_interrupt(self) -> bool:
        """Whether the guest wants to hear of used buffers. :raise QueueError: the ring is not in RAM."""
        return not self._u16(self.available) & _NO_INTERRUPT

    def pop(self) -> Chain | None:
        """The next request; None where there is none. :raise QueueError:"""
        self._check()
        waiting = (self._u16(self.available + 2) - self.next_available) & 0xFFFF
        if waiting == 0:
            return None
        if waiting > self.size:
            raise QueueError(f"{waiting} requests in a ring of {self.size}")
        head = self._u16(self.available + 4 + 2 * (self.next_available % self.size))
        chain = self.chain(head)
        self.next_available = (self.next_available + 1) & 0xFFFF
        return chain

    def chain(self, head: int) -> Chain:
        """The request that begins with a descriptor. :raise QueueError:"""
        self._check()
        if head >= self.size:
            raise QueueError(f"descriptor {head} of {self.size}")
        table = self._view(self.descriptors, 16 * self.size)
        address, length, flags, _ = _DESCRIPTOR.unpack_from(table, 16 * head)
        if flags & _INDIRECT:
            if flags & _NEXT or length % 16 or not 0 < length // 16 <= 0x8000:
                raise QueueError("an indirect table of a wrong form")
            return self._walk(head, self._view(address, length), 0, length // 16, indirect=True)
        return self._walk(head, table, head, self.size, indirect=False)

    def _walk(self, head: int, table: memoryview, index: int, count: int, *, indirect: bool) -> Chain:
        readable: list[Segment] = []
        writable: list[Segment] = []
        for _ in range(min(count, 2 * MAXIMUM_SIZE)):
            address, length, flags, following = _DESCRIPTOR.unpack_from(table, 16 * index)
            if flags & _INDIRECT:
                raise QueueError("an indirect table inside a chain")
            if length == 0:
                raise QueueError("a segment without bytes")
            self._view(address, length)
            if flags & _WRITABLE:
                writable.append(Segment(address, length))
            elif writable:
                raise QueueError("a readable segment after a writable one")
            else:
                readable.append(Segment(address, length))
            if not flags & _NEXT:
                return Chain(head, tuple(readable), tuple(writable))
            if following >= count:
                raise QueueError(f"descriptor {following} of {count}")
            index = following
        raise QueueError("a chain longer than its table")

    def push(self, head: int, written: int) -> None:
        """Give a request back. :raise QueueError:"""
        self._check()
        at = self.used + 4 + 8 * (self.next_used % self.size)
        if not self._memory.write(at, _USED.pack(head, written)):
            raise QueueError("the used ring is not in RAM")
        self.next_used = (self.next_used + 1) & 0xFFFF
        if not self._memory.write(self.used + 2, self.next_used.to_bytes(2, "little")):
            raise QueueError("the used ring is not in RAM")

    def put(self, address: int, data: bytes) -> bool:
        """Write to RAM; False where there is none."""
        return self._memory.write(address, data)

    def gather(self, segments: tuple[Segment, ...]) -> bytes:
        """The bytes of segments, one after the other. :raise QueueError:"""
        return b"".join(self._view(segment.address, segment.length) for segment in segments)

    def scatter(self, segments: tuple[Segment, ...], data: memoryview) -> int:
        """Fill segments in order with `data`, which may be shorter; how much was written."""
        done = 0
        for segment in segments:
            part = data[done : done + segment.length]
            if not part:
                break
            if not self._memory.write(segment.address, part):
                raise QueueError("a segment is not in RAM")
            done += len(part)
        return done
