"""An L2 entry as one number, and what it says of its guest cluster.

    plain       63 COPIED │ 62 = 0 │ 55..9 host offset │ 0 reads as zeroes
    extended    127..96 reads as zeroes │ 95..64 allocated: a bit for each subcluster │ 63..0 as above, without bit 0
    compressed  62 = 1, the other bits of 63..0 as layout.py draws them; extended: 127..64 are zero

In the file an extended entry is two words, bits 63..0 first. A plain cluster has one subcluster, itself. Where guest data lies in
a file of its own, an entry with COPIED has its place there even at offset 0, and that place is the guest's own offset.
"""

import struct

from stillframe.block.qcow2.layout import COMPRESSED, COPIED, MAX_OFFSET, OFFSET_MASK, ZERO, Header
from stillframe.errors import ImageCorrupt

_WORD = (1 << 64) - 1
_OWN_DATA = COPIED | COMPRESSED | ZERO


class L2Format:
    """How the L2 entries of an image are to be read and made.

    :ivar is_plain: entries are a word, and clusters lie in the image file. :ivar entry_size: bytes.
    :ivar subclusters: of one cluster. :ivar every: the mask of all of them.
    """

    def __init__(self, header: Header) -> None:
        self._version = header.version
        self._cluster_bits = header.cluster_bits
        self._inside = header.cluster_size - 1
        self.has_data_file = header.has_data_file
        self.is_extended = header.has_extended_l2
        self.is_plain = not self.is_extended and not self.has_data_file
        self.entry_size = 8 * header.l2_entry_words
        self.subclusters = 32 if self.is_extended else 1
        self.subcluster_bits = header.cluster_bits - (5 if self.is_extended else 0)
        self.every = (1 << self.subclusters) - 1

    @property
    def subcluster_size(self) -> int:
        """Bytes: what can be allocated, or read as zeroes, apart."""
        return 1 << self.subcluster_bits

    # Numbers and bytes.

    def unpack(self, table: bytes | bytearray, index: int, count: int) -> tuple[int, ...]:
        """Entries of a table, from one index on."""
        if not self.is_extended:
            return struct.unpack_from(f">{count}Q", table, index * 8)
        words = struct.unpack_from(f">{2 * count}Q", table, index * 16)
        return tuple(word | bitmap << 64 for word, bitmap in zip(words[::2], words[1::2], strict=True))

    def pack(self, entries: list[int]) -> bytes:
        """The opposite of `unpack`."""
        if not self.is_extended:
            return struct.pack(f">{len(entries)}Q", *entries)
        return b"".join(struct.pack(">QQ", entry & _WORD, entry >> 64) for entry in entries)

    # What an entry says.

    def has_place(self, entry: int) -> bool:
        """Whether a host cluster is the entry's, filled or not; compressed data has none."""
        if entry & COMPRESSED:
            return False
        return bool(entry & OFFSET_MASK) or (self.has_data_file and bool(entry & COPIED))

    def is_own(self, entry: int) -> bool:
        """Whether it has a place that nobody else uses."""
        return bool(entry & COPIED) and self.has_place(entry)

    def allocated(self, entry: int) -> int:
        """The mask of the subclusters whose bytes lie in the entry's place."""
        if entry & COMPRESSED:
            return self.every
        if self.is_extended:
            return entry >> 64 & self.every
        return int(self.has_place(entry) and not entry & ZERO)

    def zero(self, entry: int) -> int:
        """The mask of the subclusters that read as zeroes, whatever lies below and in the entry's place."""
        if entry & COMPRESSED:
            return 0
        return entry >> 96 if self.is_extended else entry & ZERO

    def mask(self, start: int, end: int) -> int:
        """The mask of the subclusters that bytes `start` to `end` of a cluster touch, as far as they lie in it."""
        first = max(0, start) >> self.subcluster_bits
        stop = min(self.subclusters, (end - 1 >> self.subcluster_bits) + 1)
        return (1 << stop) - (1 << first) if first < stop else 0

    def data_length(self, entry: int, within: int) -> int:
        """How many bytes of the cluster, from `within` on, are allocated without a gap."""
        size = self._inside + 1
        allocated = self.allocated(entry)
        if allocated == self.every:
            return size - within
        number = within >> self.subcluster_bits
        end = number + ones(allocated >> number)
        return max(0, (end << self.subcluster_bits) - within)

    def counted(self, entry: int) -> range:
        """The clusters of the image file that the entry counts as references to.

        :raise ImageCorrupt: it points beyond the format's end.
        """
        bits = self._cluster_bits
        if entry & COMPRESSED:
            offset, length = packed_place(entry, bits)
            if offset >= MAX_OFFSET:
                raise ImageCorrupt(f"Compressed data at {offset:#x} lies beyond the format's end")
            return range(offset >> bits, (offset + length - 1 >> bits) + 1)
        host = 0 if self.has_data_file else (entry & OFFSET_MASK) >> bits
        return range(host, host + 1) if host else range(0)

    def check(self, entry: int, cluster: int | None = None) -> None:
        """:param cluster: the guest's, where it is known. :raise ImageCorrupt: the entry is none of this image, in QEMU's words."""
        if entry & COMPRESSED:
            if self.has_data_file or entry >> 64:
                raise ImageCorrupt(f"Invalid compressed cluster entry found (L2 entry {entry & _WORD:#x})")
            return
        host = entry & OFFSET_MASK
        if host & self._inside:
            raise ImageCorrupt(f"Cluster allocation offset {host:#x} unaligned (L2 entry {entry & _WORD:#x})")
        if self.is_extended:
            allocated = entry >> 64 & self.every
            if allocated & entry >> 96 or (allocated and not self.has_place(entry)):
                raise ImageCorrupt(
                    f"Invalid cluster entry found (L2 entry {entry & _WORD:#x}, subclusters {entry >> 64:#x})"
                )
        elif entry & ZERO and self._version < 3:
            raise ImageCorrupt(f"Zero cluster entry found in pre-v3 image (L2 entry {entry:#x})")
        if not self.has_data_file or cluster is None or not self.has_place(entry):
            return
        if host != cluster << self._cluster_bits:
            raise ImageCorrupt(
                f"External data file host cluster offset {host:#x} does not match guest cluster offset: "
                f"{cluster << self._cluster_bits:#x}"
            )

    def is_own_row(self, entries: tuple[int, ...]) -> bool:
        """Whether these are whole clusters of data, each nobody else's, next to each other; False where that takes longer
        to find out."""
        return self.is_plain and entries[0] & _OWN_DATA == COPIED and self.is_row(entries)

    def is_row(self, entries: tuple[int, ...]) -> bool:
        """Whether entries that are a single word have places next to each other, aligned, and agree in all the rest."""
        first, count, size = entries[0], len(entries), self._inside + 1
        return (
            bool(first & OFFSET_MASK)
            and not first & self._inside & OFFSET_MASK
            and (count == 1 or entries == tuple(range(first, first + count * size, size)))
        )

    # Entries made.

    def own(self, host: int, allocated: int, zero: int) -> int:
        """An entry with a place of its own: host offset, and the masks of its subclusters."""
        return self.remade(host | COPIED, allocated, zero)

    def remade(self, entry: int, allocated: int, zero: int) -> int:
        """The entry with other masks; its place stays."""
        if self.is_extended:
            return entry & _WORD | allocated << 64 | zero << 96
        return entry & ~ZERO | zero

    def placeless(self, zero: int) -> int:
        """An entry without a place; version 2 has none that reads as zeroes."""
        if self._version < 3:
            return 0
        return zero << 96 if self.is_extended else zero


def packed_place(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Where the compressed data of an entry lies: host offset, and bytes up to the end of its last sector."""
    bits = 70 - cluster_bits
    offset = entry & ((1 << bits) - 1)
    sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1
    return offset, sectors * 512 - (offset & 511)


def ones(mask: int) -> int:
    """How many ones a mask has at its low end."""
    return (~mask & mask + 1).bit_length() - 1


def lead_apart(entry: int, other: int) -> bool:
    """Whether two L2 entries point to different places; compressed data begins at any byte, so one cluster may have both."""
    return bool((entry ^ other) & (~COPIED if (entry | other) & COMPRESSED else OFFSET_MASK))
