"""A QEMU process: started in a private directory, where it listens for us and finds our exports.

    DIRECTORY/             0700, one a process
      qmp                  its monitor: QEMU listens
      serial               the first serial port, if it is ours: QEMU listens
      agent                the guest agent's port, where there is one: QEMU listens
      errors               what it prints

What becomes of it when we are gone, and who takes it over, is in adopt.py.
"""

import contextlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from stillframe.errors import PeerError, Refused
from stillframe.events import Event
from stillframe.machine.engines.qemu.monitor import QemuMonitor
from stillframe.machine.engines.qemu.running import Running
from stillframe.sockets import connected_unix_socket

START_SECONDS: Final = 60.0
"""Until its monitor must listen; a busy host needs a third of one."""

AGENT_PORT: Final = "org.qemu.guest_agent.0"

_POLL_SECONDS: Final = 0.002
_ERRORS_SHOWN: Final = 2000


class QemuProcess:
    """One process, with its monitor.

    :param running: started with `socket_words` of that directory.
    :param directory: its own; made by the caller, removed with `remove_files`.
    :param on_event: :param on_end: as `QemuMonitor`.
    :raise Refused: QEMU ended at once, in its words. :raise PeerError: it does not answer; it lives.
    """

    def __init__(
        self,
        running: Running,
        directory: Path,
        on_event: Callable[[Event], None],
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self.directory = directory
        self._process = running
        self._words_taken = 0
        self.monitor = self._connect(on_event, on_end)

    def _connect(self, on_event: Callable[[Event], None], on_end: Callable[[], None]) -> QemuMonitor:
        """Ends with the monitor's greeting, with QEMU's death, or with its time."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            if (self.directory / "qmp").exists():
                # It may end at any time: the reason is in what it prints.
                with contextlib.suppress(PeerError):
                    return QemuMonitor(
                        connected_unix_socket(self.directory / "qmp"), on_event, on_end, deadline
                    )
            if self.wait(_POLL_SECONDS):
                raise Refused(self.last_words or f"QEMU ended at once, with {self.exit_text}")
            if time.monotonic() > deadline:
                raise PeerError(f"QEMU has not opened its monitor in {START_SECONDS:g} seconds")

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def last_words(self) -> str:
        """The end of what it printed and nobody took, as one line; empty if it said nothing."""
        try:
            data = (self.directory / "errors").read_bytes()[self._words_taken :][-_ERRORS_SHOWN:]
        except OSError:
            return ""
        lines = [line.strip() for line in data.decode("utf-8", "replace").splitlines() if line.strip()]
        return "; ".join(lines[-5:])

    def take_last_words(self) -> str:
        """`last_words`, once."""
        words = self.last_words
        with contextlib.suppress(OSError):
            self._words_taken = (self.directory / "errors").stat().st_size
        return words

    @property
    def exit_text(self) -> str:
        """How it ended, in words."""
        return self._process.exit_text

    @property
    def exit_status(self) -> int | None:
        """None while it lives, and where it is not known; negative for a signal."""
        return self._process.status

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has ended within that time."""
        return self._process.wait(seconds)

    def end(self) -> None:
        """It does nothing more from here on; its memory is still being given back, which takes time: `kill` waits for that."""
        self._process.end()

    def kill(self) -> None:
        """End it at once, and wait for that; the files of it stay. A second time, nothing."""
        self._process.kill()
        self.monitor.close()

    def remove_files(self) -> None:
        """Take away its directory; it must have ended."""
        shutil.rmtree(self.directory, ignore_errors=True)


def socket_words(directory: Path, *, serial: bool, agent: bool) -> list[str]:
    """QEMU's options for the sockets that it is to listen at. :param serial: whether the first serial port is ours.

    :param agent: whether the guest gets a port for its agent.
    """

    def chardev(name: str) -> str:
        path = str(directory / name).replace(",", ",,")
        return f"socket,id=stillframe-{name},path={path},server=on,wait=off"

    words = ["-chardev", chardev("qmp"), "-mon", "chardev=stillframe-qmp,mode=control"]
    if serial:
        words += ["-chardev", chardev("serial"), "-serial", "chardev:stillframe-serial"]
    if agent:
        words += ["-chardev", chardev("agent"), "-device", "virtio-serial,id=stillframe-agent-bus", "-device"]
        words += [f"virtserialport,bus=stillframe-agent-bus.0,chardev=stillframe-agent,name={AGENT_PORT}"]
    return words
