"""One job as its owner, `Jobs`, knows it; and what a kind of job brings along."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from stillframe.jobs.states import BlockJobInfo, JobChoice, JobInfo, JobStatus


@dataclass(frozen=True, slots=True)
class JobHooks:
    """What a kind of job does besides its body; each is called on a thread that may block, never under the
    jobs' lock.

    :param commit: makes the body's work final, after `job-finalize` where that is asked for. If it raises,
        the job fails.
    :param abort: takes the body's work back: the body had returned, and the job is then cancelled, or its
        commit failed. Without it a job whose body has returned can no longer be cancelled.
    :param completable: `job-complete` is accepted once the body has called `JobContext.ready`.
    :param release: gives back what the body used; called once, when the body has ended or is never to begin.
    :param is_block: QEMU calls it a block job: it has events of its own beside JOB_STATUS_CHANGE, and its disks are drained as
        it starts, which is told as a pause.
    """

    commit: Callable[[], None] | None = None
    abort: Callable[[], None] | None = None
    completable: bool = False
    release: Callable[[], None] | None = None
    is_block: bool = False


class JobQueue:
    """Jobs that take turns: one runs, the others wait in the order of their creation."""

    def __init__(self) -> None:
        self.jobs: deque[Job] = deque()


class JobGroup:
    """Jobs of one transaction with the completion mode `grouped`: all become final together, or none does. Guarded by the
    jobs' lock.
    """

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.failed = False


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
        self.group: JobGroup | None = None
        self.started = False
        # In `wait_for_completion`: nothing is being done, a pause takes effect at once.
        self.idle = False
        # Somebody is finishing it: the body's thread, or whoever finalizes or cancels a pending job.
        self.finishing = False

    def info(self, id: str) -> JobInfo:
        """What `query-jobs` tells. :param id: the job's own, of one that has one."""
        return JobInfo(id, self.type, self.status, self.current, self.total, self.error, self.choices)

    def release(self) -> BaseException | None:
        """Not locked: the hook of that name. :return: what went wrong with it."""
        try:
            if self.hooks.release is not None:
                self.hooks.release()
        except BaseException as error:
            return error
        return None

    def block_info(self, id: str) -> BlockJobInfo:
        """What `query-block-jobs` tells besides. :param id: the job's own."""
        return BlockJobInfo(
            self.info(id),
            self.speed,
            busy=self.status in (JobStatus.RUNNING, JobStatus.READY) and not self.idle,
            paused=self.pause_requested,
            auto_finalize=self.auto_finalize,
            auto_dismiss=self.auto_dismiss,
        )

    @property
    def together(self) -> tuple[Job, ...]:
        """The jobs that become final with this one, itself among them."""
        return (self,) if self.group is None else tuple(self.group.jobs)

    @property
    def over(self) -> bool:
        return self.status in (JobStatus.CONCLUDED, JobStatus.NULL)
