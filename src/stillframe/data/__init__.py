"""Files that come with stillframe: the bundled guest, and one that waits."""

from pathlib import Path


def bundled_guest() -> Path:
    """The guest's ELF, to be started as a kernel; its source is the folder `guest/` of the repository."""
    return Path(__file__).with_name("guest.elf")


def idle_firmware() -> Path:
    """Firmware that waits for ever (`1: wfi; j 1b`): what a machine runs that is given nothing to run."""
    return Path(__file__).with_name("idle.bin")
