"""The virtio transport over memory-mapped registers, version 2 (virtio 1.2, section 4.2), with one queue.

An empty slot answers with device id 0, so that the guest's driver leaves it alone. Its section holds what the transport knows;
devices add their own fields to it.
"""

from abc import abstractmethod
from collections.abc import Callable

from stillframe.machine.devices import Device
from stillframe.machine.devices.virtqueue import MAXIMUM_SIZE, QueueError, Virtqueue, is_valid_size
from stillframe.machine.memory import GuestMemory
from stillframe.vmstate.fields import Field, Value, Values

REGION_SIZE = 0x1000

_MAGIC, _VERSION, _VENDOR = 0x74726976, 2, 0x554D4551
_NEEDS_RESET, _DRIVER_OK = 0x40, 4
_USED_BUFFER, _CONFIG_CHANGED = 1, 2
_CONFIG = 0x100
_F_INDIRECT, _F_VERSION_1 = 1 << 28, 1 << 32
_ADDRESSES = {0x80: "descriptors", 0x90: "available", 0xA0: "used"}

TRANSPORT_FIELDS = (
    Field("status", "uint8"),
    Field("interrupt_status", "uint8"),
    Field("device_features_sel", "uint32"),
    Field("driver_features_sel", "uint32"),
    Field("driver_features", "uint64"),
    Field("queue_sel", "uint32"),
    Field("queue_size", "uint16"),
    Field("queue_ready", "bool"),
    Field("queue_desc", "uint64"),
    Field("queue_avail", "uint64"),
    Field("queue_used", "uint64"),
    Field("last_avail_idx", "uint16"),
    Field("used_idx", "uint16"),
)
"""What every virtio device's section begins with."""


def empty_slot_read(offset: int, size: int) -> int:
    """The registers of a slot without a device."""
    return {0: _MAGIC, 4: _VERSION, 0xC: _VENDOR}.get(offset, 0)


def empty_slot_write(offset: int, size: int, value: int) -> None:
    """Nobody is there."""


