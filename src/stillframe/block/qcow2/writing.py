"""Writes into the active tree: in place where the clusters are the image's own, else into new ones.

in place   entries with COPIED, allocated after the last freeze, as far as their subclusters hold data: it goes straight to
           its place
mapped     claim the guest range; get clusters; write the data and what its subclusters, or a cluster that moves, held
           around it; then the L2 entries, at once or with the next flush (mapping.py); then drop what they pointed to before

Where guest data has a file of its own, a cluster's place there is the guest's own offset, and nothing counts it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.l2_entry import L2Format, lead_apart
from stillframe.block.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK
from stillframe.block.qcow2.mapping import l1_entry
from stillframe.block.qcow2.wholly import wholly

_JOINED_AT_MOST = 256 << 10


def write(image: Image, offset: int, data: memoryview) -> None:
    """Write inside the disk's size; the caller has checked that."""
    is_mapped = False
    while data:
        done = _write_in_place(image, offset, data)
        if not done:
            done = _write_mapped(image, offset, data)
            is_mapped = True
        offset += done
        data = data[done:]
    if is_mapped:
        flush_if_due(image)


def note_guest_change(image: Image) -> None:
    """Before the disk's content changes. Lock held. :raise IOFailed: persistent bitmaps would not know of it."""
    image.shows = None
    if image.has_current_bitmaps:
        from stillframe.block.qcow2.bitmaps import mark_in_use

        mark_in_use(image)


def flush_if_due(image: Image) -> None:
    """Keep what waits for a flush within its bounds."""
    with image.gate.lock:
        is_due = image.refcounts.has_many_dropped or image.mapping.has_many_deferred
    if is_due:
        image.flush()


def _write_in_place(image: Image, offset: int, data: memoryview) -> int:
    """How many bytes from `offset` on could be written in place."""
    gate = image.gate
    with gate.lock:
        gate.admit_write()
        image.refuse_if_broken()
        host, length = _own_run(image, offset, len(data))
        if not length:
            return 0
        note_guest_change(image)
        bits = image.header.cluster_bits
        first = host >> bits
        _refuse_wrong_place(image, first, (host + length - 1 >> bits) - first + 1)
        if host + length > image.file.size and not image.l2.has_data_file:
            # Entries may point past the end of a file that was cut short, and may not make it grow to anywhere.
            image.refuse_uncounted(first)
        ticket = gate.start_write()
    try:
        image.data.write(host, data[:length])
    finally:
        gate.end_write(ticket)
    return length


def _own_run(image: Image, offset: int, length: int) -> tuple[int, int]:
    """Host offset and length of the contiguous bytes from `offset` on that may be overwritten in place. Lock held."""
    header, l2 = image.header, image.l2
    bits = header.cluster_bits
    size = 1 << bits
    cluster = offset >> bits
    l1_index, index = divmod(cluster, header.l2_entries)
    l1 = l1_entry(image.world.l1, l1_index)
    table_offset = l1 & OFFSET_MASK
    if not table_offset or not l1 & COPIED:
        return 0, 0
    pending = image.pending
    if pending is not None and not pending.is_fresh_table(l1_index):
        return 0, 0
    within = at = offset & (size - 1)
    count = min((within + length + size - 1) >> bits, header.l2_entries - index)
    entries = image.mapping.entries(table_offset, index, count)
    if pending is None and l2.is_own_row(entries):
        return (entries[0] & OFFSET_MASK) + within, min(length, (count << bits) - within)
    start = expected = found = 0
    for number, entry in enumerate(entries):
        host = entry & OFFSET_MASK
        if not l2.is_own(entry) or (number and host != expected) or host & (size - 1):
            break
        if l2.has_data_file and host != cluster + number << bits:
            break
        if pending is not None and not pending.is_fresh(l1_index, index + number):
            break
        here = l2.data_length(entry, at)
        if not here:
            break
        if not number:
            start = host + within
        found += here
        if here < size - at:
            break
        expected, at = host + size, 0
    return start, min(length, found)


