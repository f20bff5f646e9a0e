"""A job as a client sees it: what `query-jobs` says of it, what its events say, and what is known of it when its machine ends."""

from dataclasses import dataclass
from typing import Any, Final

from qemu.qmp import EventListener

from stillframe.errors import PeerError


@dataclass(frozen=True, slots=True)
class JobChoice:
    """In which of several ways a job does its work, and why not in another one; `why` may be empty."""

    what: str
    chosen: str
    why: str


@dataclass(frozen=True, slots=True)
class JobState:
    """A job as `query-jobs` shows it.

    :param done: and :param total: progress in the job's own unit; stillframe's snapshot jobs count bytes.
    :param error: why it failed; None while it runs and where it succeeded.
    :param choices: what stillframe tells of how it is done; empty with others.
    """

    id: str
    type: str
    status: str
    done: int
    total: int
    error: str | None
    choices: tuple[JobChoice, ...] = ()


class JobFailed(PeerError):
    """A job concluded with an error; the message is the job's."""

    def __init__(self, job: JobState) -> None:
        super().__init__(job.error or f"Job '{job.id}' ended in state '{job.status}'")
        self.job = job


class Disconnected(PeerError):
    """The connection ended before the answer came: the machine has ended, or it has cut this client off."""


_UNDONE: Final = {
    "snapshot-save": "The snapshot was not taken, and nothing of it is left.",
    "snapshot-delete": "Nothing was deleted.",
}
"""What a job that was cancelled leaves behind."""

_EITHER: Final = {
    "snapshot-save": "The snapshot is there as a whole, or nothing of it is.",
    "snapshot-load": "The disks are all as they were, or all the snapshot's.",
    "snapshot-delete": "The snapshot is still there on all nodes, or on none.",
}
"""What a job leaves behind of which nobody knows how it ended: stillframe's promise."""


class JobLife:
    """What has been heard of one job, and of its machine's end.

    :param command: that makes the job; its type is called the same. :param listener: to `EVENTS`, from before the job is made.
    :ivar concluded: the job as it concluded, once that was seen.
    """

    EVENTS: Final = ("JOB_STATUS_CHANGE", "SHUTDOWN")

    def __init__(self, id: str, command: str, listener: EventListener) -> None:
        self.id = id
        self.command = command
        self.machine_ended = False
        self.concluded: JobState | None = None
        self._statuses: set[str] = set()
        self._listener = listener

    def hear(self) -> None:
        """Take in what has come."""
        for message in self._listener.clear():
            self._take(message)

    async def end_told(self) -> None:
        """Wait until an event tells the end of the job, or of the machine; cancelling the task ends the wait.

        To ask after each event would be in the job's way.
        """
        while not self.machine_ended and not self._statuses & {"concluded", "null"}:
            self._take(await self._listener.get())

    def _take(self, message: Any) -> None:
        if message["event"] == "SHUTDOWN":
            self.machine_ended = True
        elif message["data"]["id"] == self.id:
            self._statuses.add(message["data"]["status"])

    @property
    def ended_well(self) -> bool:
        """Whether the machine ended, and the job was done before that."""
        return self.machine_ended and "concluded" in self._statuses and "aborting" not in self._statuses

    def end(self, place: str, *, is_stillframe: bool) -> Disconnected:
        """The error of a job whose server is gone. :param place: the server's address, for its words."""
        gone = "The machine" if self.machine_ended else f"The connection to '{place}'"
        message = f"{gone} ended during '{self.command}' (job '{self.id}')"
        if not is_stillframe:
            return Disconnected(message, remedy="Look at the images before they are used: qemu-img check.")
        if self.machine_ended and "aborting" in self._statuses and self.command in _UNDONE:
            return Disconnected(message, left=_UNDONE[self.command])
        remedy = "To see which: stillframe image snapshot list IMAGE"
        if not self.machine_ended:
            remedy += "; if the machine still runs, so does the job: stillframe jobs NAME"
        return Disconnected(message, left=_EITHER.get(self.command), remedy=f"{remedy}.")
