"""Long work with an id: its states, what may be asked of it in each, how it ends and what it tells.

    created ──▶ running ◀──▶ paused          ready ◀──▶ standby
       │           ├──────────▶ ready ───────────┐
       │           ▼                             │
       │        waiting ◀────────────────────────┘
       │           ▼
       │        pending ──▶ concluded ──▶ null
       ▼           ▼             ▲
    aborting ◀── from running, ready, waiting and pending, too: failure and cancellation

A job's body is a plain function on a thread of its own. It is given a `JobContext`, through which it says how
far it is and lets itself be paused and cancelled. Bodies of jobs on one `JobQueue` run one at a time, in the
order of their creation; a job whose turn has not come stays `created`.

Every change of state is told as JOB_STATUS_CHANGE, in order, by the thread that makes it. One lock guards all
jobs; no body, hook or callback runs under it.

Jobs of a group wait for each other in `waiting`, become `pending` together, and final: the failure or cancellation of one is
that of all.
"""

import logging
import re
import threading
from collections.abc import Callable, Sequence
from typing import Final

from stillframe.errors import (
    AlreadyExists,
    Cancelled,
    InvalidRequest,
    NotFound,
    Refused,
    StillframeError,
)
from stillframe.events import EventBus
from stillframe.jobs.block_events import tell_end, tell_pending
from stillframe.jobs.context import PARKED, JobContext
from stillframe.jobs.record import Job, JobGroup, JobHooks, JobQueue
from stillframe.jobs.states import (
    TRANSITIONS,
    VERBS,
    BlockJobInfo,
    JobChoice,
    JobInfo,
    JobStatus,
    JobVerb,
)

__all__ = [
    "TRANSITIONS",
    "VERBS",
    "BlockJobInfo",
    "Body",
    "Job",
    "JobChoice",
    "JobContext",
    "JobGroup",
    "JobHooks",
    "JobInfo",
    "JobQueue",
    "JobStatus",
    "JobVerb",
    "Jobs",
]

_log = logging.getLogger(__name__)

_S = JobStatus


_WELL_FORMED_ID: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]*")
_UNPARKED: Final = {after: before for before, after in PARKED.items()}


Body = Callable[[JobContext], None]