@dataclass(frozen=True, slots=True)
class _Placed:
    """Guest clusters, and the host clusters next to each other that a write puts them into.

    :param first: the first guest cluster. :param place: the first host cluster.
    :param is_new: what the host clusters hold is nobody's; else they are these guest clusters' own already.
    :param old: the L2 entries until now.
    """

    l2: L2Format
    bits: int
    first: int
    place: int
    is_new: bool
    old: tuple[int, ...]

    @property
    def end(self) -> int:
        """The guest offset behind the last cluster."""
        return self.first + len(self.old) << self.bits

    def touched(self, number: int, start: int, end: int) -> int:
        """The mask of a cluster's subclusters that a guest range touches."""
        base = self.first + number << self.bits
        return self.l2.mask(start - base, end - base)

    def entries(self, start: int, end: int) -> list[int]:
        """The L2 entries once the guest range is written."""
        if self.l2.is_plain:
            host = self.place << self.bits | COPIED
            return [host + (number << self.bits) for number in range(len(self.old))]
        made: list[int] = []
        for number, entry in enumerate(self.old):
            allocated = self.l2.allocated(entry) | self.touched(number, start, end)
            zero = self.l2.zero(entry) & ~allocated
            made.append(self.l2.own(self.place + number << self.bits, allocated, zero))
        return made

    def beside(self, start: int, end: int, limit: int) -> Iterator[tuple[int, int]]:
        """What must be written beside a guest range, as ranges of the guest in order: the rest of its subclusters, and
        of clusters that move all that was allocated. :param limit: nothing is written from here on."""
        for number in sorted({0, len(self.old) - 1}):
            base = self.first + number << self.bits
            allocated = self.l2.allocated(self.old[number])
            touched = self.touched(number, start, end)
            needed = allocated | touched if self.is_new else touched & ~allocated
            for sub in range(self.l2.subclusters):
                if needed >> sub & 1:
                    low = base + (sub << self.l2.subcluster_bits)
                    high = min(low + self.l2.subcluster_size, limit)
                    yield from (
                        part for part in ((low, min(high, start)), (max(low, end), high)) if part[0] < part[1]
                    )


def _write_mapped(image: Image, offset: int, data: memoryview) -> int:
    """Write a first part of the data into clusters that are new, or have no content yet; 0 if there is no need to."""
    header, l2 = image.header, image.l2
    bits = header.cluster_bits
    first = offset >> bits
    l1_index, index = divmod(first, header.l2_entries)
    last = min((offset + len(data) - 1) >> bits, first - index + header.l2_entries - 1)
    with image.gate.mapping(first, last):
        with image.gate.lock:
            image.refuse_if_broken()
            note_guest_change(image)
            table = image.own_table(l1_index)
            entries = image.mapping.entries(table, index, last - first + 1)
            for number, entry in enumerate(entries):
                if entry:
                    l2.check(entry, first + number)
            placed = _place(image, offset, l1_index, index, entries)
            if placed is None:
                return 0
            count = len(placed.old)
            _refuse_wrong_place(image, placed.place, count)
            untouched = placed.is_new and image.data.is_untouched(placed.place << bits)
        data = data[: placed.end - offset]
        end = offset + len(data)
        try:
            _fill(image, placed, offset, data, untouched)
        except BaseException:
            if placed.is_new:
                with image.gate.lock:
                    _give_back(image, placed.place, count)
            raise
        with image.gate.lock:
            new = placed.entries(offset, end)
            # New clusters that read as zeroes until the data is in them may stand for zeroes at once.
            waits = not untouched or (
                (image.backing is not None or any(placed.old))
                and not all(
                    _reads_zero(image, entry, first + number, l2.allocated(new[number]))
                    for number, entry in enumerate(placed.old)
                )
            )
            link(image, l1_index, index, placed.old, new, waits=waits)
            if image.pending is not None:
                image.pending.note_fresh(l1_index, index, count)
    return len(data)


