"""Refcounts of 1 to 64 bits, between the bytes of a refcount block and arrays of numbers.

Widths under a byte count from its lowest bit; the others are big-endian.
"""

import numpy as np
import numpy.typing as npt

Counts = npt.NDArray[np.int64]
Clusters = npt.NDArray[np.int64]


def largest(order: int) -> int:
    """The highest refcount of 2**order bits; of 64 bits we use no more than leaves an int64 room for sums."""
    return min((1 << (1 << order)) - 1, 1 << 62)


def decode(data: bytes | bytearray | memoryview, order: int) -> Counts:
    """All refcounts of these bytes. A 64-bit one beyond `largest` reads as that."""
    if order >= 3:
        raw = np.frombuffer(data, f">u{1 << order - 3}")
        if order == 6:
            raw = np.minimum(raw, np.uint64(largest(6)))
        return raw.astype(np.int64)
    octets = np.frombuffer(data, np.uint8)
    bits = 1 << order
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((octets[:, None] >> shifts) & ((1 << bits) - 1)).astype(np.int64).reshape(-1)


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
