"""The engine `none`: no processor. For work on disks and snapshots, as QEMU's `-machine none`."""

from stillframe.machine.devices import Device
from stillframe.machine.engines import Exit, MmioRegion
from stillframe.machine.memory import GuestMemory


class NoEngine:
    """Runs nothing."""

    name = "none"
    has_processor = False

    @property
    def devices(self) -> tuple[Device, ...]:
        return ()

    def attach(self, memory: GuestMemory, regions: tuple[MmioRegion, ...]) -> None:
        """Nothing executes here, so nothing is mapped."""

    def run_until(self, *, count: int | None, deadline_ns: int | None) -> Exit:
        return Exit.IDLE

    def executed(self) -> int:
        return 0

    def kick(self) -> None:
        """Nothing runs."""

    def leave(self) -> None:
        """Nothing runs."""

    def set_interrupt(self, line: int, *, raised: bool) -> None:
        """Nobody listens."""

    def interrupt_ready(self) -> bool:
        return False

    def reset(self, entry: int, arguments: tuple[int, ...]) -> None:
        """There is nothing to begin."""

    def close(self) -> None:
        """It holds nothing."""