def _place(image: Image, offset: int, l1_index: int, index: int, entries: tuple[int, ...]) -> _Placed | None:
    """Where the first of these clusters go; None if the first byte can be written in place. Lock held; given up at times."""
    l2, bits = image.l2, image.header.cluster_bits
    first = offset >> bits
    pending = image.pending

    def is_own(number: int) -> bool:
        return l2.is_own(entries[number]) and (pending is None or pending.is_fresh(l1_index, index + number))

    if is_own(0):
        if l2.data_length(entries[0], offset & ((1 << bits) - 1)):
            return None
        place = (entries[0] & OFFSET_MASK) >> bits
        count = 1
        while (
            count < len(entries)
            and l2.allocated(entries[count]) != l2.every
            and is_own(count)
            and (entries[count] & OFFSET_MASK) >> bits == place + count
        ):
            count += 1
        return _Placed(l2, bits, first, place, False, entries[:count])
    wanted = len(entries) if not any(entries) else 1
    while wanted < len(entries) and not is_own(wanted):
        wanted += 1
    # In a data file the place is the guest's own offset.
    place, count = (first, wanted) if l2.has_data_file else image.refcounts.allocate(wanted)
    return _Placed(l2, bits, first, place, True, entries[:count])


def _give_back(image: Image, place: int, count: int) -> None:
    """Nothing was made to point to new clusters. Lock held."""
    if not image.l2.has_data_file:
        image.refcounts.give_back(place, count)


def _refuse_wrong_place(image: Image, first: int, count: int) -> None:
    """Before host clusters are filled with guest data. Lock held.

    :raise ImageCorrupt: there is metadata; the image is marked, and takes no more writes.
    """
    if not image.l2.has_data_file:
        image.refuse_overlap(first, count)


def _fill(image: Image, placed: _Placed, offset: int, data: memoryview, untouched: bool) -> None:
    """Fill host clusters: the data, and around it what the guest clusters held before."""
    bits = placed.bits
    end = offset + len(data)
    shift = placed.place - placed.first << bits
    # A data file ends with the disk.
    limit = max(end, image.header.size) if image.l2.has_data_file else placed.end
    beside = _joined(placed.beside(offset, end, limit))
    is_zero = [_range_reads_zero(image, placed, *part) for part in beside]
    if untouched and all(is_zero):
        image.data.grow(min(limit, placed.end) + shift)
        image.data.write(offset + shift, data)
        return
    pieces: list[tuple[int, bytearray | memoryview]] = [(offset, data)]
    for (low, high), is_nothing in zip(beside, is_zero, strict=True):
        content = bytearray(high - low)
        if not is_nothing:
            image.read_tree(None, low, memoryview(content))
        pieces.append((low, content))
    pieces.sort(key=lambda piece: piece[0])
    start, stop = pieces[0][0], pieces[-1][0] + len(pieces[-1][1])
    if stop - start <= _JOINED_AT_MOST and sum(len(content) for _, content in pieces) == stop - start:
        image.data.write(start + shift, data if len(pieces) == 1 else b"".join(part for _, part in pieces))
        return
    for at, piece in pieces:
        image.data.write(at + shift, piece)


