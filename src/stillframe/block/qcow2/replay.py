"""What the death of the process that wrote an image has left in its record (unflushed.py), brought into the image's file.

    1  everything is verified, before anything is written: the record is this image's, of this boot, and whole; the header's
       world, and every entry that is to change, are as the record says they were or are to become; the tables are the
       active tree's own; what the new entries point to is counted, and no metadata
    2  flush: the data that the entries wait for
    3  the entries are written; flush
    4  the record is emptied, the number taken out of the header, and the record removed

Killed in between, it is done again: an entry that was written is one of those that the record allows. Nothing is handed out and
nothing repaired before. What cannot be verified counts as lost in a power cut: the file alone is whole and holds what was flushed.
"""

import contextlib
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from stillframe.block.qcow2.layout import (
    COMPRESSED,
    COPIED,
    DIRTY,
    L2_RESERVED,
    OFFSET_MASK,
    OTHER_AUTOCLEAR,
    RECORD_NUMBER_SHIFT,
)
from stillframe.block.qcow2.metadata import ACTIVE_L2
from stillframe.block.qcow2.unflushed import Change, Kind, digest, find, remove_voided
from stillframe.errors import ImageCorrupt, IOFailed, Refused

if TYPE_CHECKING:
    from stillframe.block.qcow2.image import Image


class Outcome(Enum):
    """What became of the writes that a former user of an image had acknowledged."""

    CLEAN = "clean"
    """The image was closed, or its file held everything."""
    REPLAYED = "replayed"
    """Its process was killed, and every acknowledged write is there."""
    LOST = "lost"
    """What was not flushed may be lost, as after a power cut."""
    UNKNOWN = "unknown"
    """CLEAN or LOST: version 2 has no room in its header for the difference."""


@dataclass(frozen=True, slots=True)
class Recovery:
    """What was found, and done, when an image was opened for writing.

    :param entries: how many were written. :param why: for LOST. :param number: of the record that the header spoke of; 0 for none.
    """

    outcome: Outcome
    entries: int = 0
    why: str = ""
    number: int = field(default=0, compare=False)

    @property
    def is_complete(self) -> bool:
        """Whether every write that was ever acknowledged is there for certain."""
        return self.outcome in (Outcome.CLEAN, Outcome.REPLAYED)


Entries = dict[tuple[int, int], bytes]
"""L2 entries by their table's offset and their index."""

Allowed = dict[int, dict[int, list[bytes]]]
"""By table and index: what the entry may be in the file; the last is what it is to become."""


def recover(image: "Image") -> Recovery:
    """Before an image that is opened for writing is used in any other way.

    :raise InvalidRequest: a repair of an image whose data file was not opened with it, where there is a record.
    :raise IOFailed: of the storage. The image cannot be used; a later open begins anew.
    """
    header = image.header
    if header.version < 3:
        return Recovery(Outcome.UNKNOWN)
    number = header.autoclear >> RECORD_NUMBER_SHIFT
    if not number:
        if remove_voided(image.file.node):
            return Recovery(Outcome.LOST, why="Another program has opened the image for writing meanwhile")
        return Recovery(Outcome.CLEAN)
    try:
        record = find(image.file.node, number, header.l2_entry_words * 8)
    except Refused as error:
        _take_number_out(image)
        return Recovery(Outcome.LOST, why=error.message, number=number)
    is_over = False
    try:
        # What the entries wait for may lie there.
        image.reader.refuse_without_data()
        try:
            entries = _verified(image, record.changes())
        except (Refused, ImageCorrupt) as error:
            _take_number_out(image)
            is_over = True
            return Recovery(Outcome.LOST, why=error.message, number=number)
        try:
            image.flush_files()
        except IOFailed:
            # The data may be lost, and a later flush would not say so any more.
            is_over = True
            with contextlib.suppress(IOFailed):
                _take_number_out(image)
            raise
        for (table, index), entry in sorted(entries.items()):
            image.file.write(table + index * len(entry), entry)
        image.file.flush()
        record.empty()
        _take_number_out(image)
        is_over = True
    finally:
        record.close(remove=is_over)
    return Recovery(Outcome.REPLAYED if entries else Outcome.CLEAN, len(entries), number=number)


