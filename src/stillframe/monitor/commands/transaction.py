"""`transaction`, and `blockdev-backup`, which is one of a single action: several things to one instant of the disks, or none.

prepare   each action in order: everything that can be refused; jobs are `created`     a refusal: the jobs vanish
instant   the guest's requests are held, all disks are frozen
commit    the snapshots become final together; then the jobs begin
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from enum import Enum
from typing import assert_never

from msgspec import UNSET, UnsetType

from stillframe.block.backup import Backup
from stillframe.block.node import Node
from stillframe.errors import InvalidRequest, Refused, Unsupported
from stillframe.jobs import Job, JobContext, JobGroup, JobHooks
from stillframe.monitor.commands.internal_snapshots import BlockdevSnapshotInternal
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Nothing, Structure, command
from stillframe.snapshots.internal import Instant


class MirrorSyncMode(Enum):
    """What of the source is copied; `full`, all of it, is what is done here."""

    TOP = "top"
    FULL = "full"
    NONE = "none"
    INCREMENTAL = "incremental"
    BITMAP = "bitmap"


class BitmapSyncMode(Enum):
    """What becomes of a bitmap; there are none here."""

    ON_SUCCESS = "on-success"
    NEVER = "never"
    ALWAYS = "always"


class BlockdevOnError(Enum):
    """What to do about an error of a disk; `report`, which ends the job, is what is done here."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"


class BlockdevBackup(Structure, kw_only=True):
    """What to copy where.

    :param job_id: the id of the job to make.
    :param device: the source: the guest's device, or the node.
    :param sync: only `full` is honoured.
    :param speed: at most so many bytes a second; 0, the default, for no limit.
    :param bitmap: refused: there are none.
    :param bitmap_mode: refused: there are none.
    :param compress: store clusters compressed, where the target is a qcow2 image.
    :param on_source_error: only `report` is honoured.
    :param on_target_error: only `report` is honoured.
    :param auto_finalize: with false the job stays `pending` until `job-finalize`.
    :param auto_dismiss: with false the job stays `concluded` until `job-dismiss`.
    :param filter_node_name: refused: there is no node between the guest and its disk.
    :param discard_source: only false is honoured.
    :param target: the node to copy to, of the same size; what it held is lost.
    """

    job_id: str | UnsetType = UNSET
    device: str
    sync: MirrorSyncMode
    speed: int | UnsetType = UNSET
    bitmap: str | UnsetType = UNSET
    bitmap_mode: BitmapSyncMode | UnsetType = UNSET
    compress: bool | UnsetType = UNSET
    on_source_error: BlockdevOnError | UnsetType = UNSET
    on_target_error: BlockdevOnError | UnsetType = UNSET
    auto_finalize: bool | UnsetType = UNSET
    auto_dismiss: bool | UnsetType = UNSET
    filter_node_name: str | UnsetType = UNSET
    discard_source: bool | UnsetType = UNSET
    target: str


class TransactionAction(Structure, tag_field="type"):
    """One of several things."""


class AbortAction(TransactionAction, tag="abort"):
    """Refuses the transaction, which shows what becomes of the other actions then. :param data: empty."""

    data: Nothing


class BackupAction(TransactionAction, tag="blockdev-backup"):
    """As the command of that name. :param data: its arguments."""

    data: BlockdevBackup


class SnapshotAction(TransactionAction, tag="blockdev-snapshot-internal-sync"):
    """As the command of that name. :param data: its arguments."""

    data: BlockdevSnapshotInternal


AnyTransactionAction = AbortAction | BackupAction | SnapshotAction


class ActionCompletionMode(Enum):
    """Whether the jobs of a transaction end each for itself, or become final together or not at all."""

    INDIVIDUAL = "individual"
    GROUPED = "grouped"


class TransactionProperties(Structure):
    """:param completion_mode: of the jobs; `individual` if nothing is said."""

    completion_mode: ActionCompletionMode | UnsetType = UNSET


class Transaction(Structure):
    """What to do.

    :param actions: in this order, as far as refusals go; what they do has one instant.
    :param properties: how.
    """

    actions: list[AnyTransactionAction]
    properties: TransactionProperties | UnsetType = UNSET


@command("blockdev-backup")
def blockdev_backup(host: Host, arguments: BlockdevBackup) -> None:
    """Copy a disk as it is now onto another node, as a job, while the guest goes on.

    A source that is written meanwhile has to be a qcow2 image; of it no snapshot is made, deleted or applied until the copy is
    done. Waits for its turn among the machine's snapshot jobs.
    """
    _transact(host, [BackupAction(arguments)], None)