class Jobs:
    """All jobs of a process.

    Any thread may call any method. Refusals are worded as QEMU's.
    """

    def __init__(self, events: EventBus) -> None:
        self._events = events
        self._changed = threading.Condition(threading.RLock())
        self._jobs: list[Job] = []
        self._closing = False

    # Creation

    def create(
        self,
        id: str,
        type: str,
        body: Body,
        *,
        queue: JobQueue | None = None,
        hooks: JobHooks | None = None,
        auto_finalize: bool = True,
        auto_dismiss: bool = False,
        speed: int = 0,
    ) -> None:
        """Make a job; it starts at once, or when its queue's turn comes to it.

        `created`, and `running` if it starts, are told before this returns.

        :param type: as "snapshot-save".
        :param auto_finalize: without it the job stays `pending` until `job-finalize`.
        :param auto_dismiss: the job vanishes when it has concluded; without it, on `job-dismiss`.
        :param speed: the limit in bytes a second; 0 for none.
        :raise InvalidRequest: the id is not well-formed, the speed negative. :raise AlreadyExists: it is in use, also by a
            concluded job.
        :raise Refused: jobs are being ended.
        """
        self.check_new_id(id)
        job = Job(
            id, type, body, queue, hooks or JobHooks(), auto_finalize=auto_finalize, auto_dismiss=auto_dismiss
        )
        job.speed = _checked_speed(speed)
        with self._changed:
            self.check_new_id(id)
            self._begin(job)

    def prepare(
        self,
        id: str,
        type: str,
        body: Body,
        hooks: JobHooks,
        *,
        auto_finalize: bool,
        auto_dismiss: bool,
        speed: int,
        total: int,
        group: JobGroup | None = None,
    ) -> Job:
        """Make a job that stays `created` until `start` or `withdraw`; else as `create`.

        :param total: what `query-jobs` tells as the total until the body tells another. :param group: it becomes final with
            the others of that.
        """
        self.check_new_id(id)
        job = Job(id, type, body, None, hooks, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss)
        job.total, job.group = total, group
        with self._changed:
            self.check_new_id(id)
            self._enter(job)
            try:
                job.speed = _checked_speed(speed)
            except InvalidRequest:
                # Only now, and in events: so does QEMU.
                self._dismiss(job)
                raise
            if group is not None:
                group.jobs.append(job)
        return job

    def start(self, jobs: Sequence[Job]) -> None:
        """Start jobs that were prepared; one that was cancelled meanwhile is over already."""
        with self._changed:
            over = [job for job in jobs if job.status is not _S.CREATED]
            for job in jobs:
                if job not in over:
                    self._start(job)
        for job in over:
            job.release()
            self._fail_others(job)

    def withdraw(self, jobs: Sequence[Job]) -> None:
        """Jobs that were prepared shall not be: they vanish, whatever was asked for their end."""
        for job in jobs:
            with self._changed:
                if job.status is _S.CREATED:
                    job.auto_dismiss = True
                    self._abort(job, Cancelled())
            job.release()

    def check_new_id(self, id: str) -> None:
        """Refuse what `create` would refuse about an id."""
        if not _WELL_FORMED_ID.fullmatch(id):
            raise InvalidRequest(
                f"Invalid job ID '{id}'",
                remedy="Begin with a letter; letters, digits, '-', '.' and '_' may follow.",
            )
        with self._changed:
            if any(job.id == id for job in self._jobs):
                raise AlreadyExists(
                    f"Job ID '{id}' already in use", remedy="Choose another one, or dismiss that job."
                )

    def run_internal(self, type: str, body: Body, *, queue: JobQueue | None = None) -> None:
        """Do work in a queue's turn without a job that anybody sees: waits for the turn and the end.

        It takes part in the end of all jobs, which cancels it.

        :raise StillframeError: what the body raised. :raise Cancelled: all jobs were ended.
        """
        job = Job(None, type, body, queue, JobHooks(), auto_finalize=True, auto_dismiss=True)
        with self._changed:
            self._begin(job)
            self._changed.wait_for(lambda: job.over)
        if job.cause is not None:
            raise job.cause

    def _enter(self, job: Job) -> None:
        if self._closing:
            raise Refused("The machine is being shut down")
        self._jobs.append(job)
        self._move(job, _S.CREATED)

    def _begin(self, job: Job) -> None:
        self._enter(job)
        if job.queue is None:
            self._start(job)
            return
        job.queue.jobs.append(job)
        if job.queue.jobs[0] is job:
            self._start(job)

    def _start(self, job: Job) -> None:
        job.started = True
        self._move(job, _S.RUNNING)
        if job.hooks.is_block:
            self._move(job, _S.PAUSED)
            self._move(job, _S.RUNNING)
        threading.Thread(
            target=self._work, args=(job,), name=f"job-{job.id or job.type}", daemon=True
        ).start()

    # The body's thread

    def _work(self, job: Job) -> None:
        cause: BaseException | None = None
        context = JobContext(job, self._changed, self._move)
        try:
            context.checkpoint()
            job.body(context)
        except BaseException as error:
            cause = error
        cause = job.release() or cause
        with self._changed:
            self._end_pause(job)
            job.finishing = True
            if cause is not None:
                self._abort(job, cause)
            else:
                # From here on only `abort` takes the work back, for what was final as the body returned cannot be.
                job.cancellable = job.hooks.abort is not None
                self._move(job, _S.WAITING)
                job.finishing = False
        if cause is not None:
            self._fail_others(job)
        else:
            self._done(job)

    def _done(self, job: Job) -> None:
        """Not locked: the job waits, and perhaps it is the last of its group."""
        jobs = job.together
        with self._changed:
            if job.finishing or job.over:
                return
            if any(each.status is not _S.WAITING for each in jobs):
                if not (job.group and job.group.failed):
                    return
                cancelled, jobs = True, (job,)
            else:
                for each in jobs:
                    self._move(each, _S.PENDING)
                cancelled = any(each.cancellable and each.cancel_requested for each in jobs)
                for each in jobs:
                    if each.hooks.is_block and not each.auto_finalize:
                        tell_pending(self._events, each)
                if not cancelled and not self._closing and not all(each.auto_finalize for each in jobs):
                    return
            for each in jobs:
                each.finishing = True
        if cancelled:
            for each in jobs:
                self._take_back(each, Cancelled())
        else:
            self._commit(jobs)

    def _commit(self, jobs: Sequence[Job]) -> None:
        """Not locked; `finishing` of all is ours: the work becomes final."""
        cause: BaseException | None = None
        try:
            for job in jobs:
                if job.hooks.commit is not None:
                    job.hooks.commit()
        except BaseException as error:
            cause = error
        for job in jobs:
            if cause is not None:
                self._take_back(job, cause)
            else:
                with self._changed:
                    self._conclude(job)

    def _fail_others(self, job: Job) -> None:
        """Not locked: the job has failed, or was cancelled, and with it the others of its group are."""
        with self._changed:
            group = job.group
            if group is None or group.failed:
                return
            group.failed = True
            revocable = [each for each in group.jobs if each is not job and self._ask_to_cancel(each)]
        for each in revocable:
            self._take_back(each, Cancelled())

    def _take_back(self, job: Job, cause: BaseException) -> None:
        """Not locked; `job.finishing` is ours: the body's work, which was done, is undone."""
        with self._changed:
            self._set_error(job, cause)
            self._move(job, _S.ABORTING)
        try:
            if job.hooks.abort is not None:
                job.hooks.abort()
        except BaseException as error:
            _log.exception("job %s could not be undone", job.id)
            with self._changed:
                job.error = f"{job.error}; and it could not be undone: {error}"
        finally:
            with self._changed:
                self._conclude(job)

    def _abort(self, job: Job, cause: BaseException) -> None:
        """Locked: the body undid its work itself and raised."""
        self._set_error(job, cause)
        self._move(job, _S.ABORTING)
        self._conclude(job)

    def _set_error(self, job: Job, cause: BaseException) -> None:
        job.cause = cause
        job.error = str(cause) or type(cause).__name__
        if not isinstance(cause, StillframeError):
            _log.error("job %s (%s) failed in a way that nobody foresaw", job.id, job.type, exc_info=cause)
            job.error = f"{type(cause).__name__}: {cause}"

    def _conclude(self, job: Job) -> None:
        if job.hooks.is_block and job.started:
            tell_end(self._events, job)
        self._move(job, _S.CONCLUDED)
        job.finishing = False
        if job.queue is not None:
            job.queue.jobs.remove(job)
            self._next(job.queue)
        if job.auto_dismiss:
            self._dismiss(job)

    def _next(self, queue: JobQueue) -> None:
        if queue.jobs and queue.jobs[0].status is _S.CREATED and not self._closing:
            self._start(queue.jobs[0])

    def _dismiss(self, job: Job) -> None:
        self._move(job, _S.NULL)
        self._jobs.remove(job)

    def _move(self, job: Job, to: JobStatus) -> None:
        """Locked."""
        if to not in TRANSITIONS[job.status]:
            raise RuntimeError(f"job {job.id}: {job.status.value} -> {to.value}")
        changed = job.status is not to
        job.status = to
        self._changed.notify_all()
        if changed and job.id is not None:
            self._events.emit("JOB_STATUS_CHANGE", id=job.id, status=to.value)

    def _end_pause(self, job: Job) -> None:
        job.pause_requested = False
        if job.status in _UNPARKED:
            self._move(job, _UNPARKED[job.status])
        self._changed.notify_all()

    # What clients ask

    def query(self) -> Sequence[JobInfo]:
        """All jobs but internal ones, newest first."""
        with self._changed:
            return [job.info(job.id) for job in reversed(self._jobs) if job.id is not None]

    def query_block(self) -> Sequence[BlockJobInfo]:
        """Block jobs, newest first."""
        with self._changed:
            return [
                job.block_info(job.id)
                for job in reversed(self._jobs)
                if job.hooks.is_block and job.id is not None
            ]

    def pause(self, id: str) -> None:
        """Hold the job at its next checkpoint."""
        with self._changed:
            job = self._accept(id, JobVerb.PAUSE)
            if job.pause_requested:
                raise Refused("Job is already paused")
            if self._closing:
                raise Refused("The machine is being shut down")
            job.pause_requested = True
            if job.idle:
                self._move(job, PARKED[job.status])
            self._changed.notify_all()

    def resume(self, id: str) -> None:
        """End a pause."""
        with self._changed:
            job = self._find(id)
            if not job.pause_requested:
                raise Refused("Can't resume a job that was not paused")
            self._check(job, JobVerb.RESUME)
            self._end_pause(job)

    def cancel(self, id: str) -> None:
        """Ask the job to undo its work and end; a paused one goes on to do so.

        :raise Refused: it has concluded, or is past the point from which it can be undone.
        """
        with self._changed:
            job = self._accept(id, JobVerb.CANCEL)
            if not job.cancellable or job.finishing:
                raise self._refusal(job, JobVerb.CANCEL)
            take_back = self._ask_to_cancel(job)
        if take_back:
            self._take_back(job, Cancelled())
            self._fail_others(job)

    def _ask_to_cancel(self, job: Job) -> bool:
        """Locked: what can be done at once is done; True if the caller has to take a pending job back."""
        if job.over or job.finishing or not job.cancellable:
            return False
        job.cancel_requested = True
        self._end_pause(job)
        if job.status is _S.CREATED:
            self._abort(job, Cancelled())
            return False
        if job.status is _S.PENDING or job.status is _S.WAITING:
            job.finishing = True
            return True
        return False

    def complete(self, id: str) -> None:
        """Let a `ready` job come to its end."""
        with self._changed:
            job = self._accept(id, JobVerb.COMPLETE)
            if not job.hooks.completable or job.cancel_requested:
                raise Refused(f"The active block job '{id}' cannot be completed")
            job.completion_requested = True
            self._changed.notify_all()

    def finalize(self, id: str) -> None:
        """Make a `pending` job's work final, and that of its group; returns when it is."""
        with self._changed:
            job = self._accept(id, JobVerb.FINALIZE)
            jobs = job.together
            if any(each.finishing for each in jobs):
                raise self._refusal(job, JobVerb.FINALIZE)
            for each in jobs:
                each.finishing = True
        self._commit(jobs)

    def dismiss(self, id: str) -> None:
        """Forget a concluded job; its id is free again."""
        with self._changed:
            self._dismiss(self._accept(id, JobVerb.DISMISS))

    def set_speed(self, id: str, speed: int) -> None:
        """Limit the job to `speed` bytes a second; 0 lifts the limit. A body that knows no limit ignores it."""
        with self._changed:
            job = self._accept(id, JobVerb.SET_SPEED)
            if self._closing:
                raise Refused("The machine is being shut down")
            job.speed = _checked_speed(speed)
            self._changed.notify_all()

    def wait_concluded(self, id: str, timeout: float | None = None) -> JobInfo | None:
        """Sleep until the job has concluded (or, dismissed, is gone); None when `timeout` seconds passed
        first.

        :raise NotFound: there is no such job now.
        """
        with self._changed:
            job = self._find(id)
            if not self._changed.wait_for(lambda: job.over, timeout):
                return None
            return job.info(id)

    # The end

    def cancel_all_and_wait(self, timeout: float | None = None) -> bool:
        """Refuse new jobs, cancel all there are and wait for their end, then dismiss them, newest first.

        A body is waited for until its next checkpoint, one past its point of no return until it is done. Pauses and limits of
        speed end.

        :param timeout: seconds; None waits for as long as it takes.
        :return: False if `timeout` passed; the jobs that had ended are dismissed.
        """
        with self._changed:
            self._closing = True
            revocable, final = [], []
            for job in reversed(self._jobs.copy()):
                job.speed = 0
                self._end_pause(job)
                if self._ask_to_cancel(job):
                    revocable.append(job)
                elif job.status is _S.PENDING and not job.finishing:
                    job.finishing = True
                    final.append(job)
        for job in revocable:
            self._take_back(job, Cancelled())
        for job in final:
            self._commit((job,))
        with self._changed:
            ended = self._changed.wait_for(lambda: all(job.over for job in self._jobs), timeout)
            for job in reversed(self._jobs.copy()):
                if job.status is _S.CONCLUDED:
                    self._dismiss(job)
            return ended

    def _find(self, id: str) -> Job:
        for job in self._jobs:
            if job.id == id:
                return job
        raise NotFound("Job not found")

    def _accept(self, id: str, verb: JobVerb) -> Job:
        job = self._find(id)
        self._check(job, verb)
        return job

    def _check(self, job: Job, verb: JobVerb) -> None:
        if job.status not in VERBS[verb]:
            raise self._refusal(job, verb)

    def _refusal(self, job: Job, verb: JobVerb) -> Refused:
        return Refused(
            f"Job '{job.id}' in state '{job.status.value}' cannot accept command verb '{verb.value}'"
        )


def _checked_speed(speed: int) -> int:
    if speed < 0:
        raise InvalidRequest("Parameter 'speed' expects a non-negative value")
    return speed
