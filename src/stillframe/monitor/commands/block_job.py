"""The older commands on jobs, which know block jobs alone, and the events that only those have."""

from collections.abc import Callable
from enum import Enum

from msgspec import UNSET, UnsetType

from stillframe.errors import DeviceNotActive, NotFound
from stillframe.jobs import BlockJobInfo as Known
from stillframe.jobs import JobStatus
from stillframe.monitor.commands.job import JobType
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, command, event


class BlockJobSpeed(Structure):
    """How fast a job may be.

    :param device: the job's id; QEMU calls it so.
    :param speed: bytes a second; 0 for no limit.
    """

    device: str
    speed: int


class BlockJobDevice(Structure):
    """:param device: the job's id; QEMU calls it so."""

    device: str


class BlockJobId(Structure):
    """:param id: the job's id."""

    id: str


class BlockJobCancel(Structure):
    """Which job is to end.

    :param device: the job's id; QEMU calls it so.
    :param force: makes no difference here: a job that is cancelled ends without completing.
    """

    device: str
    force: bool | UnsetType = UNSET


class BlockDeviceIoStatus(Enum):
    """Whether a request of a job failed; here a job that fails ends."""

    OK = "ok"
    FAILED = "failed"
    NOSPACE = "nospace"


class BlockJobInfo(Structure, kw_only=True):
    """A block job.

    :param type: its kind.
    :param device: its id.
    :param len: bytes that there are to do.
    :param offset: bytes that are done.
    :param busy: something is being done at this moment.
    :param paused: somebody asked for a pause.
    :param speed: the limit, bytes a second; 0 for none.
    :param io_status: always ok.
    :param ready: it can be completed.
    :param status: where it is in its life.
    :param auto_finalize: it becomes final without `job-finalize`.
    :param auto_dismiss: it vanishes when it has concluded.
    :param error: why it failed, or that it was cancelled.
    """

    type: JobType
    device: str
    len: int
    offset: int
    busy: bool
    paused: bool
    speed: int
    io_status: BlockDeviceIoStatus = BlockDeviceIoStatus.OK
    ready: bool
    status: JobStatus
    auto_finalize: bool
    auto_dismiss: bool
    error: str | UnsetType = UNSET


@event("BLOCK_JOB_PENDING")
class BlockJobPending(Structure):
    """A block job is done and waits for `job-finalize`.

    :param type: its kind.
    :param id: its id.
    """

    type: JobType
    id: str


@event("BLOCK_JOB_COMPLETED")
class BlockJobCompleted(Structure):
    """A block job has come to its end, or failed.

    :param type: its kind.
    :param device: its id.
    :param len: bytes that there were to do.
    :param offset: bytes that were done.
    :param speed: the limit, bytes a second; 0 for none.
    :param error: why it failed.
    """

    type: JobType
    device: str
    len: int
    offset: int
    speed: int
    error: str | UnsetType = UNSET


@event("BLOCK_JOB_CANCELLED")
class BlockJobCancelled(Structure):
    """A block job was cancelled.

    :param type: its kind.
    :param device: its id.
    :param len: bytes that there were to do.
    :param offset: bytes that were done.
    :param speed: the limit, bytes a second; 0 for none.
    """

    type: JobType
    device: str
    len: int
    offset: int
    speed: int


def _shown(known: Known) -> BlockJobInfo:
    job = known.info
    return BlockJobInfo(
        type=JobType(job.type),
        device=job.id,
        len=job.total_progress,
        offset=job.current_progress,
        busy=known.busy,
        paused=known.paused,
        speed=known.speed,
        ready=job.status in (JobStatus.READY, JobStatus.STANDBY),
        status=job.status,
        auto_finalize=known.auto_finalize,
        auto_dismiss=known.auto_dismiss,
        error=UNSET if job.error is None else job.error,
    )


@command("query-block-jobs")
def query_block_jobs(host: Host) -> list[BlockJobInfo]:
    """All block jobs, newest first."""
    return [_shown(each) for each in host.jobs.query_block()]


def _of_block_job(host: Host, id: str, verb: Callable[[str], None]) -> None:
    if all(each.info.id != id for each in host.jobs.query_block()):
        raise DeviceNotActive(f"Block job '{id}' not found")
    verb(id)


@command("block-job-pause")
def block_job_pause(host: Host, arguments: BlockJobDevice) -> None:
    """As `job-pause`, of a block job."""
    _of_block_job(host, arguments.device, host.jobs.pause)


@command("block-job-resume")
def block_job_resume(host: Host, arguments: BlockJobDevice) -> None:
    """As `job-resume`, of a block job."""
    _of_block_job(host, arguments.device, host.jobs.resume)


@command("block-job-cancel")
def block_job_cancel(host: Host, arguments: BlockJobCancel) -> None:
    """As `job-cancel`, of a block job."""
    _of_block_job(host, arguments.device, host.jobs.cancel)


@command("block-job-complete")
def block_job_complete(host: Host, arguments: BlockJobDevice) -> None:
    """As `job-complete`, of a block job."""
    _of_block_job(host, arguments.device, host.jobs.complete)


@command("block-job-finalize")
def block_job_finalize(host: Host, arguments: BlockJobId) -> None:
    """As `job-finalize`, of a block job."""
    _of_block_job(host, arguments.id, host.jobs.finalize)


@command("block-job-dismiss")
def block_job_dismiss(host: Host, arguments: BlockJobId) -> None:
    """As `job-dismiss`, of a block job."""
    _of_block_job(host, arguments.id, host.jobs.dismiss)


@command("block-job-set-speed")
def block_job_set_speed(host: Host, arguments: BlockJobSpeed) -> None:
    """Limit how much a job reads or writes in a second, of a disk or of machine state; 0 lifts the limit.

    It is the one word that QEMU has for it, so snapshot jobs take it, too. Only the background work is held; the guest is not, and
    what it asks for comes at once.
    """
    try:
        host.jobs.set_speed(arguments.device, arguments.speed)
    except NotFound as error:
        raise DeviceNotActive(f"Block job '{arguments.device}' not found") from error
