"""The real-time clock: Google's goldfish RTC, nanoseconds since the epoch in two words.

    0x00 TIME_LOW (latches the high word)   0x04 TIME_HIGH    0x08 ALARM_LOW (sets the alarm)   0x0c ALARM_HIGH
    0x10 IRQ_ENABLED   0x14 CLEAR_ALARM     0x18 ALARM_STATUS   0x1c CLEAR_INTERRUPT

It shows the host's wall clock, after a load too: the wall clock is not machine state, only what the guest has set it apart by.
With `icount` it starts at a fixed instant and follows the virtual clock.
"""

import time
from collections.abc import Callable

from stillframe.machine.clock import VirtualClock
from stillframe.machine.devices import Device
from stillframe.vmstate.fields import Description, Field, Values

REGION_SIZE = 0x1000

_EPOCH_NS = 1_577_836_800 * 10**9
"""2020-01-01T00:00:00Z."""


class Rtc(Device):
    """:param line: its interrupt line."""

    section_name = "rtc"
    description = Description(
        "goldfish-rtc",
        version=1,
        fields=(
            Field("offset_ns", "int64"),
            Field("alarm", "uint64"),
            Field("alarm_set", "bool"),
            Field("irq_enabled", "bool"),
            Field("irq_pending", "bool"),
            Field("latched_high", "uint32"),
        ),
    )

    def __init__(self, line: Callable[[bool], None], clock: VirtualClock) -> None:
        self._line = line
        self._clock = clock
        self._timer = clock.timer(self._ring)
        self._offset_ns = 0
        self._clear()

    def _clear(self) -> None:
        self._alarm = self._high = 0
        self._set = self._enabled = self._pending = False
        self._timer.deadline_ns = None

    def reset(self) -> None:
        self._clear()
        self._line(False)

    @property
    def _now_ns(self) -> int:
        wall = time.time_ns() if self._clock.icount_shift is None else _EPOCH_NS + self._clock.ns
        return (wall + self._offset_ns) & 0xFFFF_FFFF_FFFF_FFFF

    def _ring(self) -> None:
        self._set = False
        self._pending = True
        self._update()

    def _update(self) -> None:
        self._line(self._pending and self._enabled)

    def _arm(self) -> None:
        """The alarm is wall time; its timer is guest time that passes as fast while the guest runs."""
        remaining = self._alarm - self._now_ns
        if not self._set:
            self._timer.deadline_ns = None
        elif remaining <= 0:
            self._ring()
        else:
            self._timer.deadline_ns = self._clock.ns + remaining

    def resumed(self) -> None:
        self._arm()

    def read(self, offset: int, size: int) -> int:
        """The guest reads a register."""
        if offset == 0x00:
            now = self._now_ns
            self._high = now >> 32
            return now & 0xFFFF_FFFF
        if offset == 0x08:
            return self._alarm & 0xFFFF_FFFF
        return {
            0x04: self._high,
            0x0C: self._alarm >> 32,
            0x10: int(self._enabled),
            0x18: int(self._set),
        }.get(offset, 0)

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes a register."""
        value &= 0xFFFF_FFFF
        if offset in (0x00, 0x04):
            now = self._now_ns
            wanted = now & ~0xFFFF_FFFF | value if offset == 0x00 else now & 0xFFFF_FFFF | value << 32
            self._offset_ns += wanted - now
            self._arm()
        elif offset == 0x08:
            self._alarm = self._alarm & ~0xFFFF_FFFF | value
            self._set = True
            self._arm()
        elif offset == 0x0C:
            self._alarm = self._alarm & 0xFFFF_FFFF | value << 32
        elif offset == 0x10:
            self._enabled = bool(value & 1)
        elif offset == 0x14:
            self._set = False
            self._arm()
        elif offset == 0x1C:
            self._pending = False
        self._update()

    def save_state(self) -> Values:
        return {
            "offset_ns": self._offset_ns,
            "alarm": self._alarm,
            "alarm_set": self._set,
            "irq_enabled": self._enabled,
            "irq_pending": self._pending,
            "latched_high": self._high,
        }

    def check_state(self, values: Values) -> None:
        self.integer(values, "offset_ns", minimum=-(1 << 63), maximum=(1 << 63) - 1)
        self.integer(values, "alarm")
        for name in ("alarm_set", "irq_enabled", "irq_pending"):
            self.integer(values, name, maximum=1)
        self.integer(values, "latched_high", maximum=0xFFFF_FFFF)

    def load_state(self, values: Values) -> None:
        self._offset_ns = self.integer(values, "offset_ns", minimum=-(1 << 63))
        self._alarm = self.integer(values, "alarm")
        self._set, self._enabled, self._pending = (
            bool(self.integer(values, name)) for name in ("alarm_set", "irq_enabled", "irq_pending")
        )
        self._high = self.integer(values, "latched_high")
        self._timer.deadline_ns = None
        self._update()