@command("transaction")
def transaction(host: Host, arguments: Transaction) -> None:
    """Snapshots and backups of several disks at one instant: all of them are made, or begun, or none.

    Waits for its turn among the machine's snapshot jobs.
    """
    properties = arguments.properties
    is_grouped = (
        not isinstance(properties, UnsetType) and properties.completion_mode is ActionCompletionMode.GROUPED
    )
    for action in arguments.actions:
        if is_grouped and not isinstance(action, BackupAction):
            raise InvalidRequest(
                f"Action '{type(action).__struct_config__.tag}' does not support transaction property "
                "completion-mode = grouped"
            )
    _transact(host, arguments.actions, JobGroup() if is_grouped else None)


def _transact(host: Host, actions: Sequence[AnyTransactionAction], group: JobGroup | None) -> None:
    if not actions:
        return

    def body(context: JobContext) -> None:
        with host.snapshots.instant() as (instant, find), ExitStack() as undo:
            begun: list[Backup] = []
            jobs: list[Job] = []
            undo.callback(lambda: host.jobs.withdraw(jobs))
            for action in actions:
                if isinstance(action, BackupAction):
                    _prepare_backup(host, action.data, find, group, begun, jobs)
                else:
                    _prepare(action, instant, find)

            def begin() -> None:
                for backup in begun:
                    backup.begin()

            instant.happen(begin)
            undo.pop_all()
            host.jobs.start(jobs)

    host.jobs.run_internal("transaction", body, queue=host.snapshots.queue)


def _prepare(
    action: AbortAction | SnapshotAction,
    instant: Instant,
    find: Callable[[str], Node],
) -> None:
    if isinstance(action, AbortAction):
        raise Refused("Transaction aborted using Abort action")
    if isinstance(action, SnapshotAction):
        instant.add(find(action.data.device), action.data.device, action.data.name)
    else:
        assert_never(action)


def _prepare_backup(
    host: Host,
    asked: BlockdevBackup,
    find: Callable[[str], Node],
    group: JobGroup | None,
    begun: list[Backup],
    jobs: list[Job],
) -> None:
    source, target = find(asked.device), find(asked.target)
    _refuse_what_is_not_honoured(asked)
    id = "" if isinstance(asked.job_id, UnsetType) else asked.job_id
    backup = Backup(host.graph, source, target, f"job {id}", compress=asked.compress is True)
    try:
        job = host.jobs.prepare(
            id,
            "backup",
            lambda context: _run(backup, context),
            # What was written to the target stays there: to take the work back is to say that it is no backup.
            JobHooks(abort=lambda: None, release=backup.release, is_block=True),
            auto_finalize=asked.auto_finalize is not False,
            auto_dismiss=asked.auto_dismiss is not False,
            speed=0 if isinstance(asked.speed, UnsetType) else asked.speed,
            total=backup.size,
            group=group,
        )
    except BaseException:
        backup.release()
        raise
    begun.append(backup)
    jobs.append(job)


def _run(backup: Backup, context: JobContext) -> None:
    before = 0

    def progress(done: int, total: int) -> None:
        nonlocal before
        context.progress(done, total)
        # The last piece is not waited for: there is nothing behind it.
        if done < total:
            context.moved(done - before)
        else:
            context.checkpoint()
        before = done

    context.progress(0, backup.size)
    backup.run(progress)


def _refuse_what_is_not_honoured(asked: BlockdevBackup) -> None:
    if asked.sync in (MirrorSyncMode.INCREMENTAL, MirrorSyncMode.BITMAP) and isinstance(
        asked.bitmap, UnsetType
    ):
        raise InvalidRequest(f"must provide a valid bitmap name for '{asked.sync.value}' sync mode")
    if not isinstance(asked.bitmap, UnsetType):
        raise InvalidRequest(f"Bitmap '{asked.bitmap}' could not be found")
    if not isinstance(asked.bitmap_mode, UnsetType):
        raise InvalidRequest("Cannot specify bitmap sync mode without a bitmap")
    if asked.sync is not MirrorSyncMode.FULL:
        raise Unsupported(f"sync={asked.sync.value} is not supported", remedy="Use sync=full.")
    for name, value in (("source", asked.on_source_error), ("target", asked.on_target_error)):
        if isinstance(value, BlockdevOnError) and value is not BlockdevOnError.REPORT:
            raise Unsupported(f"on-{name}-error={value.value} is not supported", remedy="Use report.")
    if not isinstance(asked.filter_node_name, UnsetType):
        raise Unsupported("filter-node-name is not supported: there is no such node")
    if asked.discard_source is True:
        raise Unsupported("discard-source is not supported")
