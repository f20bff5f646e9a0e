"""The guest's console on the terminal that `stillframe run` was started at.

The terminal is raw: every key goes to the guest, Ctrl-C too. Ctrl-A is ours: `Ctrl-A x` ends the machine, `Ctrl-A h` shows the
keys, `Ctrl-A Ctrl-A` is one Ctrl-A for the guest. Its former settings come back at the end.
"""

import os
import sys
import termios
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stillframe.machine.console import StdioConsole

_ESCAPE = 0x01
_HELP = b"\r\nCtrl-A x  end the machine\r\nCtrl-A h  these lines\r\nCtrl-A Ctrl-A  a Ctrl-A for the guest\r\n"


class TerminalConsole(StdioConsole):
    """Standard input and output, with Ctrl-A as the escape. :param end: called for `Ctrl-A x`."""

    def __init__(self, end: Callable[[], None]) -> None:
        self._end = end
        self._escaped = False
        super().__init__()

    def feed(self, data: bytes) -> None:
        """As of the base, without what is meant for us."""
        passed = bytearray()
        for byte in data:
            if self._escaped:
                self._escaped = False
                if byte == ord("x"):
                    self._end()
                elif byte == ord("h"):
                    self.write(_HELP)
                elif byte == _ESCAPE:
                    passed.append(byte)
            elif byte == _ESCAPE:
                self._escaped = True
            else:
                passed.append(byte)
        if passed:
            super().feed(bytes(passed))


@contextmanager
def raw_terminal() -> Iterator[None]:
    """Raw mode on standard input while the block lasts; does nothing where that is no terminal."""
    fd = sys.stdin.fileno()
    if not os.isatty(fd):
        yield
        return
    former = termios.tcgetattr(fd)
    try:
        tty.setraw(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, former)
