"""Commands on block nodes, and the events that they tell of themselves."""

from collections.abc import Mapping
from enum import Enum
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType, field

from stillframe.block import node as block
from stillframe.block.describe import named_block_node_json, snapshot_info_json
from stillframe.monitor.drives import fronts
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, command, event


class SnapshotInfo(Structure, kw_only=True):
    """A snapshot inside an image.

    :param id: unique in its image.
    :param name: its tag.
    :param vm_state_size: bytes of machine state; 0 for a snapshot of the disk alone.
    :param date_sec: when it was made: seconds since the epoch,
    :param date_nsec: and nanoseconds below a second.
    :param vm_clock_sec: the guest's clock then: seconds,
    :param vm_clock_nsec: and nanoseconds below a second.
    :param icount: instructions executed until then, where they are counted.
    """

    id: str
    name: str
    vm_state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_sec: int
    vm_clock_nsec: int
    icount: int | UnsetType = UNSET


class ImageInfo(Structure, kw_only=True):
    """What is known of an image.

    :param filename: of the image, or a description of it.
    :param format: the driver.
    :param dirty_flag: its metadata may need a repair; absent where a driver has none.
    :param actual_size: bytes that it takes on its storage.
    :param virtual_size: bytes of the disk.
    :param cluster_size: bytes of a cluster.
    :param encrypted: absent where it is not.
    :param backing_filename: as the image names it.
    :param full_backing_filename: the same, found from the working directory.
    :param backing_filename_format: as the image names it.
    :param snapshots: absent where there are none.
    :param backing_image: of the node below; absent in a flat list.
    :param format_specific: `type` and `data`, the driver's own.
    """

    filename: str
    format: str
    dirty_flag: bool | UnsetType = UNSET
    actual_size: int | UnsetType = UNSET
    virtual_size: int
    cluster_size: int | UnsetType = UNSET
    encrypted: bool | UnsetType = UNSET
    backing_filename: str | UnsetType = UNSET
    full_backing_filename: str | UnsetType = UNSET
    backing_filename_format: str | UnsetType = UNSET
    snapshots: list[SnapshotInfo] | UnsetType = UNSET
    backing_image: "ImageInfo | UnsetType" = UNSET
    format_specific: Any | UnsetType = UNSET


class CacheInfo(Structure):
    """How a node's writes are kept; always as a drive with a volatile cache, which the guest flushes."""

    writeback: bool = True
    direct: bool = False
    no_flush: bool = False


class BlockDeviceInfo(Structure, kw_only=True):
    """A node. Limits of its throughput do not exist here and read 0.

    :param file: the image's name.
    :param node_name: the node's.
    :param ro: read-only.
    :param drv: its driver.
    :param backing_file: the name of the image below, where there is one.
    :param backing_file_depth: how many images are below; 0 in a flat list.
    :param active: always.
    :param image: what is known of the image.
    """

    file: str
    node_name: str
    ro: bool
    drv: str
    backing_file: str | UnsetType = field(default=UNSET, name="backing_file")
    backing_file_depth: int = field(name="backing_file_depth")
    active: bool = True
    encrypted: bool
    detect_zeroes: str = field(default="off", name="detect_zeroes")
    bps: int = 0
    bps_rd: int = field(default=0, name="bps_rd")
    bps_wr: int = field(default=0, name="bps_wr")
    iops: int = 0
    iops_rd: int = field(default=0, name="iops_rd")
    iops_wr: int = field(default=0, name="iops_wr")
    write_threshold: int = field(default=0, name="write_threshold")
    cache: CacheInfo
    image: ImageInfo


class BlockInfo(Structure, kw_only=True):
    """A drive, or a device of the guest with a node behind it.

    :param device: the name of the drive; empty for the node of a device that is none.
    :param qdev: the device's own name; absent for a drive that no device uses.
    :param removable: whether no device uses it.
    :param io_status: `ok`; or `nospace` or `failed` while the guest is stopped for it; absent for a drive that no device uses.
    :param inserted: the node; absent for an empty drive.
    """

    device: str = ""
    qdev: str | UnsetType = UNSET
    type: str = "unknown"
    removable: bool = False
    locked: bool = False
    io_status: str | UnsetType = UNSET
    inserted: BlockDeviceInfo | UnsetType = UNSET


class Flatness(Structure):
    """:param flat: leave out the images below each image; they are listed as nodes of their own anyway."""

    flat: bool | UnsetType = UNSET


