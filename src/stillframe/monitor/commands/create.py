"""`blockdev-create`: new files, and formats written into nodes, as jobs."""

from enum import Enum
from typing import Any

from msgspec import UNSET, UnsetType

from stillframe.block import create as block
from stillframe.errors import Unsupported
from stillframe.jobs import JobContext
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, UInt64, command


class PreallocMode(Enum):
    """What of a new image has its place from the beginning."""

    OFF = "off"
    METADATA = "metadata"
    FALLOC = "falloc"
    FULL = "full"


class BlockdevQcow2Version(Enum):
    """Of the format."""

    V2 = "v2"
    V3 = "v3"


class BlockdevQcow2CompressionType(Enum):
    """How clusters are to be compressed, if any are."""

    ZLIB = "zlib"
    ZSTD = "zstd"


class BlockdevCreateOptions(Structure, tag_field="driver", kw_only=True):
    """What to create."""


class BlockdevCreateOptionsFile(BlockdevCreateOptions, tag="file", kw_only=True):
    """A file of zeroes.

    :param filename: its name; a file of that name must be empty.
    :param size: bytes.
    :param preallocation: falloc reserves the space, full writes the zeroes.
    :param nocow: only false is honoured.
    """

    filename: str
    size: UInt64
    preallocation: PreallocMode | UnsetType = UNSET
    nocow: bool | UnsetType = UNSET


class BlockdevCreateOptionsQcow2(BlockdevCreateOptions, tag="qcow2", kw_only=True):
    """An empty image, written into a node that nobody uses.

    :param file: the node's name.
    :param size: bytes of the disk.
    :param version: of the format; v3 if nothing is said.
    :param backing_file: the name to record of the image below.
    :param backing_fmt: its driver.
    :param cluster_size: bytes; 64 KiB if nothing is said.
    :param preallocation: what has its place from the beginning.
    :param lazy_refcounts: whether refcounts may be late.
    :param refcount_bits: width of a refcount; 16 if nothing is said.
    :param extended_l2: clusters of 32 parts.
    :param compression_type: zlib if nothing is said.
    """

    file: Any
    size: UInt64
    version: BlockdevQcow2Version | UnsetType = UNSET
    backing_file: str | UnsetType = UNSET
    backing_fmt: str | UnsetType = UNSET
    cluster_size: UInt64 | UnsetType = UNSET
    preallocation: PreallocMode | UnsetType = UNSET
    lazy_refcounts: bool | UnsetType = UNSET
    refcount_bits: int | UnsetType = UNSET
    extended_l2: bool | UnsetType = UNSET
    compression_type: BlockdevQcow2CompressionType | UnsetType = UNSET


class BlockdevCreateOptionsRaw(BlockdevCreateOptions, tag="raw", kw_only=True):
    """A raw image is its file: this is refused, as by QEMU."""


class BlockdevCreateOptionsNull(BlockdevCreateOptions, tag="null-co", kw_only=True):
    """Nothing can be created: this is refused, as by QEMU."""


AnyCreateOptions = (
    BlockdevCreateOptionsFile
    | BlockdevCreateOptionsQcow2
    | BlockdevCreateOptionsRaw
    | BlockdevCreateOptionsNull
)


class CreateArguments(Structure):
    """What to create.

    :param job_id: the id of the job to make.
    :param options: of the driver.
    """

    job_id: str
    options: AnyCreateOptions


@command("blockdev-create")
def blockdev_create(host: Host, arguments: CreateArguments) -> None:
    """Create a file, or write an empty qcow2 image into a node, as a job.

    A job that fails leaves no new file, and a node as empty as it was. What holds an image, or a file anything, is not replaced.
    """
    options = arguments.options
    if isinstance(options, BlockdevCreateOptionsRaw | BlockdevCreateOptionsNull):
        raise Unsupported("Driver does not support blockdev-create")

    def body(context: JobContext) -> None:
        context.point_of_no_return()
        if isinstance(options, BlockdevCreateOptionsFile):
            _create_file(options)
        else:
            _create_qcow2(host, options, f"job {arguments.job_id}")
        context.progress(1, 1)

    host.jobs.create(arguments.job_id, "create", body)


def _create_file(options: BlockdevCreateOptionsFile) -> None:
    if options.nocow is True:
        raise Unsupported("nocow is not supported")
    mode = PreallocMode.OFF if isinstance(options.preallocation, UnsetType) else options.preallocation
    block.create_file(options.filename, options.size, mode.value)


def _create_qcow2(host: Host, options: BlockdevCreateOptionsQcow2, user: str) -> None:
    if not isinstance(options.file, str):
        raise Unsupported(
            "Only a node's name is supported for 'file'", remedy="Open it with blockdev-add first."
        )
    node = host.graph.find(options.file)
    given: dict[str, Any] = {
        "backing_file": options.backing_file,
        "backing_format": options.backing_fmt,
        "cluster_size": options.cluster_size,
        "preallocation": _word(options.preallocation),
        "lazy_refcounts": options.lazy_refcounts,
        "refcount_bits": options.refcount_bits,
        "extended_l2": options.extended_l2,
        "compression_type": _word(options.compression_type),
        "compat": "0.10" if options.version is BlockdevQcow2Version.V2 else "1.1",
    }
    settings = {name: value for name, value in given.items() if not isinstance(value, UnsetType)}
    with host.graph.format(node, user):
        block.format_qcow2(node, options.size, settings)


def _word(choice: Enum | UnsetType) -> Any:
    return choice if isinstance(choice, UnsetType) else choice.value
