"""Memory that a load needs beside the guest's own: whether the host has it, and whether this process may have it.

The kernel's estimate is MemAvailable of /proc/meminfo. A control group that we are in, or one above it, may leave less: its limit,
without what is in use there and could not be given back at once (its page cache could). Version 1 and 2 of control groups:
Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst of Linux.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stillframe.errors import Refused

_PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Room:
    """Memory to be had. :param bytes: of it. :param whose: in words, before the figure."""

    bytes: int
    whose: str


@dataclass(frozen=True, slots=True)
class _Version:
    """Names of one version of control groups: its file system, and files in a group's directory.

    :param cache: lines of `memory.stat` that count pages which can be given back.
    """

    file_system: str
    limit: str
    usage: str
    cache: tuple[str, ...]


_VERSIONS: Final = (
    _Version("cgroup2", "memory.max", "memory.current", ("active_file", "inactive_file", "slab_reclaimable")),
    _Version(
        "cgroup",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)


def refuse_without_room(needed: int, remedy: str = "", *, proc: Path = _PROC) -> None:
    """The memory of a snapshot comes to lie beside the machine's own.

    :param needed: bytes, at most. :param remedy: what else can be done about it, a sentence.
    :raise Refused: so much is not to be had. A host that does not say is believed to have it; the kernel has the last word.
    """
    for room in (_of_the_host(proc), *_of_groups(proc)):
        if room is not None and needed > room.bytes:
            raise Refused(
                f"A load needs up to {needed >> 20} MiB of memory beside the guest's own, {room.whose} "
                f"{room.bytes >> 20} MiB",
                remedy=remedy
                or "End other programs, or load the snapshot in a machine of its own on a larger host.",
            )


def _of_the_host(proc: Path) -> Room | None:
    try:
        lines = (proc / "meminfo").read_text(encoding="ascii").splitlines()
        figures = dict(line.split(":", 1) for line in lines if ":" in line)
        return Room(int(figures["MemAvailable"].split()[0]) << 10, "the host has")
    except (OSError, KeyError, ValueError):
        return None


def _of_groups(proc: Path) -> Iterator[Room]:
    """Of our control group and of all above it that have a limit."""
    for version in _VERSIONS:
        found = _directory(proc, version)
        if found is None:
            continue
        directory, top = found
        while True:
            left = _left(directory, version)
            if left is not None:
                yield Room(left, f"the control group '{directory}' leaves")
            if directory == top:
                break
            directory = directory.parent


def _directory(proc: Path, version: _Version) -> tuple[Path, Path] | None:
    """Of our group, and of the topmost that can be seen; None where memory is not in groups of this version."""
    try:
        groups = (proc / "self/cgroup").read_text().splitlines()
        mounts = (proc / "self/mountinfo").read_text().splitlines()
    except OSError:
        return None
    second = version.file_system == "cgroup2"
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if (controllers == "") if second else ("memory" in controllers.split(",")):
            break
    else:
        return None
    for line in mounts:
        # man 5 proc: …, the root within the file system, where it is mounted, …, "-", its type, its source, its options
        before, _, behind = line.partition(" - ")
        kind, _, options = behind.split(" ", 2)
        if kind == version.file_system and (second or "memory" in options.split(",")):
            root, where = before.split()[3:5]
            top = Path(where)
            # In a container what is mounted may be our own group, by a name that is not ours.
            inner = path.removeprefix(root.rstrip("/")).strip("/")
            group = top / inner if ".." not in inner.split("/") else top
            return (group if group.is_dir() else top), top
    return None


def _left(directory: Path, version: _Version) -> int | None:
    """Bytes; None without a limit."""
    try:
        limit = int((directory / version.limit).read_text())
        usage = int((directory / version.usage).read_text())
        lines = (directory / "memory.stat").read_text().splitlines()
        figures = {name: int(value) for name, value in (line.split() for line in lines)}
    except (OSError, ValueError):
        # The topmost has no such files, and "max" is no number.
        return None
    return max(0, limit - usage + sum(figures.get(name, 0) for name in version.cache))
