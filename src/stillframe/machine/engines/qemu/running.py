"""QEMU's process as the host sees it: one that we have started, or one that a stillframe before us had.

A process number is used again when its process has ended, so a process that was not started here is known by number and start, and
held by a descriptor.
"""

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Final, Protocol

from stillframe.errors import IOFailed, NotFound
from stillframe.machine.libc import LIBC

_PR_SET_PDEATHSIG: Final = 1
_START_FIELD: Final = 19
"""In /proc/PID/stat, of those behind the program's name."""


class Running(Protocol):
    """A process. :ivar pid: its number."""

    pid: int

    def wait(self, seconds: float | None) -> bool:
        """Whether it has ended within that time."""
        ...

    def end(self) -> None:
        """Have it do nothing more; that it has ended is not waited for."""
        ...

    def kill(self) -> None:
        """`end`, and wait for it."""
        ...

    @property
    def status(self) -> int | None:
        """How it ended, negative for a signal; None while it lives, and where only its parent could know."""
        ...

    @property
    def exit_text(self) -> str:
        """How it ended, in words."""
        ...


class Started:
    """A child of ours, in a session of its own. It says what it has to say in a file.

    :param errors: the file. :param ends_with_us: the kernel ends it when we end, however that is.
    :raise NotFound: there is no such program. :raise IOFailed: it cannot be started.
    """

    def __init__(self, words: Sequence[str], errors: Path, *, ends_with_us: bool) -> None:
        parent = os.getpid()

        def end_with_parent() -> None:
            LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
            if os.getppid() != parent:
                os._exit(1)

        def start() -> "subprocess.Popen[bytes]":
            with errors.open("wb") as file:
                return subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=end_with_parent if ends_with_us else None,
                )

        try:
            # To the kernel the parent is the thread that starts it: one that lives as long as we do.
            self._process = _starter().submit(start).result()
        except FileNotFoundError as error:
            raise NotFound(
                f"There is no program '{words[0]}'",
                remedy="Install QEMU (apt-get install qemu-system-x86), or name it: --qemu PROGRAM.",
            ) from error
        except OSError as error:
            raise IOFailed(
                f"Could not start '{words[0]}': {error.strerror}", errno=error.errno or 0
            ) from error
        self.pid = self._process.pid

    def wait(self, seconds: float | None) -> bool:
        """See `Running`."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self) -> None:
        """See `Running`."""
        if self._process.poll() is None:
            self._process.kill()

    def kill(self) -> None:
        """See `Running`."""
        self.end()
        self._process.wait()

    @property
    def status(self) -> int | None:
        """See `Running`."""
        return self._process.poll()

    @property
    def exit_text(self) -> str:
        """See `Running`."""
        code = self.status
        if code is None:
            return "nothing"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"status {code}"


class Found:
    """Somebody else's child. Made by `open`."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._descriptor = descriptor

    @classmethod
    def open(cls, pid: int, started: int) -> "Found | None":
        """The process of that number that was started then; None if it has ended."""
        try:
            descriptor = os.pidfd_open(pid)
        except (OSError, OverflowError, ValueError):
            return None
        found = cls(pid, descriptor)
        if started_at(pid) != started or found.wait(0):
            os.close(descriptor)
            return None
        return found

    def wait(self, seconds: float | None) -> bool:
        """See `Running`."""
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(None if seconds is None else seconds * 1000))

    def end(self) -> None:
        """See `Running`."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def kill(self) -> None:
        """See `Running`."""
        self.end()
        self.wait(None)

    @property
    def status(self) -> int | None:
        """See `Running`."""
        return None

    @property
    def exit_text(self) -> str:
        """See `Running`."""
        return "a status that is not known, since another process had started it"


def started_at(pid: int) -> int:
    """When a process was started, in clock ticks since the host's start; 0 if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(text.rpartition(")")[2].split()[_START_FIELD])


@cache
def _starter() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, thread_name_prefix="qemu-start")
