"""The generation id: 16 bytes that change when a state is loaded, so that a guest knows that it has a twin.

The guest finds it as "microsoft,vmgenid" in its device tree (Linux reads it since 6.10, and seeds its random numbers anew when the
interrupt comes). The region's first 16 bytes are the id.
"""

import uuid
from collections.abc import Callable

from stillframe.machine.devices import Device
from stillframe.vmstate.fields import Description, Field, Values

REGION_SIZE = 0x1000
_LENGTH = 16


class VmGenerationId(Device):
    """:param pulse: its interrupt, an edge. :param deterministic: begin with zeroes, as `icount` needs."""

    section_name = "vmgenid"
    description = Description("vmgenid", version=1, fields=(Field("guid", "buffer", count=_LENGTH),))

    def __init__(self, pulse: Callable[[], None], *, deterministic: bool) -> None:
        self._pulse = pulse
        self.guid = bytes(_LENGTH) if deterministic else uuid.uuid4().bytes

    def new_generation_id(self) -> None:
        """Another id, and the interrupt that tells of it."""
        self.guid = uuid.uuid4().bytes
        self._pulse()

    def read(self, offset: int, size: int) -> int:
        """The guest reads the region."""
        return int.from_bytes(self.guid[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """It is not the guest's to write."""

    def save_state(self) -> Values:
        return {"guid": self.guid}

    def check_state(self, values: Values) -> None:
        self.buffer(values, "guid", _LENGTH)

    def load_state(self, values: Values) -> None:
        self.guid = self.buffer(values, "guid", _LENGTH)
