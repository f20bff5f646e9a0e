"""Writes into the active tree: in place where the clusters are the image's own, else into new ones.

in place   entries with COPIED, allocated after the last freeze: the data goes straight to its place
mapped     claim the guest range; get clusters; write the data and what surrounds it in its clusters; then the L2
           entries, at once or with the next flush (mapping.py); then drop what they pointed to before
"""

from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.layout import COMPRESSED, COPIED, OFFSET_MASK, ZERO
from stillframe.block.qcow2.mapping import host_clusters, l1_entry, owned
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
        _flush_if_due(image)


def _note_guest_change(image: Image) -> None:
    """Before the disk's content changes. Lock held. :raise IOFailed: persistent bitmaps would not know of it."""
    if image.has_current_bitmaps:
        from stillframe.block.qcow2.bitmaps import mark_in_use

        mark_in_use(image)


def _flush_if_due(image: Image) -> None:
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
        _note_guest_change(image)
        bits = image.header.cluster_bits
        first = host >> bits
        image.refuse_overlap(first, (host + length - 1 >> bits) - first + 1)
        if host + length > image.file.size:
            # Entries may point past the end of a file that was cut short, and may not make it grow to anywhere.
            image.refuse_uncounted(first)
        ticket = gate.start_write()
    try:
        image.file.write(host, data[:length])
    finally:
        gate.end_write(ticket)
    return length


def _own_run(image: Image, offset: int, length: int) -> tuple[int, int]:
    """Host offset and length of the contiguous bytes from `offset` on that may be overwritten in place. Lock held."""
    header = image.header
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
    within = offset & (size - 1)
    count = min((within + length + size - 1) >> bits, header.l2_entries - index)
    start = expected = found = 0
    for number, entry in enumerate(image.mapping.entries(table_offset, index, count)):
        host = entry & OFFSET_MASK
        if not host or not owned(entry) or entry & ZERO or (found and host != expected) or host & (size - 1):
            break
        if pending is not None and not pending.is_fresh(l1_index, index + number):
            break
        start = start or host
        expected = host + size
        found += 1
    if not found:
        return 0, 0
    return start + within, min(length, (found << bits) - within)


def _write_mapped(image: Image, offset: int, data: memoryview) -> int:
    """Write a first part of the data into clusters that are new, or have no content yet; 0 if there is no need to."""
    header = image.header
    bits = header.cluster_bits
    first = offset >> bits
    l1_index, index = divmod(first, header.l2_entries)
    last = min((offset + len(data) - 1) >> bits, first - index + header.l2_entries - 1)
    with image.gate.mapping(first, last):
        with image.gate.lock:
            image.refuse_if_broken()
            _note_guest_change(image)
            table = image.own_table(l1_index)
            entries = image.mapping.entries(table, index, last - first + 1)
            for entry in entries:
                image.mapping.check(entry)
            place, count, is_new = _place(image, l1_index, index, entries)
            if not count:
                return 0
            entries = entries[:count]
            image.refuse_overlap(place, count)
            untouched = is_new and image.file.is_untouched(place << bits)
        length = min(len(data), (first + count << bits) - offset)
        try:
            _write_clusters(image, first, place, count, offset, data[:length], entries, untouched, is_new)
        except BaseException:
            if is_new:
                with image.gate.lock:
                    image.refcounts.give_back(place, count)
            raise
        with image.gate.lock:
            new = [(place + number << bits) | COPIED for number in range(count)]
            # New clusters that read as zeroes until the data is in them may stand for zeroes at once.
            waits = not untouched or not all(
                _reads_zero(image, entry, first + number) for number, entry in enumerate(entries)
            )
            link(image, l1_index, index, entries, new, waits=waits)
            if image.pending is not None:
                image.pending.note_fresh(l1_index, index, count)
    return length


def _place(image: Image, l1_index: int, index: int, entries: tuple[int, ...]) -> tuple[int, int, bool]:
    """Where the first entries' data is to go: cluster, how many, whether they are new. Lock held; given up at times."""
    bits = image.header.cluster_bits
    pending = image.pending

    def is_own(number: int) -> bool:
        entry = entries[number]
        if not entry & OFFSET_MASK or not owned(entry):
            return False
        return pending is None or pending.is_fresh(l1_index, index + number)

    if is_own(0):
        if not entries[0] & ZERO:
            return 0, 0, False
        place = (entries[0] & OFFSET_MASK) >> bits
        count = 1
        while (
            count < len(entries)
            and entries[count] & ZERO
            and is_own(count)
            and (entries[count] & OFFSET_MASK) >> bits == place + count
        ):
            count += 1
        return place, count, False
    wanted = 1
    while wanted < len(entries) and not is_own(wanted):
        wanted += 1
    place, count = image.refcounts.allocate(wanted)
    return place, count, True


