"""The board `none`: no memory, no devices, as QEMU's `-machine none`."""

from stillframe.machine.machine import Board


def none_board() -> Board:
    """A board with nothing on it."""
    return Board("none")