class NodeName(Structure):
    """:param node_name: the node's."""

    node_name: str


class BlockdevOptions(Structure, tag_field="driver", kw_only=True):
    """What every driver takes."""

    node_name: str
    read_only: bool | UnsetType = UNSET
    auto_read_only: bool | UnsetType = UNSET
    force_share: bool | UnsetType = UNSET
    discard: str | UnsetType = UNSET


class BlockdevOptionsFile(BlockdevOptions, tag="file", kw_only=True):
    """A file, or a block device, of the host."""

    filename: str
    locking: str | UnsetType = UNSET


class BlockdevOptionsRaw(BlockdevOptions, tag="raw", kw_only=True):
    """The bytes of the node below, or a part of them. `file` is a node-name, or options such as these."""

    file: Any
    offset: int | UnsetType = UNSET
    size: int | UnsetType = UNSET


class BlockdevOptionsQcow2(BlockdevOptions, tag="qcow2", kw_only=True):
    """A qcow2 image. `file` and `backing` are node-names, or options such as these; `backing` may be null for
    none.
    """

    file: Any
    backing: Any | UnsetType = UNSET


class BlockdevOptionsNull(BlockdevOptions, tag="null-co", kw_only=True):
    """Takes every write and forgets it."""

    size: int | UnsetType = UNSET
    latency_ns: int | UnsetType = UNSET
    read_zeroes: bool | UnsetType = UNSET


AnyBlockdevOptions = BlockdevOptionsFile | BlockdevOptionsRaw | BlockdevOptionsQcow2 | BlockdevOptionsNull


class IoOperationType(Enum):
    """What a request of the guest wanted."""

    READ = "read"
    WRITE = "write"


class BlockErrorAction(Enum):
    """What was done about an error."""

    IGNORE = "ignore"
    REPORT = "report"
    STOP = "stop"


@event("BLOCK_IO_ERROR")
class BlockIoError(Structure, kw_only=True):
    """A request of the guest failed.

    :param device: the guest's.
    :param node_name: the node that failed.
    :param operation: what the guest wanted.
    :param action: what was done about it; after `stop` the request is tried again at `cont`.
    :param nospace: for want of space.
    :param reason: in words.
    """

    device: str
    node_name: str | UnsetType = UNSET
    operation: IoOperationType
    action: BlockErrorAction
    nospace: bool | UnsetType = UNSET
    reason: str


def snapshot_info(snapshot: block.SnapshotInfo) -> SnapshotInfo:
    """A snapshot in the words of QMP."""
    return msgspec.convert(snapshot_info_json(snapshot), SnapshotInfo)


def _node(host: Host, node: block.Node, *, flat: bool) -> BlockDeviceInfo:
    shown = named_block_node_json(node, host.graph)
    if flat:
        shown["backing_file_depth"] = 0
        shown["image"].pop("backing-image", None)
    return msgspec.convert(shown, BlockDeviceInfo)


@command("query-named-block-nodes")
def query_named_block_nodes(host: Host, arguments: Flatness) -> list[BlockDeviceInfo]:
    """All nodes, newest first."""
    return [_node(host, node, flat=arguments.flat is True) for node in host.graph.nodes()]


@command("query-block")
def query_block(host: Host) -> list[BlockInfo]:
    """The drives, and the guest's devices with a node behind them that is none."""
    return [
        BlockInfo(
            device=front.drive,
            qdev=UNSET if front.disk is None else front.disk.device_id,
            removable=front.disk is None,
            io_status=UNSET if front.disk is None else front.disk.io_status(),
            inserted=UNSET if front.node is None else _node(host, front.node, flat=False),
        )
        for front in fronts(host)
    ]


@command("blockdev-add", unchecked=AnyBlockdevOptions)
def blockdev_add(host: Host, arguments: Mapping[str, Any]) -> None:
    """Open a node, and the nodes below it that are described inside it; all of them or none. Options that are
    known and not honoured are refused by name.
    """
    host.graph.blockdev_add(arguments)
    # It may be the image that others, interrupted together with it, are waiting for.
    host.snapshots.recover()


@command("blockdev-del")
def blockdev_del(host: Host, arguments: NodeName) -> None:
    """Close a node that was opened by name and that nobody uses."""
    host.graph.blockdev_del(arguments.node_name)