def _write_clusters(
    image: Image,
    first: int,
    place: int,
    count: int,
    offset: int,
    data: memoryview,
    entries: tuple[int, ...],
    untouched: bool,
    is_new: bool,
) -> None:
    """Fill whole host clusters: the data, and around it what the guest clusters held before."""
    bits = image.header.cluster_bits
    start, end = first << bits, first + count << bits
    head, tail = offset - start, end - offset - len(data)
    host = place << bits
    head_is_zero = not head or _reads_zero(image, entries[0], first)
    tail_is_zero = not tail or _reads_zero(image, entries[-1], first + count - 1)
    if untouched and head_is_zero and tail_is_zero:
        image.file.grow(host + (count << bits))
        image.file.write(host + head, data)
        return
    before, after = bytearray(head), bytearray(tail)
    # Clusters in place hold zeroes by their flag, whatever their bytes are.
    if is_new and not head_is_zero:
        image.read_tree(None, start, memoryview(before))
    if is_new and not tail_is_zero:
        image.read_tree(None, end - tail, memoryview(after))
    if head + tail and end - start <= _JOINED_AT_MOST:
        image.file.write(host, b"".join((before, data, after)))
        return
    if head:
        image.file.write(host, before)
    image.file.write(host + head, data)
    if tail:
        image.file.write(host + head + len(data), after)


def _reads_zero(image: Image, entry: int, cluster: int) -> bool:
    if entry & COMPRESSED:
        return False
    if entry & ZERO:
        return True
    return not entry & OFFSET_MASK and not has_backing_data(image, cluster)


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
    bits = image.header.cluster_bits
    pending = image.pending
    dropped: list[int] = []
    for number, entry in enumerate(old):
        points = entry & COMPRESSED or entry & OFFSET_MASK
        replaced = points and (entry ^ new[number]) & (OFFSET_MASK | COMPRESSED)
        # What was there at the freeze is the pending snapshot's now.
        if replaced and (pending is None or pending.is_fresh(l1_index, index + number)):
            dropped += host_clusters(entry, bits)
    table = l1_entry(image.world.l1, l1_index) & OFFSET_MASK
    if waits:
        image.mapping.defer(table, index, new)
    else:
        image.mapping.store(table, index, new)
    if dropped:
        image.drop(dropped)


def unmap(image: Image, first: int, last: int, *, keep_place: bool, reads_zero: bool) -> None:
    """Take whole guest clusters, `first` to `last` included, out of the active tree.

    :param keep_place: clusters that are allocated stay so, and read as zeroes (version 3).
    :param reads_zero: what lies below must not show through; else entries become unallocated.
    """
    header = image.header
    while first <= last:
        l1_index, index = divmod(first, header.l2_entries)
        stop = min(last, first - index + header.l2_entries - 1)
        _unmap_in_table(image, l1_index, index, first, stop, keep_place, reads_zero)
        first = stop + 1
    _flush_if_due(image)


@wholly
def _unmap_in_table(
    image: Image, l1_index: int, index: int, first: int, last: int, keep_place: bool, reads_zero: bool
) -> None:
    flag = ZERO if reads_zero and image.header.version >= 3 else 0

    def emptied(entries: tuple[int, ...]) -> list[int]:
        new: list[int] = []
        for number, entry in enumerate(entries):
            if not entry and not (flag and has_backing_data(image, first + number)):
                new.append(0)
            elif keep_place and flag and entry & OFFSET_MASK and not entry & COMPRESSED:
                new.append(entry | ZERO)
            else:
                new.append(flag)
        return new

    with image.gate.mapping(first, last), image.gate.lock:
        image.refuse_if_broken()
        table = l1_entry(image.world.l1, l1_index) & OFFSET_MASK
        count = last - first + 1
        old = image.mapping.entries(table, index, count) if table else (0,) * count
        if emptied(old) == list(old):
            return
        _note_guest_change(image)
        table = image.own_table(l1_index)
        old = image.mapping.entries(table, index, count)
        for entry in old:
            image.mapping.check(entry)
        link(image, l1_index, index, old, emptied(old), waits=False)