def _take_number_out(image: "Image") -> None:
    image.set_features(autoclear=image.header.autoclear & OTHER_AUTOCLEAR)


def _verified(image: "Image", changes: list[Change]) -> Entries:
    """The entries that the file is to get and does not hold yet.

    :raise Refused: record and image contradict each other. :raise ImageCorrupt: the image does so itself.
    """
    header = image.header
    if header.incompatible & DIRTY:
        raise Refused("The image's refcounts are not up to date")
    worlds, allowed = _read(changes)
    if changes and digest(header.pack_world()) not in worlds:
        raise Refused("The image's header is not the one that the record of unflushed writes is about")
    own = _own_tables(image)
    entry_bytes = header.l2_entry_words * 8
    entries: Entries = {}
    before: Entries = {}
    # A table that is not there any more was replaced: its successor was made with everything that this one was to get.
    for table in own & allowed.keys():
        data = image.file.read(table, image.cluster_size)
        for index, values in allowed[table].items():
            if index >= header.l2_entries:
                raise Refused("The record of unflushed writes is damaged")
            present = bytes(data[index * entry_bytes : (index + 1) * entry_bytes])
            if present not in values:
                raise Refused("The image was changed since the record of unflushed writes was made")
            if present != values[-1]:
                entries[table, index] = values[-1]
                before[table, index] = present
    _verify_clusters(image, entries, before)
    return entries


def _read(changes: list[Change]) -> tuple[set[bytes], Allowed]:
    """The digests of worlds, and what each entry may be in the file."""
    worlds: set[bytes] = set()
    allowed: Allowed = {}
    for change in changes:
        if change.kind is Kind.WORLD:
            worlds.add(change.after)
        elif change.kind is Kind.FORGET:
            allowed.pop(change.table, None)
        else:
            values = allowed.setdefault(change.table, {}).setdefault(change.index, [change.before])
            values.append(change.after)
    return worlds, allowed


def _own_tables(image: "Image") -> set[int]:
    """Host offsets of the active tree's own L2 tables."""
    import numpy as np

    words = np.frombuffer(bytes(image.world.l1), ">u8").astype(np.uint64)
    owned = words[(words & np.uint64(COPIED)) != 0] & np.uint64(OFFSET_MASK)
    aligned = (owned != 0) & (owned & np.uint64(image.cluster_size - 1) == 0)
    return set(owned[aligned].tolist())


def _verify_clusters(image: "Image", entries: Entries, present: Entries) -> None:
    """What the new entries point to is counted, theirs alone where they say so, and no metadata.

    :param present: what the file holds in their places. An entry without COPIED is the present one with a flag changed.
    """
    header = image.header
    seen: set[int] = set()
    for place, data in entries.items():
        entry, before = (image.l2.unpack(each, 0, 1)[0] for each in (data, present[place]))
        image.l2.check(entry)
        if not entry & COMPRESSED and entry & L2_RESERVED:
            raise Refused("The record of unflushed writes holds an entry that none can be")
        with image.gate.lock:
            if image.metadata_at(place[0] >> header.cluster_bits) != ACTIVE_L2:
                raise Refused("The record of unflushed writes contradicts the image's tables")
            for cluster in image.l2.counted(entry):
                count = image.refcounts.count(cluster)
                if entry & COPIED:
                    is_right = count == 1 and cluster not in seen
                elif entry & COMPRESSED:
                    is_right = count > 0
                else:
                    is_right = count > 1 and not (entry ^ before) & (OFFSET_MASK | COPIED | COMPRESSED)
                if not is_right or image.metadata_at(cluster):
                    raise Refused("The record of unflushed writes contradicts the image's refcounts")
                seen.add(cluster)