def _joined(ranges: Iterator[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges in order, those that touch as one."""
    joined: list[tuple[int, int]] = []
    for low, high in ranges:
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return joined


def _range_reads_zero(image: Image, placed: _Placed, low: int, high: int) -> bool:
    number = (low >> placed.bits) - placed.first
    mask = placed.touched(number, low, high)
    return _reads_zero(image, placed.old[number], placed.first + number, mask)


def _reads_zero(image: Image, entry: int, cluster: int, mask: int) -> bool:
    """Whether these subclusters of a guest cluster are known to read as zeroes."""
    if image.l2.allocated(entry) & mask:
        return False
    return not mask & ~image.l2.zero(entry) or not has_backing_data(image, cluster)


def has_backing_data(image: Image, cluster: int) -> bool:
    """Whether an unallocated guest cluster may show bytes of what lies below."""
    return image.backing is not None and cluster << image.header.cluster_bits < image.backing.size


@wholly
def link(
    image: Image, l1_index: int, index: int, old: tuple[int, ...], new: list[int], *, waits: bool
) -> None:
    """Change L2 entries of a table that is the image's own, and drop what the old ones pointed to. Lock held.

    :param waits: the new clusters' data must be durable first.
    """
    pending = image.pending
    dropped: list[int] = []
    for number, entry in enumerate(old if any(old) else ()):
        replaced = lead_apart(entry, new[number])
        # What was there at the freeze is the pending snapshot's now.
        if replaced and (pending is None or pending.is_fresh(l1_index, index + number)):
            dropped += image.l2.counted(entry)
    table = l1_entry(image.world.l1, l1_index) & OFFSET_MASK
    if waits:
        image.mapping.defer(table, index, new)
    else:
        image.mapping.store(table, index, new)
    if dropped:
        image.drop(dropped)


Range = tuple[int, int]
"""Guest offsets: start and end."""


def unmap(image: Image, start: int, end: int, *, keep_place: bool, reads_zero: bool) -> list[Range]:
    """Take whole subclusters out of the active tree.

    :param start: where a subcluster begins. :param end: where one ends, or the disk.
    :param keep_place: clusters that are allocated stay so, and read as zeroes (version 3).
    :param reads_zero: what lies below must not show through; else entries become unallocated.
    :return: what stays as it was: parts of compressed clusters.
    """
    header = image.header
    if end == header.size:
        end = header.clusters_for(end) << header.cluster_bits
    left: list[Range] = []
    while start < end:
        stop = min(end, (start // header.l2_span + 1) * header.l2_span)
        left += _unmap_in_table(image, start, stop, keep_place, reads_zero)
        start = stop
    flush_if_due(image)
    return left


@wholly
def _unmap_in_table(image: Image, start: int, end: int, keep_place: bool, reads_zero: bool) -> list[Range]:
    l2, bits = image.l2, image.header.cluster_bits
    first, last = start >> bits, (end - 1) >> bits
    count = last - first + 1
    l1_index, index = divmod(first, image.header.l2_entries)

    def emptied(entries: tuple[int, ...]) -> list[int]:
        new: list[int] = []
        for number, entry in enumerate(entries):
            if not entry and image.backing is None:
                new.append(0)
                continue
            base = first + number << bits
            mask = l2.mask(start - base, end - base)
            allocated = l2.allocated(entry) & ~mask
            zero = l2.zero(entry) & ~mask | (mask if reads_zero else 0)
            if entry & COMPRESSED and mask != l2.every:
                new.append(entry)
            elif not l2.allocated(entry) and reads_zero and not _shows(image, entry, first + number):
                new.append(entry if keep_place or not l2.has_place(entry) else l2.placeless(zero))
            elif l2.has_place(entry) and (allocated or (keep_place and image.header.version >= 3)):
                new.append(l2.remade(entry, allocated, zero))
            else:
                new.append(l2.placeless(zero))
        return new

    with image.gate.mapping(first, last):
        with image.gate.lock:
            image.refuse_if_broken()
            table = l1_entry(image.world.l1, l1_index) & OFFSET_MASK
            old = image.mapping.entries(table, index, count) if table else (0,) * count
            new = emptied(old)
            if new != list(old):
                note_guest_change(image)
                table = image.own_table(l1_index)
                old = image.mapping.entries(table, index, count)
                for number, entry in enumerate(old):
                    l2.check(entry, first + number)
                new = emptied(old)
                link(image, l1_index, index, old, new, waits=False)
        if l2.has_data_file:
            _discard_places(image, first, old, new)
    ranges = [(max(start, first + n << bits), min(end, first + n + 1 << bits)) for n in range(count)]
    return [part for part, entry in zip(ranges, new, strict=True) if entry & COMPRESSED]


def _shows(image: Image, entry: int, cluster: int) -> bool:
    """Whether a guest cluster without data of its own may show what lies below."""
    return image.l2.zero(entry) != image.l2.every and has_backing_data(image, cluster)


def _discard_places(image: Image, first: int, old: tuple[int, ...], new: list[int]) -> None:
    """Give back the space of clusters that lost their place in the data file."""
    bits = image.header.cluster_bits
    for number, entry in enumerate(old):
        if image.l2.has_place(entry) and not image.l2.has_place(new[number]):
            image.data.discard(first + number << bits, 1 << bits)


def zero_data_file(image: Image, offset: int, length: int, *, unmap: bool) -> None:
    """Zeroes where the data file alone is the disk: in the file itself, so that the tables need not change."""
    with image.gate.lock:
        image.gate.admit_write()
        image.refuse_if_broken()
        note_guest_change(image)
        ticket = image.gate.start_write()
    try:
        image.data.write_zeroes(offset, length, unmap=unmap)
    finally:
        image.gate.end_write(ticket)
