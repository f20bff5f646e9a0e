"""What is thrown at each room that reads what others wrote: bytes in; nothing, or an error of ours, out."""

from collections.abc import Callable, Mapping

from fuzzing.disks import attempt, check_it, look_at, repair_it, write_to
from stillframe.block.opening import backing_options
from stillframe.block.options import parse_options
from stillframe.block.qcow2.lineage import pack_lineage, unpack_lineage
from stillframe.errors import StillframeError
from stillframe.monitor.tokens import MAX_TOKEN_BYTES
from stillframe.monitor.wire import Decoder, JSONError, to_text
from stillframe.vmstate.ram import PageMap
from vmstate.streams import surveyed

Target = Callable[[bytes], None]


def state_stream(data: bytes) -> None:
    """The reader of machine states."""
    pages = PageMap()

    def look() -> None:
        found = surveyed(data, "none", {}, pages)
        for block in found.blocks or ():
            addresses, offsets = pages.latest(block.name)
            assert len(addresses) == len(offsets)
            assert not len(addresses) or addresses.max() < block.length

    attempt(look)


def lineage(data: bytes) -> None:
    """Our record in a snapshot's extra data: read, and what was understood can be written and read again."""
    found = unpack_lineage(data)
    if found is not None:
        try:
            record = pack_lineage(found)
        except StillframeError:
            return
        assert unpack_lineage(record) == found


def names(data: bytes) -> None:
    """Block options as text, and what an image says of what lies below it."""
    text = data.decode("utf-8", "surrogateescape")
    attempt(lambda: parse_options(text))
    for kind in (None, "qcow2", "raw", text[:6]):
        attempt(lambda kind=kind: backing_options("/nowhere/image.qcow2", text, kind))
        attempt(lambda kind=kind: backing_options("/nowhere/image.qcow2", "json:" + text, kind))


def monitor(data: bytes) -> None:
    """A client's text, cut in two at any place: the same values and errors as in one piece."""
    whole = list(Decoder().feed(data))
    parts = Decoder()
    cut = data[0] if data else 0
    found = [*parts.feed(data[:cut]), *parts.feed(data[cut:])]
    assert [_shown(each) for each in found] == [_shown(each) for each in whole]
    assert len(data) <= MAX_TOKEN_BYTES


def _shown(value: object) -> str:
    return str(value) if isinstance(value, JSONError) else to_text(value)


IMAGES: Mapping[str, Target] = {
    "look": look_at,
    "check": check_it,
    "write": write_to,
    "repair": repair_it,
}
"""Targets that take a qcow2 image."""

TARGETS: Mapping[str, Target] = IMAGES | {
    "stream": state_stream,
    "lineage": lineage,
    "names": names,
    "monitor": monitor,
}
