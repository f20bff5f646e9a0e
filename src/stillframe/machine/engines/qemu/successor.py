"""A fresh QEMU that is to take the machine's place, in the state of a snapshot.

It is started beside the old one, with the same words and the same exports, and waits. `offer` gives it everything but its memory,
which follows by page fault and in the file's order while it runs already (postcopy.py); `offer_all` gives it everything first.
Either way it stands still afterwards, has written to no disk, and can still be thrown away.
"""

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from stillframe.errors import Cancelled, Failed, IOFailed, PeerError, StateMismatch
from stillframe.machine.control import StoredState
from stillframe.machine.engines.qemu.beside import memories_in_files
from stillframe.machine.engines.qemu.capture import MigrationStatus
from stillframe.machine.engines.qemu.plain import feed
from stillframe.machine.engines.qemu.postcopy import PostcopySource
from stillframe.machine.engines.qemu.process import QemuProcess
from stillframe.sockets import connected_unix_socket

_LOADED_SECONDS: Final = 120.0


class QemuSuccessor:
    """See the module's text. :param status: of its migration."""

    def __init__(self, process: QemuProcess, status: MigrationStatus) -> None:
        self.process = process
        self.status = status
        self._source: PostcopySource | None = None

    def listen(self, *, later: bool) -> str:
        """See `control.Successor`."""
        monitor = self.process.monitor
        why = ""
        with self._explained():
            # Later versions say themselves whether they can, by the kind of file.
            if later and monitor.version < (8, 0, 0) and memories_in_files(monitor):
                later, why = False, "a QEMU before 8 cannot fetch missing pages of memory that is in a file"
            try:
                monitor.set_capabilities(postcopy_ram=later)
            except PeerError as error:
                if not later:
                    raise
                # What it printed with that is not why it may refuse a state.
                words = self.process.take_last_words()
                why = f"QEMU cannot fetch missing pages: {words or error}"
                monitor.set_capabilities(postcopy_ram=False)
            monitor.execute("migrate-incoming", {"uri": f"unix:{self._path}"})
        return why

    @property
    def _path(self) -> Path:
        return self.process.directory / "migration"

    def offer(self, state: StoredState) -> None:
        """See `control.Successor`."""
        with self._explained():
            connection = connected_unix_socket(self._path)
            self._source = PostcopySource(
                connection, state.head, state.devices, state.index, state.read, state.descriptors
            )
            self._source.offer()
            self._source.wait_until_loaded(_LOADED_SECONDS)
            self._wait_until_paused()

    def offer_all(
        self,
        size: int,
        read: Callable[[int, int], bytes],
        took: Callable[[int], None],
        checkpoint: Callable[[], None],
    ) -> None:
        """See `control.Successor`."""
        with self._explained(), connected_unix_socket(self._path) as connection:
            feed(connection, size, read, took, checkpoint)
            # Not for a run state: it is that of the snapshot, which may be one that a QEMU waits in.
            if not self.status.wait_until_over(_LOADED_SECONDS):
                raise PeerError(f"it has not loaded it in {_LOADED_SECONDS:g} seconds")
            if self.status.now != "completed":
                raise PeerError(f"its migration has the status '{self.status.now}'")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What goes wrong while it is given its state is its refusal, unless it is ours. :raise StateMismatch: :raise IOFailed:"""
        try:
            yield
        except Cancelled:
            raise
        except (PeerError, Failed) as error:
            raise self._refusal(error) from error

    def _wait_until_paused(self) -> None:
        """Ends with QEMU, too. :raise PeerError: it ended, or failed."""
        while (state := self.process.monitor.execute("query-status")["status"]) != "paused":
            if state not in ("inmigrate", "restore-vm", "prelaunch") or self.status.now == "failed":
                raise PeerError(f"its run state is '{state}'")
            if self.process.wait(0.002):
                raise PeerError("it ended")

    def _refusal(self, error: Exception) -> StateMismatch | IOFailed:
        """What QEMU printed says more than what its end looks like from here."""
        if self.process.wait(2.0) or self.process.last_words:
            words = self.process.last_words or f"it ended with {self.process.exit_text}"
            return StateMismatch(
                f"QEMU does not take the machine state: {words}",
                remedy="Start the machine with the devices and the versioned machine type that it was saved with.",
            )
        return IOFailed(f"QEMU does not take the machine state: {error}", errno=errno.EINVAL)

    @property
    def is_filling(self) -> bool:
        """Whether its memory comes while it runs."""
        return self._source is not None

    def fill(self, progress: Callable[[int], None], checkpoint: Callable[[], None]) -> None:
        """See `control.Successor`."""
        if self._source is not None:
            self._source.fill(progress, checkpoint)
            # Until QEMU says so itself it is not done: whatever begins next would hear it.
            self.status.wait_until_over(_LOADED_SECONDS)

    def close(self) -> None:
        """End the way that its memory comes by."""
        if self._source is not None:
            self._source.close()
            self._source = None
