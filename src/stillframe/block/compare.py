"""Two disks compared, as `qemu-img compare` does it: what reads alike is alike, however it is stored."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from stillframe.block.node import Node
from stillframe.block.status import Status, statuses

READ_AT_ONCE = 2 << 20
"""Bytes of each disk that are held at a time."""

_SECTOR = 512
_ZEROES = bytes(READ_AT_ONCE)

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all; what it raises ends the work."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of it.

    :param difference: None for disks that read alike; "status" and "size" are differences to a strict eye alone.
    :param offset: the sector with the first difference; 0 for a "size".
    :param is_longer: the sizes differ, and what one has more was looked at: zeroes are no difference.
    """

    difference: Literal["size", "status", "content"] | None
    offset: int = 0
    is_longer: bool = False


def compare(
    first: Node, second: Node, *, strict: bool = False, progress: Progress | None = None
) -> Comparison:
    """Compare two disks to their first difference.

    :param strict: sizes, and which parts are allocated, must agree, too.
    """
    if strict and first.size != second.size:
        return Comparison("size")
    total, common = max(first.size, second.size), min(first.size, second.size)
    for one, other in _side_by_side(first, second, common):
        if strict and not _are_alike(one, other):
            return Comparison("status", one.offset)
        if not (one.zero and other.zero):
            for offset, length in _pieces(one):
                found = _first_difference(
                    None if one.zero else first, None if other.zero else second, offset, length
                )
                if found is not None:
                    return Comparison("content", found)
                if progress is not None:
                    progress(offset + length, total)
        elif progress is not None:
            progress(one.end, total)
    if first.size == second.size:
        return Comparison(None)
    longer = first if first.size > second.size else second
    for status in statuses(longer, common, total - common):
        for offset, length in _pieces(status) if not status.zero else ():
            found = _first_difference(longer, None, offset, length)
            if found is not None:
                return Comparison("content", found, is_longer=True)
            if progress is not None:
                progress(offset + length, total)
    return Comparison(None, is_longer=True)


def _side_by_side(first: Node, second: Node, length: int) -> Iterator[tuple[Status, Status]]:
    """Both disks' runs, cut so that they lie side by side."""
    ones, others = statuses(first, 0, length), statuses(second, 0, length)
    one, other = next(ones, None), next(others, None)
    at = 0
    while one is not None and other is not None:
        end = min(one.end, other.end)
        yield _cut(one, at, end), _cut(other, at, end)
        at = end
        if one.end == end:
            one = next(ones, None)
        if other.end == end:
            other = next(others, None)


def _cut(status: Status, start: int, end: int) -> Status:
    return Status(
        start,
        end - start,
        status.depth,
        status.present,
        status.zero,
        status.data,
        status.compressed,
        None if status.host_offset is None else status.host_offset + start - status.offset,
    )


def _are_alike(one: Status, other: Status) -> bool:
    """Stored alike; where they lie, and in which image of the chain, does not matter."""
    return (one.present, one.zero, one.data, one.compressed, one.host_offset is None) == (
        other.present,
        other.zero,
        other.data,
        other.compressed,
        other.host_offset is None,
    )


def _pieces(status: Status) -> Iterator[tuple[int, int]]:
    for offset in range(status.offset, status.end, READ_AT_ONCE):
        yield offset, min(READ_AT_ONCE, status.end - offset)


def _first_difference(first: Node | None, second: Node | None, offset: int, length: int) -> int | None:
    """The first sector that differs; None in place of a node stands for zeroes."""
    one, other = _bytes_of(first, offset, length), _bytes_of(second, offset, length)
    if one == other:
        return None
    return next(
        offset + at for at in range(0, length, _SECTOR) if one[at : at + _SECTOR] != other[at : at + _SECTOR]
    )


def _bytes_of(node: Node | None, offset: int, length: int) -> bytes | bytearray:
    if node is None:
        return _ZEROES if length == len(_ZEROES) else _ZEROES[:length]
    buffer = bytearray(length)
    node.readinto(offset, memoryview(buffer))
    return buffer
