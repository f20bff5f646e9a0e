"""Compressed clusters, written: packed one behind the other, wherever a byte is free.

    host clusters   │ a ──┬─ b ───┬─ c │ ──┬─ d ──┬· │        refcounts 3 and 2: an entry counts every host cluster that its
                                                  ▲           data touches
                                                  └── the next one goes here, if the cluster's refcount has room for it

The order on disk: refcounts and data are written, and the entries are always deferred to behind the next flush
(mapping.py), for what stands at the place before is no content of anybody's. So no call needs a flush of its own. A crash
before it leaks.

Where the next one goes is remembered in memory only, and forgotten as soon as a reference to that cluster is dropped, or the
tables are switched: a cluster on its way to being free takes nothing more.
"""

from collections.abc import Sequence

from stillframe.block.qcow2.compression import compress_clusters
from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.layout import COMPRESSED
from stillframe.block.qcow2.wholly import wholly
from stillframe.block.qcow2.widths import largest
from stillframe.block.qcow2.writing import flush_if_due, link, note_guest_change, write
from stillframe.errors import InvalidRequest, LimitReached, Unsupported


def write_compressed(image: Image, offset: int, data: memoryview) -> None:
    """Store whole guest clusters compressed; those that do not get smaller as they are.

    :param offset: where a cluster begins. :param data: ends where one ends, or the disk.
    :raise InvalidRequest: it does not. :raise Unsupported: the image can have no compressed clusters.
    """
    header = image.header
    size = header.cluster_size
    if offset % size or (len(data) % size and offset + len(data) != header.size):
        raise InvalidRequest(
            f"Only whole clusters can be compressed: {len(data)} bytes at {offset}, with clusters of {size} bytes"
        )
    if header.has_data_file:
        raise Unsupported("Clusters in an external data file cannot be compressed")
    if header.crypt_method:
        raise Unsupported("Clusters of an encrypted image cannot be compressed")
    packed = compress_clusters(data, header.compression_name, size)
    first = offset >> header.cluster_bits
    start = 0
    while start < len(packed):
        end = start + 1
        is_packed = packed[start] is not None
        stop = min(len(packed), start + header.l2_entries - (first + start) % header.l2_entries)
        while end < stop and (packed[end] is not None) == is_packed:
            end += 1
        if is_packed:
            blobs = [blob for blob in packed[start:end] if blob is not None]
            while blobs:
                done = _store(image, first + end - len(blobs), blobs)
                blobs = blobs[done:]
        else:
            write(image, offset + start * size, data[start * size : end * size])
        start = end
    flush_if_due(image)


def _store(image: Image, first: int, blobs: Sequence[bytes]) -> int:
    """Store a first part of these; how many. They lie under one L2 table."""
    header = image.header
    l1_index, index = divmod(first, header.l2_entries)
    with image.gate.mapping(first, first + len(blobs) - 1):
        with image.gate.lock:
            image.refuse_if_broken()
            note_guest_change(image)
            table = image.own_table(l1_index)
            old = image.mapping.entries(table, index, len(blobs))
            places = _allocate(image, [len(blob) for blob in blobs])
            blobs, old = blobs[: len(places)], old[: len(places)]
            clusters = _touched(places, blobs, header.cluster_bits)
        try:
            _write(image, places, blobs)
        except BaseException:
            with image.gate.lock:
                image.drop(clusters)
            raise
        with image.gate.lock:
            new = [
                _entry(place, len(blob), header.cluster_bits)
                for place, blob in zip(places, blobs, strict=True)
            ]
            image.reader.forget_unpacked()
            link(image, l1_index, index, old, new, waits=True)
            if image.pending is not None:
                image.pending.note_fresh(l1_index, index, len(new))
    return len(places)


