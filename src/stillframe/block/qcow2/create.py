"""New images."""

from typing import Literal

from stillframe.block.node import Node
from stillframe.block.qcow2.image_file import ImageFile
from stillframe.block.qcow2.layout import (
    COMPRESSION_TYPE,
    DATA_FILE,
    EXTENDED_L2,
    EXTENSION_BACKING_FORMAT,
    EXTENSION_DATA_FILE,
    EXTENSION_FEATURE_NAMES,
    LAZY_REFCOUNTS,
    MAX_CLUSTER_BITS,
    MAX_L1_BYTES,
    MAX_REFCOUNT_TABLE_BYTES,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_CLUSTER_BITS,
    RAW_DATA_FILE,
    Header,
    feature_names,
    pack_header,
)
from stillframe.errors import InvalidRequest

Compat = Literal["0.10", "1.1"]
Preallocation = Literal["off", "metadata", "falloc", "full"]

_BLOCKS_AT_ONCE = 16


def create_image(
    file: Node,
    size: int,
    *,
    cluster_size: int = 65536,
    refcount_bits: int = 16,
    compat: Compat = "1.1",
    backing_file: str | None = None,
    backing_format: str | None = None,
    lazy_refcounts: bool = False,
    compression_type: str = "zlib",
    preallocation: Preallocation = "off",
    extended_l2: bool = False,
    data: Node | None = None,
    data_file: str | None = None,
    data_file_raw: bool = False,
) -> None:
    """Make a node hold an empty image; what it held is lost. Everything is durable at the return.

    :param file: open and writable; made as long as the image's tables, and the disk where that is preallocated.
    :param extended_l2: clusters are allocated in 32 parts; they have at least 16 KiB.
    :param data: open and writable, empty: where guest data is to lie; made as long as the disk.
    :param data_file: its name, to be recorded. :param data_file_raw: it is to be the disk as a raw image at all times.
    :param size: of the disk, in bytes; rounded up to a multiple of 512.
    :param cluster_size: a power of two from 512 to 2 MiB. :param refcount_bits: a power of two from 1 to 64.
    :param backing_file: the name to record; it is not opened. :param backing_format: the driver to record with it.
    :param compression_type: "zlib" or "zstd": how clusters are to be compressed, if any are.
    :param preallocation: "metadata" allocates every cluster, of which the bytes stay holes in the file; "falloc" reserves
        space for them, too, and "full" writes their zeroes.
    :raise InvalidRequest: an option out of its bounds, in QEMU's words.
    """
    cluster_bits = cluster_size.bit_length() - 1
    if cluster_size != 1 << cluster_bits or not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise InvalidRequest("Cluster size must be a power of two between 512 and 2048k")
    order = refcount_bits.bit_length() - 1
    if refcount_bits < 1 or refcount_bits != 1 << order or order > 6:
        raise InvalidRequest("Refcount width must be a power of two and may not exceed 64 bits")
    if compat not in ("0.10", "1.1"):
        raise InvalidRequest(f"Invalid compatibility level: '{compat}'")
    if compat == "0.10" and refcount_bits != 16:
        raise InvalidRequest(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)"
        )
    if compat == "0.10" and lazy_refcounts:
        raise InvalidRequest(
            "Lazy refcounts only supported with compatibility level 1.1 and above (use version=v3 or greater)"
        )
    if compression_type not in ("zlib", "zstd"):
        raise InvalidRequest(f"Parameter 'compression-type' does not accept value '{compression_type}'")
    if compat == "0.10" and compression_type != "zlib":
        raise InvalidRequest(
            "Non-zlib compression type is only supported with compatibility level 1.1 and above "
            "(use version=v3 or greater)"
        )
    if extended_l2 and compat == "0.10":
        raise InvalidRequest(
            "Extended L2 entries are only supported with compatibility level 1.1 and above (use version=v3 or greater)"
        )
    if extended_l2 and cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise InvalidRequest(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes"
        )
    if data_file_raw and data_file is None:
        raise InvalidRequest("data-file-raw requires data-file")
    if data_file_raw and backing_file is not None:
        raise InvalidRequest("Backing file and data-file-raw cannot be used at the same time")
    if data_file is not None and compat == "0.10":
        raise InvalidRequest(
            "External data files are only supported with compatibility level 1.1 and above (use version=v3 or greater)"
        )
    if (data is None) != (data_file is None):
        raise InvalidRequest("A data file and its name go together")
    if backing_format is not None and backing_file is None:
        raise InvalidRequest("Backing format cannot be used without backing file")
    if preallocation != "off" and backing_file is not None and not extended_l2:
        raise InvalidRequest(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on"
        )
    size = -(-size // 512) * 512
    if size < 0:
        raise InvalidRequest("Image size must not be negative")
    extensions: list[tuple[int, bytes]] = []
    if backing_format is not None:
        extensions.append((EXTENSION_BACKING_FORMAT, backing_format.encode()))
    if data_file is not None:
        extensions.append((EXTENSION_DATA_FILE, data_file.encode("utf-8", "surrogateescape")))
    if compat == "1.1" and cluster_size >= 4096:
        extensions.append((EXTENSION_FEATURE_NAMES, feature_names()))
    header = Header(
        version=3 if compat == "1.1" else 2,
        cluster_bits=cluster_bits,
        size=size,
        l1_size=0,
        l1_offset=0,
        refcount_table_offset=cluster_size,
        refcount_table_clusters=1,
        incompatible=(COMPRESSION_TYPE if compression_type != "zlib" else 0)
        | (DATA_FILE if data_file is not None else 0)
        | (EXTENDED_L2 if extended_l2 else 0),
        compression_type=int(compression_type != "zlib"),
        compatible=LAZY_REFCOUNTS if lazy_refcounts else 0,
        autoclear=RAW_DATA_FILE if data_file_raw else 0,
        refcount_order=order,
        extensions=tuple(extensions),
        backing_name=(backing_file or "").encode("utf-8", "surrogateescape"),
    )
    if data is not None:
        data.truncate(size)
    _write_tables(ImageFile(file), data, header, preallocation)


def _write_tables(file: ImageFile, data: Node | None, empty: Header, preallocation: Preallocation) -> None:
    """Header, refcount table, refcount blocks, L1, L2, in this order; the header last, when the others are durable.

    There are L2 tables from the start where the image is preallocated, and where the data file is raw: whoever fills that file
    himself finds the bytes in the image.
    """
    from dataclasses import replace

    size, per_block = empty.cluster_size, empty.refcounts_in_block
    l1_size = empty.l1_entries_for(empty.size)
    if l1_size * 8 > MAX_L1_BYTES:
        raise InvalidRequest(
            "Image size is too large for this cluster size", remedy="Choose larger clusters."
        )
    l1_clusters = empty.clusters_for(l1_size * 8)
    has_tables = preallocation != "off" or empty.is_data_file_raw
    l2_tables = l1_size if has_tables else 0
    data_clusters = 0 if preallocation == "off" or empty.has_data_file else empty.clusters_for(empty.size)
    blocks = table = 1
    while True:
        used = 1 + table + blocks + l1_clusters + l2_tables + data_clusters
        wanted = -(-used // per_block), empty.clusters_for(-(-used // per_block) * 8)
        if wanted == (blocks, table):
            break
        blocks, table = wanted
    if table * size > MAX_REFCOUNT_TABLE_BYTES:
        raise InvalidRequest(
            "Image size is too large for this cluster size", remedy="Choose larger clusters."
        )
    first_block = 1 + table
    header = replace(
        empty,
        l1_size=l1_size,
        l1_offset=(first_block + blocks) * size,
        refcount_table_clusters=table,
    )
    first = pack_header(header)
    if file.node.driver == "file":
        file.node.truncate(0)
    file.grow(used * size)
    entries = b"".join(((first_block + n) * size).to_bytes(8, "big") for n in range(blocks))
    file.write(size, entries.ljust(table * size, b"\0"))
    for block in range(0, blocks, _BLOCKS_AT_ONCE):
        count = min(_BLOCKS_AT_ONCE, blocks - block)
        ones = min(count * per_block, used - block * per_block)
        counts = _refcounts_of_one(ones, count * size, empty.refcount_bits)
        file.write((first_block + block) * size, counts)
    file.write(header.l1_offset, bytes(l1_clusters * size))
    if has_tables:
        from stillframe.block.qcow2.preallocation import take_space, write_mapped_tables

        first_table = first_block + blocks + l1_clusters
        first_data = 0 if data is not None else first_table + l2_tables
        write_mapped_tables(file, header, first_table, first_data)
        take_space(data or file.node, first_data * size, empty.size, preallocation)
    if data is not None:
        data.flush()
    file.flush()
    file.write(0, first.ljust(size, b"\0"))
    file.flush()


def _refcounts_of_one(count: int, length: int, bits: int) -> bytes:
    """Refcount blocks that begin with so many ones."""
    if bits >= 8:
        ones = (1).to_bytes(bits // 8, "big") * count
    else:
        per_octet = 8 // bits
        full = sum(1 << bits * n for n in range(per_octet))
        ones = bytes([full]) * (count // per_octet)
        if count % per_octet:
            ones += bytes([sum(1 << bits * n for n in range(count % per_octet))])
    return ones.ljust(length, b"\0")
