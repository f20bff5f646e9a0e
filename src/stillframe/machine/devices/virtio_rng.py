"""The virtio entropy device (virtio 1.2, section 5.4).

Its bytes are the host's; with `icount` they come from a counter, so that every run of a guest sees the same ones.
"""

import hashlib
import os
from collections.abc import Callable

from stillframe.machine.devices.virtio_mmio import TRANSPORT_FIELDS, VirtioDevice
from stillframe.machine.memory import GuestMemory
from stillframe.vmstate.fields import Description, Field, Values

_MAXIMUM = 64 << 10


class VirtioRng(VirtioDevice):
    """:param deterministic: the same bytes in every run."""

    device_type = 4
    section_name = "virtio-rng"
    description = Description("virtio-rng", version=1, fields=(*TRANSPORT_FIELDS, Field("drawn", "uint64")))

    def __init__(self, memory: GuestMemory, line: Callable[[bool], None], *, deterministic: bool) -> None:
        super().__init__(memory, line)
        self._deterministic = deterministic
        self._drawn = 0

    def _draw(self, length: int) -> bytes:
        if not self._deterministic:
            return os.urandom(length)
        self._drawn += 1
        return hashlib.shake_128(self._drawn.to_bytes(8, "little")).digest(length)

    def notified(self) -> None:
        while (chain := self.queue.pop()) is not None:
            data = self._draw(min(chain.writable_length, _MAXIMUM))
            self.give_back(chain.head, self.queue.scatter(chain.writable, memoryview(data)))

    def save_state(self) -> Values:
        return {**self.transport_state(), "drawn": self._drawn}

    def check_state(self, values: Values) -> None:
        super().check_state(values)
        self.integer(values, "drawn")

    def load_state(self, values: Values) -> None:
        super().load_state(values)
        self._drawn = self.integer(values, "drawn")
