"""Which clusters hold an image's metadata, so that nothing writes data over them."""

from typing import TYPE_CHECKING

from stillframe.block.qcow2.layout import OFFSET_MASK

if TYPE_CHECKING:
    from stillframe.block.qcow2.image import World

ACTIVE_L2 = "active L2 table"


def find_metadata(world: "World", file_size: int) -> dict[int, str]:
    """What each cluster of a world's metadata holds. :param file_size: bytes; inactive tables beyond are none."""
    import numpy as np

    header = world.header
    bits = header.cluster_bits
    found: dict[int, str] = {}

    def note(offset: int, length: int, what: str) -> None:
        for cluster in range(offset >> bits, (offset + length - 1 >> bits) + 1):
            found.setdefault(cluster, what)

    note(0, header.cluster_size, "qcow2_header")
    if header.l1_size:
        note(header.l1_offset, header.l1_size * 8, "active L1 table")
    note(header.refcount_table_offset, len(world.refcount_table), "refcount table")
    if world.snapshots:
        note(header.snapshots_offset, world.snapshot_table_length, "snapshot table")
    for entry in world.snapshots:
        if 0 < entry.l1_size * 8 <= file_size:
            note(entry.l1_offset, entry.l1_size * 8, "inactive L1 table")
    blocks = np.frombuffer(world.refcount_table, ">u8")
    for cluster in np.unique(blocks[blocks != 0] >> np.uint64(bits)).tolist():
        found.setdefault(cluster, "refcount block")
    tables = (np.frombuffer(world.l1, ">u8") & np.uint64(OFFSET_MASK)) >> np.uint64(bits)
    clusters, times = np.unique(tables[tables != 0], return_counts=True)
    for cluster, count in zip(clusters.tolist(), times.tolist(), strict=True):
        found.setdefault(cluster, ACTIVE_L2 if count == 1 else "another L2 table")
    return found
