"""Refcounts of 1 to 64 bits, between the bytes of a refcount block and arrays of numbers.

Widths under a byte count from its lowest bit; the others are big-endian.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Clusters = npt.NDArray[np.int64]
Narrow = npt.NDArray[Any]
"""Counts in as few bytes as hold them."""

Which = slice | npt.NDArray[np.intp]


def largest(order: int) -> int:
    """The highest refcount of 2**order bits; of 64 bits we use no more than leaves an int64 room for sums."""
    return min((1 << (1 << order)) - 1, 1 << 62)


def decode(data: bytes | bytearray | memoryview, order: int) -> Counts:
    """All refcounts of these bytes. A 64-bit one beyond `largest` reads as that."""
    return decode_narrow(data, order).astype(np.int64)


def decode_narrow(data: bytes | bytearray | memoryview, order: int) -> Narrow:
    """`decode` to unsigned numbers of 8 to 64 bits, as wide as the image's refcounts."""
    if order >= 3:
        raw = np.frombuffer(data, f">u{1 << order - 3}")
        if order == 6:
            raw = np.minimum(raw, np.uint64(largest(6)))
        return raw.astype(f"=u{1 << order - 3}")
    octets = np.frombuffer(data, np.uint8)
    bits = 1 << order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((octets[:, None] >> shifts) & np.uint8((1 << bits) - 1)).reshape(-1)


def encode(counts: Counts, order: int) -> bytes:
    """The bytes of whole octets' worth of refcounts."""
    if order >= 3:
        return counts.astype(f">u{1 << order - 3}").tobytes()
    bits = 1 << order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    parts = counts.astype(np.uint8).reshape(-1, 8 // bits) << shifts
    octets: npt.NDArray[np.uint8] = np.bitwise_or.reduce(parts, axis=1)
    return octets.astype(np.uint8).tobytes()


def runs_of(clusters: Clusters) -> list[tuple[int, int]]:
    """Ascending, distinct clusters as runs: first and count."""
    if not len(clusters):
        return []
    breaks = np.flatnonzero(np.diff(clusters) != 1) + 1
    starts = np.concatenate(([0], breaks))
    ends = np.concatenate((breaks, [len(clusters)]))
    return [(int(clusters[a]), int(b - a)) for a, b in zip(starts.tolist(), ends.tolist(), strict=True)]


def by_block(clusters: Clusters, per_block: int) -> Iterator[tuple[int, Which, Clusters]]:
    """Clusters by refcount block: the block's index, which of the clusters are of it, and their places in it.

    :param per_block: refcounts of a block, a power of two.
    """
    if not len(clusters):
        return
    blocks = clusters >> (per_block.bit_length() - 1)
    steps = np.diff(blocks)
    order: npt.NDArray[np.intp] | None = None
    if (steps < 0).any():
        order = np.argsort(blocks, kind="stable")
        blocks = blocks[order]
        steps = np.diff(blocks)
    for start, end in pairwise([0, *(np.flatnonzero(steps) + 1).tolist(), len(clusters)]):
        which: Which = slice(start, end) if order is None else order[start:end]
        yield int(blocks[start]), which, clusters[which] & (per_block - 1)


def is_repeating(places: Clusters) -> bool:
    """Whether a place may occur twice, so that numpy's plain indexed addition would lose one."""
    return not bool((np.diff(places) > 0).all())


def compact(places: Clusters) -> slice | Clusters:
    """Ascending, distinct places as an index, faster where they lie next to each other."""
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else places


def split_run(first: int, count: int, per_block: int) -> list[tuple[int, int, int]]:
    """A run of clusters by refcount block: index, first and end within it."""
    end = first + count
    parts: list[tuple[int, int, int]] = []
    while first < end:
        index, within = divmod(first, per_block)
        stop = min(end, (index + 1) * per_block)
        parts.append((index, within, within + stop - first))
        first = stop
    return parts