class VirtioDevice(Device):
    """The registers, and what a device behind them has to fill in.

    :param line: its interrupt line.
    """

    device_type: int
    features: int = 0

    def __init__(self, memory: GuestMemory, line: Callable[[bool], None]) -> None:
        self.queue = Virtqueue(memory)
        self._line = line
        self._clear()

    @abstractmethod
    def notified(self) -> None:
        """The guest has put requests into the queue. :raise QueueError:"""

    def config(self) -> bytes:
        """The device's configuration space."""
        return b""

    def cancel(self) -> None:
        """The guest resets the device: forget requests that it knows of."""

    def _clear(self) -> None:
        self._status = self._interrupt_status = 0
        self._device_features_sel = self._driver_features_sel = self._queue_sel = 0
        self._driver_features = 0
        self.queue.reset()

    def reset(self) -> None:
        self.cancel()
        self._clear()
        self._line(False)

    @property
    def broken(self) -> bool:
        """The guest's queue was not one; until it resets the device, nothing more happens."""
        return bool(self._status & _NEEDS_RESET)

    def _offered(self) -> int:
        return self.features | _F_VERSION_1 | _F_INDIRECT

    def _interrupt(self, cause: int) -> None:
        self._interrupt_status |= cause
        self._line(True)

    def _break(self) -> None:
        self._status |= _NEEDS_RESET
        if self._status & _DRIVER_OK:
            self._interrupt(_CONFIG_CHANGED)

    def serve(self) -> None:
        """Look at the queue, and survive what is found there."""
        if self.broken or not self.queue.ready:
            return
        try:
            self.notified()
        except QueueError:
            self._break()

    def give_back(self, head: int, written: int) -> None:
        """A request is done; the guest hears of it, unless it broke its queue meanwhile."""
        if self.broken:
            return
        try:
            self.queue.push(head, written)
            if self.queue.wants_interrupt:
                self._interrupt(_USED_BUFFER)
        except QueueError:
            self._break()

    def config_changed(self) -> None:
        """Tell the guest to read the configuration space again."""
        self._interrupt(_CONFIG_CHANGED)

    def read(self, offset: int, size: int) -> int:
        """The guest reads a register."""
        if offset >= _CONFIG:
            return int.from_bytes(self.config()[offset - _CONFIG :][:size], "little")
        first = self._queue_sel == 0
        if offset == 0x10:
            return self._offered() >> 32 * self._device_features_sel & 0xFFFF_FFFF
        return {
            0x00: _MAGIC,
            0x04: _VERSION,
            0x08: self.device_type,
            0x0C: _VENDOR,
            0x34: MAXIMUM_SIZE if first else 0,
            0x44: int(self.queue.ready and first),
            0x60: self._interrupt_status,
            0x70: self._status,
        }.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes a register."""
        value &= 0xFFFF_FFFF
        if offset == 0x14:
            self._device_features_sel = min(value, 2)
        elif offset == 0x20:
            self._select_features(value)
        elif offset == 0x24:
            self._driver_features_sel = min(value, 2)
        elif offset == 0x30:
            self._queue_sel = value
        elif offset == 0x50:
            self.serve()
        elif offset == 0x64:
            self._interrupt_status &= ~value
            self._line(bool(self._interrupt_status))
        elif offset == 0x70:
            if value == 0:
                self.reset()
            else:
                self._set_status(value & 0xFF)
        elif self._queue_sel == 0:
            self._write_queue(offset, value)

    def _select_features(self, value: int) -> None:
        shift = 32 * self._driver_features_sel
        if shift < 64:
            kept = self._driver_features & ~(0xFFFF_FFFF << shift)
            self._driver_features = kept | (value << shift & self._offered())

    def _set_status(self, value: int) -> None:
        self._status = value | self._status & _NEEDS_RESET
        if value & 8 and not self._driver_features & _F_VERSION_1:
            self._status &= ~8

    def _write_queue(self, offset: int, value: int) -> None:
        """A queue that is ready keeps its size and place, so that both are those which were checked."""
        queue = self.queue
        if offset == 0x44:
            queue.ready = bool(value & 1) and queue.size_is_valid
            if value & 1 and not queue.ready:
                self._break()
        elif queue.ready:
            return
        elif offset == 0x38:
            queue.size = value & 0xFFFF
        elif offset & ~4 in _ADDRESSES:
            name, shift = _ADDRESSES[offset & ~4], 32 if offset & 4 else 0
            former = getattr(queue, name) & ~(0xFFFF_FFFF << shift)
            setattr(queue, name, former | value << shift)

    def transport_state(self) -> dict[str, Value]:
        """The values of `TRANSPORT_FIELDS`."""
        queue = self.queue
        return {
            "status": self._status,
            "interrupt_status": self._interrupt_status,
            "device_features_sel": self._device_features_sel,
            "driver_features_sel": self._driver_features_sel,
            "driver_features": self._driver_features,
            "queue_sel": self._queue_sel,
            "queue_size": queue.size,
            "queue_ready": queue.ready,
            "queue_desc": queue.descriptors,
            "queue_avail": queue.available,
            "queue_used": queue.used,
            "last_avail_idx": queue.next_available,
            "used_idx": queue.next_used,
        }

    def check_state(self, values: Values) -> None:
        for field in TRANSPORT_FIELDS:
            self.integer(values, field.name)
        if self.integer(values, "driver_features") & ~self._offered():
            raise self.refuse("driver_features", "has features that this device does not offer")
        size = self.integer(values, "queue_size")
        if self.integer(values, "queue_ready") and not is_valid_size(size):
            raise self.refuse("queue_size", f"is {size}, not a power of two up to {MAXIMUM_SIZE}")

    def load_state(self, values: Values) -> None:
        number = {field.name: self.integer(values, field.name) for field in TRANSPORT_FIELDS}
        self._status, self._interrupt_status = number["status"], number["interrupt_status"]
        self._device_features_sel = min(number["device_features_sel"], 2)
        self._driver_features_sel = min(number["driver_features_sel"], 2)
        self._driver_features, self._queue_sel = number["driver_features"], number["queue_sel"]
        queue = self.queue
        queue.size, queue.ready = number["queue_size"], bool(number["queue_ready"])
        queue.descriptors, queue.available, queue.used = (
            number["queue_desc"],
            number["queue_avail"],
            number["queue_used"],
        )
        queue.next_available, queue.next_used = number["last_avail_idx"], number["used_idx"]
        self._line(bool(self._interrupt_status))
