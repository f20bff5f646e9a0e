"""The header of a qcow2 image and its extensions, and the words of its tables. All integers are big-endian.

    cluster 0
    ┌───────────────────────────────────────────────────────────────────────────┐
    │   0  magic "QFI\\xfb"             4   version                        4      │
    │   8  backing name offset         8   backing name length            4      │
    │  20  cluster bits                4                                         │
    │  24  disk size                   8 ┐                                       │
    │  32  encryption method           4 │                                       │
    │  36  L1 entries                  4 │                                       │
    │  40  L1 offset                   8 │ the world: one write of these bytes,   │
    │  48  refcount table offset       8 │ inside the first sector, switches      │
    │  56  refcount table clusters     4 │ between two whole sets of tables       │
    │  60  snapshots                   4 │                                       │
    │  64  snapshot table offset       8 ┘                                       │
    │  72  incompatible features       8   ┐                                     │
    │  80  compatible features         8   │                                     │
    │  88  autoclear features          8   │ version 3 only                      │
    │  96  refcount order              4   │                                     │
    │ 100  header length               4   │                                     │
    │ 104  compression type 1, padding 7   ┘ from header length 112 on           │
    │   h  extensions: type 4, length 4, data, padding to 8; type 0 ends them   │
    │   b  backing name                                                         │
    └───────────────────────────────────────────────────────────────────────────┘

    L1 entry  63 COPIED │ 55..9 L2 table offset
    L2 entry  63 COPIED │ 62 = 0 │ 55..9 host offset │ 0 reads as zeroes
    extended L2 entry: a further word   63..32 subclusters that read as zeroes │ 31..0 subclusters that are allocated
    L2 entry  62 = 1 compressed │ x..61 further 512-byte sectors │ 0..x-1 host offset, x = 70 - cluster bits

Autoclear bits 32 to 63 are the number of our record of unflushed entries (unflushed.py), or 0.

COPIED promises a refcount of exactly one; it is only accurate in the active tables.
"""

import struct
from dataclasses import dataclass, replace

from stillframe.errors import ImageCorrupt, InvalidRequest, Unsupported

MAGIC = 0x514649FB
COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET_MASK = 0x00FFFFFFFFFFFE00
L1_RESERVED = 0x7F000000000001FF
L2_RESERVED = 0x3F000000000001FE
REFCOUNT_TABLE_RESERVED = 0x1FF

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MIN_EXTENDED_CLUSTER_BITS = 14
"""With extended L2 entries: a subcluster is a 32nd of a cluster, and has at least 512 bytes."""
MAX_L1_BYTES = 32 << 20
MAX_REFCOUNT_TABLE_BYTES = 8 << 20
MAX_OFFSET = 1 << 56
MAX_BACKING_NAME = 1023

DIRTY, CORRUPT, DATA_FILE, COMPRESSION_TYPE, EXTENDED_L2 = (1 << bit for bit in range(5))
LOADING = 1 << 62
"""Ours, in a header alone and never in a `Header` of an open image: see first_sector.py and marks.py."""
VERSION_2_LOADING = 0x53460002
LAZY_REFCOUNTS = 1
BITMAPS_CONSISTENT, RAW_DATA_FILE = 1, 2
RECORD_NUMBER_SHIFT = 32
OTHER_AUTOCLEAR = (1 << RECORD_NUMBER_SHIFT) - 1

EXTENSION_END = 0
EXTENSION_BACKING_FORMAT = 0xE2792ACA
EXTENSION_FEATURE_NAMES = 0x6803F857
EXTENSION_BITMAPS = 0x23852875
EXTENSION_DATA_FILE = 0x44415441

WORLD_OFFSET = 24
FEATURES_OFFSET = 72

_FIXED = struct.Struct(">IIQIIQIIQQIIQ")
_WORLD = struct.Struct(">QIIQQIIQ")
_FEATURES = struct.Struct(">QQQ")
_VERSION_3 = struct.Struct(">QQQII")
_EXTENSION = struct.Struct(">II")
_FEATURE_NAME = struct.Struct(">BB46s")

_FEATURE_TABLE = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)


