"""The events that QEMU's block jobs have beside JOB_STATUS_CHANGE. All functions are called with the jobs' lock held."""

from stillframe.errors import Cancelled
from stillframe.events import EventBus
from stillframe.jobs.record import Job


def tell_pending(events: EventBus, job: Job) -> None:
    """The job waits for `job-finalize`."""
    events.emit("BLOCK_JOB_PENDING", type=job.type, id=job.id)


def tell_end(events: EventBus, job: Job) -> None:
    """The job is about to be concluded."""
    if isinstance(job.cause, Cancelled):
        events.emit(
            "BLOCK_JOB_CANCELLED",
            type=job.type,
            device=job.id,
            len=job.total,
            offset=job.current,
            speed=job.speed,
        )
        return
    error = {} if job.error is None else {"error": job.error}
    events.emit(
        "BLOCK_JOB_COMPLETED",
        type=job.type,
        device=job.id,
        len=job.total,
        offset=job.current,
        speed=job.speed,
        **error,
    )
