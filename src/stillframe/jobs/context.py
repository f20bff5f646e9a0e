"""What a job's body is given: how it tells how far it is, and where it stands still or gives up."""

import logging
import threading
from collections.abc import Callable
from typing import Final

from stillframe.errors import Cancelled
from stillframe.jobs.pace import Pace
from stillframe.jobs.record import Job
from stillframe.jobs.states import JobChoice, JobStatus

_log = logging.getLogger(__name__)

_S = JobStatus
PARKED: Final = {_S.RUNNING: _S.PAUSED, _S.READY: _S.STANDBY}
"""Where a pause leads from each state."""


class JobContext:
    """What a job's body sees of its job; for the body's thread alone."""

    def __init__(
        self, job: Job, changed: threading.Condition, move: Callable[[Job, JobStatus], None]
    ) -> None:
        """:param changed: the jobs' lock. :param move: under it, brings a job into a state."""
        self._job = job
        self._changed = changed
        self._move = move
        self._pace = Pace()

    @property
    def id(self) -> str | None:
        """None for an internal job."""
        return self._job.id

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked to cancel; `checkpoint` is the way to obey."""
        return self._job.cancel_requested

    def progress(self, done: int, total: int) -> None:
        """Tell how far the work is, in any unit; `total` may change."""
        with self._changed:
            self._job.current, self._job.total = done, total

    def chose(self, what: str, chosen: str, why: str = "") -> None:
        """Put down, in the job's record and in the log, in which of several ways the work is done; see `JobChoice`."""
        reason = f" ({why})" if why else ""
        _log.info("job %s: %s: %s%s", self._job.id or self._job.type, what, chosen, reason)
        with self._changed:
            self._job.choices += (JobChoice(what, chosen, why),)

    def checkpoint(self) -> None:
        """Stand still here while the job is paused.

        The wait ends with `job-resume`, with `job-cancel`, and with the end of the process's jobs.

        :raise Cancelled: somebody asked to cancel.
        """
        if self._job.pause_requested or self._job.cancel_requested:
            with self._changed:
                self._park()
                self._obey()

    def refuse_if_cancelled(self) -> None:
        """A checkpoint where the caller may not stand still: a pause waits for the next one. :raise Cancelled:"""
        with self._changed:
            self._obey()

    def moved(self, count: int) -> None:
        """So many bytes were read or written: a checkpoint, and a rest as long as the job's limit of speed asks for.

        The rest ends early with `job-pause`, `job-cancel`, another limit, and the end of the process's jobs. The caller holds
        nothing that anybody else waits for.

        :raise Cancelled: somebody asked to cancel.
        """
        self.checkpoint()
        job = self._job
        if not job.speed and not self._pace.limited:
            return
        with self._changed:
            self._pace.moved(count)
            while seconds := self._pace.rest(speed := job.speed):
                self._changed.wait_for(
                    lambda: job.pause_requested or job.cancel_requested or job.speed != speed,
                    timeout=seconds,
                )
                self._park()
                self._obey()

    def wait(self, seconds: float) -> None:
        """A checkpoint, then a rest of `seconds` that a pause or a cancel ends early."""
        with self._changed:
            self._park()
            self._obey()
            self._changed.wait_for(
                lambda: self._job.pause_requested or self._job.cancel_requested, timeout=seconds
            )
            self._park()
            self._obey()

    def point_of_no_return(self) -> None:
        """The last checkpoint: after it `job-cancel` is refused, as what follows cannot be taken back.

        :raise Cancelled: somebody asked to cancel before.
        """
        with self._changed:
            self._park()
            self._obey()
            self._job.cancellable = False

    def ready(self) -> None:
        """The work could be completed at any time from here on: the job's state becomes `ready`."""
        with self._changed:
            self._park()
            self._obey()
            if self._job.status is not _S.READY:
                self._move(self._job, _S.READY)

    def wait_for_completion(self) -> None:
        """In `ready`: rest until `job-complete`; paused and cancelled as at a checkpoint.

        :raise Cancelled: somebody asked to cancel.
        """
        job = self._job
        with self._changed:
            while True:
                self._park()
                self._obey()
                if job.completion_requested:
                    return
                job.idle = True
                try:
                    self._changed.wait_for(
                        lambda: job.pause_requested or job.cancel_requested or job.completion_requested
                    )
                finally:
                    job.idle = False

    @property
    def completion_requested(self) -> bool:
        """Whether `job-complete` was accepted."""
        return self._job.completion_requested

    def _park(self) -> None:
        """Locked: wait out a pause. Whoever asks for the pause of an idle body, and whoever ends one, changes
        the state.
        """
        job = self._job
        while job.pause_requested and not job.cancel_requested:
            if job.status in PARKED:
                self._move(job, PARKED[job.status])
            self._changed.wait_for(lambda: not job.pause_requested or job.cancel_requested)

    def _obey(self) -> None:
        if self._job.cancel_requested and self._job.cancellable:
            raise Cancelled
