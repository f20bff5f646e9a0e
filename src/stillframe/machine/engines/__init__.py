"""How instructions are run. A machine knows its processor through the `Engine` protocol only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from stillframe.machine.devices import Device
from stillframe.machine.memory import GuestMemory


class Exit(Enum):
    """Why `run_until` came back."""

    BUDGET = auto()
    """The count or the deadline was reached, or `kick` asked for a boundary."""
    IDLE = auto()
    """The guest waits for an interrupt and none is pending."""
    LEAVE = auto()
    """A device or the firmware called `leave`."""


@dataclass(frozen=True, slots=True)
class MmioRegion:
    """A range of guest-physical addresses that a device answers for.

    `read(offset, size)` and `write(offset, size, value)` get sizes of 1, 2, 4 and 8 and run inside the guest's access.
    """

    base: int
    size: int
    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]


EnvironmentCall = Callable[[Sequence[int]], tuple[int, int | None]]
"""Firmware: a0 to a7 of the call; a0 and a1 of the answer, or None where a1 keeps its value."""


class Engine(Protocol):
    """One processor. All calls but `kick` come from the thread that owns the machine."""

    name: str
    has_processor: bool

    @property
    def devices(self) -> tuple[Device, ...]:
        """What of the processor is machine state; empty without one."""
        ...

    def attach(self, memory: GuestMemory, regions: tuple[MmioRegion, ...]) -> None:
        """Give it its address space; once, before anything else."""
        ...

    def run_until(self, *, count: int | None, deadline_ns: int | None) -> Exit:
        """Run instructions; come back at an instruction boundary.

        :param count: so many instructions, and as many more as complete a straight run of them; None: no bound.
        :param deadline_ns: of the virtual clock; checked between slices, so it is passed by at most one slice. None: no deadline.
        """
        ...

    def executed(self) -> int:
        """Instructions that the last `run_until` executed, exactly; only with `icount`."""
        ...

    def kick(self) -> None:
        """Make a running `run_until` come back soon (within a slice). From any thread, never blocks."""
        ...

    def leave(self) -> None:
        """From inside the guest's access: end `run_until` right after it."""
        ...

    def set_interrupt(self, line: int, *, raised: bool) -> None:
        """Drive a line of the processor: 1 software, 5 timer, 9 external (bits of `mip`)."""
        ...

    def interrupt_ready(self) -> bool:
        """Whether an idle processor would wake: something pending is enabled."""
        ...

    def reset(self, entry: int, arguments: tuple[int, ...]) -> None:
        """Begin at `entry` in S mode with a0, a1... set; nothing of the former state is left."""
        ...

    def close(self) -> None:
        """Give its resources back."""
        ...