@dataclass(frozen=True, slots=True)
class Header:
    """A header that `parse` found to be within every bound; the names are the diagram's.

    :param header_length: bytes before the extensions; 72 in version 2.
    :param extensions: type and data, in order, the unknown ones too.
    """

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int = 0
    snapshots_offset: int = 0
    crypt_method: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = 112
    compression_type: int = 0
    extensions: tuple[tuple[int, bytes], ...] = ()
    backing_name: bytes = b""

    @property
    def cluster_size(self) -> int:
        """Bytes."""
        return 1 << self.cluster_bits

    @property
    def has_extended_l2(self) -> bool:
        """Whether an L2 entry is two words, the second of which speaks of the cluster's 32 parts."""
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def has_data_file(self) -> bool:
        """Whether guest data lies in a file of its own."""
        return bool(self.incompatible & DATA_FILE)

    @property
    def is_data_file_raw(self) -> bool:
        """Whether the data file, without these tables, is the disk: a raw image. A backing file contradicts that."""
        return self.has_data_file and bool(self.autoclear & RAW_DATA_FILE) and not self.backing_name

    @property
    def l2_entry_words(self) -> int:
        """64-bit words of one L2 entry: 1, or 2 with extended L2 entries."""
        return 2 if self.has_extended_l2 else 1

    @property
    def l2_entries(self) -> int:
        """Entries of one L2 table."""
        return self.cluster_size // (8 * self.l2_entry_words)

    @property
    def l2_span(self) -> int:
        """Bytes of the disk that one L2 table maps."""
        return self.cluster_size * self.l2_entries

    @property
    def refcount_bits(self) -> int:
        """The width of one refcount."""
        return 1 << self.refcount_order

    @property
    def refcounts_in_block(self) -> int:
        """Refcounts of one refcount block."""
        return self.cluster_size * 8 >> self.refcount_order

    def l1_entries_for(self, size: int) -> int:
        """L1 entries that a disk of this many bytes needs; the state area begins at the next."""
        return -(-size // self.l2_span)

    def clusters_for(self, length: int) -> int:
        """Clusters that hold this many bytes."""
        return -(-length // self.cluster_size)

    def extension(self, kind: int) -> bytes | None:
        """The data of the first extension of this type."""
        return next((data for found, data in self.extensions if found == kind), None)

    @property
    def compression_name(self) -> str:
        """ "zlib" or "zstd"."""
        return ("zlib", "zstd")[self.compression_type]

    def pack_world(self) -> bytes:
        """Bytes 24..71, for one write at `WORLD_OFFSET`."""
        return _WORLD.pack(
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.snapshot_count,
            self.snapshots_offset,
        )

    def with_world(self, packed: bytes) -> "Header":
        """This header with other bytes 24..71. :raise ImageCorrupt: a number of theirs is out of its bounds."""
        size, crypt_method, l1_size, l1_offset, table, clusters, count, snapshots = _WORLD.unpack(packed)
        header = replace(
            self,
            size=size,
            crypt_method=crypt_method,
            l1_size=l1_size,
            l1_offset=l1_offset,
            refcount_table_offset=table,
            refcount_table_clusters=clusters,
            snapshot_count=count,
            snapshots_offset=snapshots,
        )
        _check_bounds(header)
        return header

    def pack_features(self, further: int = 0) -> bytes:
        """Bytes 72..95, for one write at `FEATURES_OFFSET`; version 3 only. :param further: incompatible bits."""
        return _FEATURES.pack(self.incompatible | further, self.compatible, self.autoclear)

    @property
    def extensions_offset(self) -> int:
        """Where the extensions begin."""
        return 72 if self.version == 2 else self.header_length


def pack_extensions(extensions: tuple[tuple[int, bytes], ...]) -> bytes:
    """Header extensions, with the one that ends them."""
    return b"".join(
        _EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)
        for kind, data in (*extensions, (EXTENSION_END, b""))
    )


def pack_header(header: Header) -> bytes:
    """The first bytes of a new image: header, extensions, backing name.

    :raise InvalidRequest: they do not fit into one cluster, or the name is too long.
    """
    extensions = pack_extensions(header.extensions)
    length = header.extensions_offset
    name_offset = length + len(extensions) if header.backing_name else 0
    if len(header.backing_name) > MAX_BACKING_NAME:
        raise InvalidRequest("Backing file name too long")
    if length + len(extensions) + len(header.backing_name) > header.cluster_size:
        raise InvalidRequest("The header and the backing file name do not fit into one cluster of the image")
    fixed = _FIXED.pack(
        MAGIC,
        header.version,
        name_offset,
        len(header.backing_name),
        header.cluster_bits,
        header.size,
        header.crypt_method,
        header.l1_size,
        header.l1_offset,
        header.refcount_table_offset,
        header.refcount_table_clusters,
        header.snapshot_count,
        header.snapshots_offset,
    )
    if header.version >= 3:
        fixed += _VERSION_3.pack(
            header.incompatible, header.compatible, header.autoclear, header.refcount_order, length
        )
        fixed += bytes([header.compression_type])
        fixed += bytes(length - len(fixed))
    return fixed + extensions + header.backing_name


def feature_names() -> bytes:
    """The data of the extension that names the feature bits, for tools that do not know them."""
    return b"".join(
        _FEATURE_NAME.pack(kind, bit, name.encode().ljust(46, b"\0")) for kind, bit, name in _FEATURE_TABLE
    )


def loading_name() -> bytes:
    """The same for the bit `LOADING` alone."""
    return _FEATURE_NAME.pack(
        0, LOADING.bit_length() - 1, b"unfinished load of several images".ljust(46, b"\0")
    )


def parse_header(data: bytes) -> Header:
    """The header at the start of an image, every number within its bounds.

    :param data: the image's first bytes, as many as the largest cluster if there are so many.
    :raise InvalidRequest: not a qcow2 image at all.
    :raise Unsupported: a version or feature that stillframe does not do, by name.
    :raise ImageCorrupt: a number out of its bounds, in QEMU's words.
    """
    if len(data) < _FIXED.size or int.from_bytes(data[:4], "big") != MAGIC:
        raise InvalidRequest(
            "Image is not in qcow2 format", remedy="Name the image's own format, as driver=raw."
        )
    (
        _magic,
        version,
        name_offset,
        name_length,
        cluster_bits,
        size,
        crypt_method,
        l1_size,
        l1_offset,
        table_offset,
        table_clusters,
        snapshot_count,
        snapshots_offset,
    ) = _FIXED.unpack_from(data)
    loading = LOADING if version == VERSION_2_LOADING else 0
    version = 2 if loading else version
    if version not in (2, 3):
        raise Unsupported(f"Unsupported qcow2 version {version}")
    if not MIN_CLUSTER_BITS <= cluster_bits <= MAX_CLUSTER_BITS:
        raise ImageCorrupt(f"Unsupported cluster size: 2^{cluster_bits}")
    cluster_size = 1 << cluster_bits
    cluster = data[:cluster_size]
    if version == 2:
        incompatible, compatible, autoclear = loading, 0, 0
        order, length, compression_type = 4, 72, 0
    else:
        if len(data) < 104:
            raise ImageCorrupt("The image ends inside its header")
        incompatible, compatible, autoclear, order, length = _VERSION_3.unpack_from(data, 72)
        if length < 104:
            raise ImageCorrupt("qcow2 header too short")
        if length > len(cluster):
            raise ImageCorrupt("qcow2 header exceeds cluster size")
        compression_type = data[104] if length > 104 else 0
    if name_offset > cluster_size or name_offset > len(data):
        raise ImageCorrupt("Invalid backing file offset")
    header = Header(
        version=version,
        cluster_bits=cluster_bits,
        size=size,
        l1_size=l1_size,
        l1_offset=l1_offset,
        refcount_table_offset=table_offset,
        refcount_table_clusters=table_clusters,
        snapshot_count=snapshot_count,
        snapshots_offset=snapshots_offset,
        crypt_method=crypt_method,
        incompatible=incompatible,
        compatible=compatible,
        autoclear=autoclear,
        refcount_order=order,
        header_length=length,
        compression_type=compression_type,
        extensions=_parse_extensions(cluster, length, name_offset or len(cluster)),
    )
    if name_offset:
        if name_length > min(MAX_BACKING_NAME, cluster_size - name_offset):
            raise ImageCorrupt("Backing file name too long")
        header = replace(header, backing_name=bytes(data[name_offset : name_offset + name_length]))
    _check_features(header)
    _check_bounds(header)
    return header


def _parse_extensions(cluster: bytes, offset: int, end: int) -> tuple[tuple[int, bytes], ...]:
    found: list[tuple[int, bytes]] = []
    while offset + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(cluster, offset)
        offset += _EXTENSION.size
        if kind == EXTENSION_END:
            break
        if length > end - offset:
            raise ImageCorrupt("Header extension too large")
        found.append((kind, bytes(cluster[offset : offset + length])))
        offset += -(-length // 8) * 8
    return tuple(found)


def _check_features(header: Header) -> None:
    known = DIRTY | CORRUPT | DATA_FILE | COMPRESSION_TYPE | EXTENDED_L2 | LOADING
    unknown = header.incompatible & ~known
    if unknown:
        raise Unsupported(f"Unsupported qcow2 feature(s): {_names_of(unknown, header)}")
    if header.has_extended_l2 and header.cluster_bits < MIN_EXTENDED_CLUSTER_BITS:
        raise ImageCorrupt(f"Unsupported subcluster size: {header.cluster_size // 32}")
    if header.crypt_method:
        kind = {1: "AES", 2: "LUKS"}.get(header.crypt_method)
        if kind is None:
            raise ImageCorrupt(f"Unsupported encryption method {header.crypt_method}")
        raise Unsupported(f"Unsupported qcow2 feature(s): {kind} encryption")
    if header.compression_type > 1:
        raise Unsupported(f"qcow2: unknown compression type: {header.compression_type}")
    if (header.compression_type != 0) != bool(header.incompatible & COMPRESSION_TYPE):
        raise ImageCorrupt("qcow2: Compression type and its incompatible feature bit contradict each other")


def _names_of(bits: int, header: Header) -> str:
    """Unknown incompatible bits by the names that the image itself gives them, as QEMU words it."""
    table = header.extension(EXTENSION_FEATURE_NAMES) or b""
    names: list[str] = []
    for at in range(0, len(table) - _FEATURE_NAME.size + 1, _FEATURE_NAME.size):
        kind, bit, name = _FEATURE_NAME.unpack_from(table, at)
        if kind == 0 and bit < 64 and bits & (1 << bit):
            names.append(name.rstrip(b"\0").decode("utf-8", "replace"))
            bits &= ~(1 << bit)
    if bits:
        names.append(f"Unknown incompatible feature: {bits:x}")
    return ", ".join(names)


def _check_bounds(header: Header) -> None:
    inside = header.cluster_size - 1
    if header.refcount_order > 6:
        raise ImageCorrupt("Reference count entry width too large; may not exceed 64 bits")
    if header.refcount_table_clusters == 0:
        raise ImageCorrupt("Image does not contain a reference count table")
    if header.refcount_table_clusters * header.cluster_size > MAX_REFCOUNT_TABLE_BYTES:
        raise ImageCorrupt("Reference count table too large")
    if not aligned(header.refcount_table_offset, inside):
        raise ImageCorrupt("Reference count table offset invalid")
    if header.l1_size * 8 > MAX_L1_BYTES:
        raise ImageCorrupt("Active L1 table too large")
    if header.l1_size and not aligned(header.l1_offset, inside):
        raise ImageCorrupt("Active L1 table offset invalid")
    if header.l1_entries_for(header.size) * 8 > MAX_L1_BYTES:
        raise ImageCorrupt("Image is too big")
    if header.l1_size < header.l1_entries_for(header.size):
        raise ImageCorrupt("L1 table is too small")


def aligned(offset: int, inside: int) -> bool:
    """Whether a table may lie at this offset: a cluster's start, not the header's, below the format's end.

    :param inside: the cluster size less one.
    """
    return 0 < offset < MAX_OFFSET and not offset & inside