@wholly
def _allocate(image: Image, lengths: Sequence[int]) -> list[int]:
    """Places for a first part of these lengths, at least one, counted. Lock held; given up at times.

    :raise LimitReached: the format's end.
    """
    bits = image.header.cluster_bits
    refcounts = image.refcounts
    first, count = refcounts.allocate(-(-sum(lengths) >> bits))
    # From here on the lock is kept, and the place of the next byte stays what it is.
    try:
        image.refuse_overlap(first, count)
        packer = _Packer(image, first, count)
        places = packer.places(lengths)
    except BaseException:
        refcounts.give_back(first, count)
        raise
    # What is counted once by its lease is counted by its first entry now. Where this fails, clusters are leaked.
    refcounts.packed_end = 0
    refcounts.add_references(packer.added())
    refcounts.packed_end = packer.at if packer.at & (1 << bits) - 1 else 0
    used = max((each + 1 - first for each in packer.entries if first <= each < first + count), default=0)
    if used < count:
        refcounts.give_back(first + used, count - used)
    return places


class _Packer:
    """One allocation: behind the last byte that was taken, then in a run of new clusters.

    :ivar at: the byte behind the last place. :ivar entries: how many were placed, by the clusters that they touch.
    """

    def __init__(self, image: Image, first: int, count: int) -> None:
        self._bits = image.header.cluster_bits
        self._most = largest(image.header.refcount_order)
        self._furthest = 1 << 70 - self._bits
        self._run = range(first << self._bits, first + count << self._bits)
        self._first = first
        self.at = image.refcounts.packed_end
        self._begun = self.at >> self._bits if self.at else -1
        self._counted = image.refcounts.count(self._begun) if self.at else 0
        self._stop = self._begun + 1 << self._bits if self.at else 0
        if self._stop == self._run.start:
            self._stop = self._run.stop
        self.entries: dict[int, int] = {}

    def places(self, lengths: Sequence[int]) -> list[int]:
        """Places for as many as fit."""
        found: list[int] = []
        for length in lengths:
            if not self._move_to_room(length):
                break
            found.append(self.at)
            for each in self._touched(length):
                self.entries[each] = self.entries.get(each, 0) + 1
            self.at += length
        return found

    def added(self) -> dict[int, int]:
        """By how much refcounts are to be raised: those of new clusters are one already."""
        raised = {
            each: times - (each >= self._first and each != self._begun)
            for each, times in self.entries.items()
        }
        return {each: times for each, times in raised.items() if times}

    def _touched(self, length: int) -> range:
        return range(self.at >> self._bits, (self.at + length - 1 >> self._bits) + 1)

    def _move_to_room(self, length: int) -> bool:
        """Go to where so many bytes can lie; False if nothing is left."""
        while True:
            if self.at and self.at + length <= self._stop:
                full = [each for each in self._touched(length) if self._references(each) >= self._most]
                if not full:
                    break
                # No entry more can count this cluster.
                self.at = full[0] + 1 << self._bits
            elif self._stop != self._run.stop:
                self.at, self._stop = self._run.start, self._run.stop
            else:
                return False
        if self.at >= self._furthest:
            raise LimitReached("The image file is too large for compressed clusters of this cluster size")
        return True

    def _references(self, cluster: int) -> int:
        return self.entries.get(cluster, 0) + (self._counted if cluster == self._begun else 0)


def _entry(place: int, length: int, bits: int) -> int:
    sectors = (place + length - 1 >> 9) - (place >> 9)
    return COMPRESSED | sectors << 70 - bits | place


def _write(image: Image, places: Sequence[int], blobs: Sequence[bytes]) -> None:
    """Write what lies next to each other at once."""
    size = image.cluster_size
    start = 0
    for end in range(1, len(places) + 1):
        if end == len(places) or places[end] != places[end - 1] + len(blobs[end - 1]):
            data = b"".join(blobs[start:end])
            # Readers take whole sectors, so there must be some.
            image.file.grow(-(-(places[start] + len(data)) // size) * size)
            image.file.write(places[start], data)
            start = end


def _touched(places: Sequence[int], blobs: Sequence[bytes], bits: int) -> list[int]:
    return [
        cluster
        for place, blob in zip(places, blobs, strict=True)
        for cluster in range(place >> bits, (place + len(blob) - 1 >> bits) + 1)
    ]
