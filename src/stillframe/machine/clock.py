"""The virtual clock: guest time that stands still while the machine does, and the timers on it.

With the host's clock it runs as fast as the wall's; with `icount` it is derived from the number of instructions executed, so
that two runs see the same times. Either way a save records its value and a load goes on from there: the guest's monotonic
clock never jumps over the pause. The wall clock is not part of the machine state: after a load the guest's CLOCK_REALTIME
is as late as the snapshot is old, until the guest reads its RTC again (as on QEMU).
"""

import time
from collections.abc import Callable

from stillframe.machine.devices import Device
from stillframe.vmstate.fields import Description, Field, Values

_MAXIMUM_NS = (1 << 63) - 1


class Timer:
    """Calls `expired` at a boundary, on the vCPU's thread, once the clock has reached `deadline_ns`; None: not set."""

    def __init__(self, expired: Callable[[], None]) -> None:
        self.expired = expired
        self.deadline_ns: int | None = None


class VirtualClock(Device):
    """Nanoseconds of guest time, saved as QEMU's section `timer`.

    :param icount_shift: None for the host's clock; else an instruction takes `2**icount_shift` nanoseconds.
    """

    section_name = "timer"
    description = Description(
        "timer",
        version=2,
        minimum_version=2,
        fields=(
            Field("cpu_ticks_offset", "int64"),
            Field("unused", "buffer", count=8),
            Field("cpu_clock_offset", "int64"),
        ),
    )

    def __init__(self, *, icount_shift: int | None = None) -> None:
        self.icount_shift = icount_shift
        self.instructions = 0
        """Executed so far, counted exactly with `icount` alone."""
        self.running: Callable[[], int] = lambda: 0
        """Set by the engine with `icount`: instructions executed since `instructions` was last brought up to date."""
        self._base_ns = 0
        self._started_ns: int | None = None
        self._timers: list[Timer] = []

    @property
    def ns(self) -> int:
        """Nanoseconds since the machine was first started, pauses not counted."""
        if self.icount_shift is not None:
            return self._base_ns + (self.instructions + self.running() << self.icount_shift)
        if self._started_ns is None:
            return self._base_ns
        return self._base_ns + time.monotonic_ns() - self._started_ns

    def start(self) -> None:
        """Let time go on."""
        if self._started_ns is None:
            self._started_ns = time.monotonic_ns()

    def stop(self) -> None:
        """Hold time."""
        if self.icount_shift is None:
            self._base_ns = self.ns
        self._started_ns = None

    def advance_to(self, ns: int) -> None:
        """With `icount`: the time of an idle guest jumps to its next deadline."""
        if self.icount_shift is not None:
            self._base_ns += max(0, ns - self.ns)

    def timer(self, expired: Callable[[], None]) -> Timer:
        """A new timer, not set."""
        timer = Timer(expired)
        self._timers.append(timer)
        return timer

    @property
    def next_deadline_ns(self) -> int | None:
        """The earliest of all timers."""
        return min((t.deadline_ns for t in self._timers if t.deadline_ns is not None), default=None)

    def run_timers(self) -> None:
        """Call every timer whose deadline has come, earliest first."""
        now = self.ns
        due = [
            (timer.deadline_ns, timer)
            for timer in self._timers
            if timer.deadline_ns is not None and timer.deadline_ns <= now
        ]
        for _, timer in sorted(due, key=lambda pair: pair[0]):
            timer.deadline_ns = None
            timer.expired()

    def save_state(self) -> Values:
        return {"cpu_ticks_offset": self.instructions, "unused": bytes(8), "cpu_clock_offset": self.ns}

    def check_state(self, values: Values) -> None:
        self.integer(values, "cpu_ticks_offset", minimum=-_MAXIMUM_NS - 1, maximum=_MAXIMUM_NS)
        self.integer(values, "cpu_clock_offset", maximum=_MAXIMUM_NS)

    def load_state(self, values: Values) -> None:
        running = self._started_ns is not None
        self.stop()
        now = self.integer(values, "cpu_clock_offset", maximum=_MAXIMUM_NS)
        if self.icount_shift is None:
            self._base_ns = now
        else:
            ticks = self.integer(values, "cpu_ticks_offset", minimum=-_MAXIMUM_NS - 1, maximum=_MAXIMUM_NS)
            self.instructions = max(0, ticks)
            self._base_ns = now - (self.instructions << self.icount_shift)
        if running:
            self.start()
