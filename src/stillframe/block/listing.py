"""What people are shown of images, in QEMU's form: the table of snapshots, an image's description."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from stillframe.text import format_clock, format_date, format_size, printable

if TYPE_CHECKING:
    from stillframe.block.node import SnapshotInfo


def snapshot_table(snapshots: "Sequence[SnapshotInfo]", *, with_ids: bool = True) -> Iterator[str]:
    """The lines of QEMU's table of snapshots, as its 10.0 prints it, the head included.

    :param with_ids: without them `--` stands in their place: the images of a list have ids of their own.
    """
    yield _snapshot_line("ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT")
    for each in snapshots:
        yield _snapshot_line(
            each.id if with_ids else "--",
            each.name,
            format_size(each.state_size),
            format_date(each.date_sec),
            format_clock(each.vm_clock_ns),
            "--" if each.icount is None else str(each.icount),
        )


def _snapshot_line(number: str, tag: str, size: str, date: str, clock: str, icount: str) -> str:
    number, tag = printable(number), printable(tag)
    return f"{number:<7} {tag:<16} {size:>8} {date:>19} {clock:>15} {icount:>10}"


def image_lines(shown: Mapping[str, Any], snapshots: "Sequence[SnapshotInfo]") -> Iterator[str]:
    """An image without its children.

    :param shown: as `describe.image_info_json` has it. :param snapshots: the image's.
    """
    size = shown["virtual-size"]
    actual = shown.get("actual-size")
    yield f"image: {printable(shown['filename'])}"
    yield f"file format: {shown['format']}"
    yield f"virtual size: {format_size(size)} ({size} bytes)"
    yield f"disk size: {'unavailable' if actual is None else format_size(actual)}"
    if shown.get("encrypted"):
        yield "encrypted: yes"
    if "cluster-size" in shown:
        yield f"cluster_size: {shown['cluster-size']}"
    if shown.get("dirty-flag"):
        yield "cleanly shut down: no"
    backing = shown.get("backing-filename")
    if backing is not None:
        full = shown["full-backing-filename"]
        path = "" if full == backing else f" (actual path: {printable(full)})"
        yield f"backing file: {printable(backing)}{path}"
    if "backing-filename-format" in shown:
        yield f"backing file format: {printable(shown['backing-filename-format'])}"
    if snapshots:
        yield "Snapshot list:"
        yield from snapshot_table(snapshots)
    specific = shown.get("format-specific", {}).get("data")
    if specific:
        yield "Format specific information:"
        for name, value in specific.items():
            text = str(value).lower() if isinstance(value, bool) else str(value)
            yield f"    {name.replace('-', ' ')}: {printable(text)}"
