"""Commands on jobs of any kind."""

from enum import Enum

import msgspec

from stillframe.jobs import JobStatus
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, command, event


class JobType(Enum):
    """Kinds of jobs."""

    BACKUP = "backup"
    CREATE = "create"
    SNAPSHOT_LOAD = "snapshot-load"
    SNAPSHOT_SAVE = "snapshot-save"
    SNAPSHOT_DELETE = "snapshot-delete"


class JobId(Structure):
    """:param id: the job's id."""

    id: str


class JobChoice(Structure):
    """One of several ways in which a job could do its work, and the one that it took. Not QEMU's.

    :param what: it is about; for snapshots memory, changes or state.
    :param chosen: the way.
    :param why: not another one.
    """

    what: str
    chosen: str
    why: str | msgspec.UnsetType = msgspec.UNSET


class JobInfo(Structure):
    """A job.

    :param id: the job's id.
    :param type: its kind.
    :param status: where it is in its life.
    :param current_progress: how much is done, in a unit of the job's own; bytes for snapshots.
    :param total_progress: how much there is to do; it may grow.
    :param error: why it failed, or that it was cancelled.
    :param choices: in which ways the work is done, as soon as that is known. Not QEMU's.
    """

    id: str
    type: JobType
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str | msgspec.UnsetType = msgspec.UNSET
    choices: list[JobChoice] | msgspec.UnsetType = msgspec.UNSET


@event("JOB_STATUS_CHANGE")
class JobStatusChange(Structure):
    """A job has gone from one state to another.

    :param id: the job's id.
    :param status: the new state.
    """

    id: str
    status: JobStatus


@command("query-jobs")
def query_jobs(host: Host) -> list[JobInfo]:
    """All jobs, newest first, concluded ones too until they are dismissed."""
    found = []
    for job in host.jobs.query():
        choices = [JobChoice(each.what, each.chosen, each.why or msgspec.UNSET) for each in job.choices]
        found.append(
            JobInfo(
                job.id,
                JobType(job.type),
                job.status,
                job.current_progress,
                job.total_progress,
                msgspec.UNSET if job.error is None else job.error,
                choices or msgspec.UNSET,
            )
        )
    return found


@command("job-pause")
def job_pause(host: Host, arguments: JobId) -> None:
    """Hold a job at its next checkpoint, until `job-resume`."""
    host.jobs.pause(arguments.id)


@command("job-resume")
def job_resume(host: Host, arguments: JobId) -> None:
    """End a job's pause."""
    host.jobs.resume(arguments.id)


@command("job-cancel")
def job_cancel(host: Host, arguments: JobId) -> None:
    """Have a job undo its work and end. It is refused once the job cannot be undone any more."""
    host.jobs.cancel(arguments.id)


@command("job-complete")
def job_complete(host: Host, arguments: JobId) -> None:
    """Let a job in state `ready` come to its end."""
    host.jobs.complete(arguments.id)


@command("job-finalize")
def job_finalize(host: Host, arguments: JobId) -> None:
    """Make the work of a job in state `pending` final."""
    host.jobs.finalize(arguments.id)


@command("job-dismiss")
def job_dismiss(host: Host, arguments: JobId) -> None:
    """Forget a concluded job; its id can be used again."""
    host.jobs.dismiss(arguments.id)
