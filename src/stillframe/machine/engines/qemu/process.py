"""A QEMU process: started in a private directory, where it listens for us and finds our exports.

    DIRECTORY/             0700, one a process
      qmp                  its monitor: QEMU listens
      serial               the first serial port, if it is ours: QEMU listens
      agent                the guest agent's port, where there is one: QEMU listens
      errors               what it prints

It is a session of its own and does not end with us: what we do when we are gone, and another takes over, is in adopt.py.
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from stillframe.errors import IOFailed, NotFound, PeerError, Refused
from stillframe.events import Event
from stillframe.machine.engines.qemu.monitor import QemuMonitor
from stillframe.sockets import connected_unix_socket

START_SECONDS: Final = 60.0
"""Until its monitor must listen; a busy host needs a third of one."""

AGENT_PORT: Final = "org.qemu.guest_agent.0"

_POLL_SECONDS: Final = 0.002
_ERRORS_SHOWN: Final = 2000


class QemuProcess:
    """One process, with its monitor.

    :param words: the program and its arguments, without those of its sockets.
    :param directory: its own; made by the caller, removed with `remove_files`.
    :param on_event: :param on_end: as `QemuMonitor`.
    :raise NotFound: there is no such program. :raise Refused: QEMU ended at once, in its words.
    """

    def __init__(
        self,
        words: Sequence[str],
        directory: Path,
        on_event: Callable[[Event], None],
        on_end: Callable[[], None] = lambda: None,
        *,
        serial: bool = False,
        agent: bool = False,
    ) -> None:
        self.directory = directory
        self._serial = serial
        self._agent = agent
        self._words_taken = 0
        argv = [*words, *self._socket_words()]
        try:
            with (directory / "errors").open("wb") as errors:
                self._process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except FileNotFoundError as error:
            raise NotFound(
                f"There is no program '{words[0]}'",
                remedy="Install QEMU (apt-get install qemu-system-x86), or name it: --qemu PROGRAM.",
            ) from error
        except OSError as error:
            raise IOFailed(
                f"Could not start '{words[0]}': {error.strerror}", errno=error.errno or 0
            ) from error
        try:
            self.monitor = self._connect(on_event, on_end)
        except BaseException:
            self.kill()
            raise

    def _socket_words(self) -> list[str]:
        words = [
            "-chardev",
            f"socket,id=stillframe-qmp,path={self._escaped('qmp')},server=on,wait=off",
            "-mon",
            "chardev=stillframe-qmp,mode=control",
        ]
        if self._serial:
            words += [
                "-chardev",
                f"socket,id=stillframe-serial,path={self._escaped('serial')},server=on,wait=off",
                "-serial",
                "chardev:stillframe-serial",
            ]
        if self._agent:
            words += [
                "-chardev",
                f"socket,id=stillframe-agent,path={self._escaped('agent')},server=on,wait=off",
                "-device",
                "virtio-serial,id=stillframe-agent-bus",
                "-device",
                f"virtserialport,bus=stillframe-agent-bus.0,chardev=stillframe-agent,name={AGENT_PORT}",
            ]
        return words

    def _escaped(self, name: str) -> str:
        return str(self.directory / name).replace(",", ",,")

    def _connect(self, on_event: Callable[[Event], None], on_end: Callable[[], None]) -> QemuMonitor:
        """Ends with the monitor's greeting, with QEMU's death, or with its time."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            if (self.directory / "qmp").exists():
                # It may end at any time: the reason is in what it prints.
                with contextlib.suppress(PeerError):
                    return QemuMonitor(connected_unix_socket(self.directory / "qmp"), on_event, on_end)
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
        """How it ended, in words; "nothing" while it lives."""
        code = self._process.poll()
        if code is None:
            return "nothing"
        if code < 0:
            return f"signal {signal.Signals(-code).name}"
        return f"status {code}"

    @property
    def exit_status(self) -> int | None:
        """None while it lives; negative for a signal."""
        return self._process.poll()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it has ended within that time."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        """End it at once, and wait for that; the files of it stay. A second time, nothing."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGKILL) if self._process.poll() is None else None
        self._process.wait()
        if hasattr(self, "monitor"):
            self.monitor.close()

    def remove_files(self) -> None:
        """Take away its directory; it must have ended."""
        for name in ("qmp", "serial", "agent", "errors", "migration"):
            (self.directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()
