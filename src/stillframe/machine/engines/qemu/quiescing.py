"""The guest's file systems frozen for as long as a save needs it, and a loaded guest woken: both through its agent.

Whatever was frozen is thawed, also after a failure; where the agent cannot be reached for that it is asked again when the guest
runs next. So is that of a guest that a load has brought back: its file systems may be frozen, and its clock is behind.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from stillframe.errors import PeerError, Refused
from stillframe.machine.control import Quiesce
from stillframe.machine.engines.qemu.agent import GuestAgent, thaw, wake

_NO_PORT: Final = "the machine has no port for a guest agent"


class Quiescing:
    """Of one machine, whichever QEMU it is.

    :param has_port: whether its guest has a port for an agent. :param port: the present QEMU's; None where that has ended.
    :param runs: whether the guest does.
    """

    def __init__(self, port: Callable[[], Path | None], runs: Callable[[], bool], *, has_port: bool) -> None:
        self._port = port
        self._runs = runs
        self._has_port = has_port
        self._wake_due = False

    @contextmanager
    def quiesced(self, asked: Quiesce | None) -> Iterator[str]:
        """The guest's file systems are frozen in the block, or why they are not. :raise Refused: they had to be."""
        why = "" if asked is None else self._freeze()
        if why and asked is Quiesce.REQUIRED:
            raise Refused(
                f"The guest's file systems cannot be frozen: {why}",
                remedy="Run QEMU's guest agent in the guest and the machine with --agent, or save with `--quiesce try`.",
            )
        try:
            yield why
        finally:
            if asked is not None and not why:
                self._thaw()

    def _freeze(self) -> str:
        """Why it could not be done; empty if it is."""
        if not self._has_port:
            return _NO_PORT
        if not self._runs():
            return "the guest is paused, and so is its agent"
        path = self._port()
        if path is None:
            return "QEMU has ended"
        try:
            agent = GuestAgent(path)
        except PeerError as error:
            return str(error)
        with contextlib.closing(agent):
            try:
                agent.freeze()
            except PeerError as error:
                why = str(error)
            else:
                return ""
        self._thaw()
        return why

    def _thaw(self) -> None:
        """:raise PeerError: the agent did not say that it has; it is asked again when the guest runs next."""
        path = self._port()
        if path is None:
            return
        try:
            thaw(path, self._runs)
        except PeerError as error:
            self._wake_due = True
            raise PeerError(
                f"The guest's file systems may still be frozen: {error}",
                left="Nothing was saved; the guest's agent is asked again at the next `cont`",
            ) from error

    def loaded(self) -> None:
        """The guest is one that a load has brought back: it is woken when it runs."""
        self._wake_due = True

    def wake_if_due(self) -> None:
        """The guest runs, after a load or after a thaw that failed: its agent is spoken with beside all else."""
        path = self._port()
        if self._wake_due and self._has_port and path is not None:
            self._wake_due = False
            threading.Thread(target=wake, args=(path,), name="guest-agent", daemon=True).start()
