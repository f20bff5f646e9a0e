"""One job as its owner, `Jobs`, knows it; and what a kind of job brings along."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stillframe.jobs.states import JobChoice, JobInfo, JobStatus


@dataclass(frozen=True, slots=True)
class JobHooks:
    """What a kind of job does besides its body; each is called on a thread that may block, never under the
    jobs' lock.

    :param commit: makes the body's work final, after `job-finalize` where that is asked for. If it raises,
        the job fails.
    :param abort: takes the body's work back: the body had returned, and the job is then cancelled, or its
        commit failed. Without it a job whose body has returned can no longer be cancelled.
    :param completable: `job-complete` is accepted once the body has called `JobContext.ready`.
    """

    commit: Callable[[], None] | None = None
    abort: Callable[[], None] | None = None
    completable: bool = False


class JobQueue:
    """Jobs that take turns: one runs, the others wait in the order of their creation."""

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()


class Job:
    """Guarded by the jobs' lock."""

    def __init__(
        self,
        id: str | None,
        type: str,
        body: Callable[[Any], None],
        queue: JobQueue | None,
        hooks: JobHooks,
        *,
        auto_finalize: bool,
        auto_dismiss: bool,
    ) -> None:
        self.id = id
        self.type = type
        self.body = body
        self.queue = queue
        self.hooks = hooks
        self.auto_finalize = auto_finalize
        self.auto_dismiss = auto_dismiss
        self.status = JobStatus.UNDEFINED
        self.current = 0
        self.total = 1
        self.error: str | None = None
        self.cause: BaseException | None = None
        self.speed = 0
        self.choices: tuple[JobChoice, ...] = ()
        self.pause_requested = False
        self.cancel_requested = False
        self.completion_requested = False
        self.cancellable = True
        # In `wait_for_completion`: nothing is being done, a pause takes effect at once.
        self.idle = False
        # Somebody is finishing it: the body's thread, or whoever finalizes or cancels a pending job.
        self.finishing = False

    def info(self, id: str) -> JobInfo:
        """What `query-jobs` tells. :param id: the job's own, of one that has one."""
        return JobInfo(id, self.type, self.status, self.current, self.total, self.error, self.choices)

    @property
    def over(self) -> bool:
        return self.status in (JobStatus.CONCLUDED, JobStatus.NULL)
