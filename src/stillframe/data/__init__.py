"""Files that come with stillframe: the bundled guest."""

from pathlib import Path


def bundled_guest() -> Path:
    """The guest's ELF, to be started as a kernel; its source is the folder `guest/` of the repository."""
    return Path(__file__).with_name("guest.elf")
