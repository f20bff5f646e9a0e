"""What two QEMUs with the same words would both use, while a load hands the machine from one to the other.

    memory in a file      with share=on the second would write into the memory of the first: it is refused by name
    sockets with a path   the second binds each anew under its name, where nobody finds the first any more: its socket has a
                          second name meanwhile, and gets its own back if it stays the machine
    all else              ports, locks, devices: the second does not start, and says why

Whoever takes the machine over after our death gives the names back, too (adopt.py).
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from stillframe.errors import Refused, Unsupported
from stillframe.machine.engines.qemu.monitor import QemuMonitor
from stillframe.machine.engines.qemu.process import QemuProcess

_ACCEPTS: Final = 0x10000
"""__SO_ACCEPTCON, of the flags in /proc/net/unix."""
_KEPT: Final = ".stillframe-load"


@contextmanager
def beside(process: QemuProcess | None, stays: Callable[[], bool]) -> Iterator[None]:
    """A block in which a second one is started, and has ended at its end if it has not become the machine.

    :param process: the first; None where it was ended before. :param stays: whether it is still the machine.
    :raise Unsupported: the two cannot be there at once.
    """
    if process is None:
        yield
        return
    _refuse_shared_memory(process.monitor)
    paths = list(_listens_at(process.pid))
    for path in paths:
        with contextlib.suppress(OSError):
            _kept(path).unlink(missing_ok=True)
            os.link(path, _kept(path), follow_symlinks=False)
    try:
        yield
    finally:
        (_give_back if stays() else _give_up)(paths)


def does_not_start(error: Refused) -> Refused:
    """The refusal of a second one, in its words, with a way out."""
    return Refused(
        f"No second QEMU starts beside the one that runs: {error}; if that one stands in the way, `replace` ends it first"
    )


def _refuse_shared_memory(monitor: QemuMonitor) -> None:
    """:raise Unsupported: a memory backend's file would be that of both."""
    for name in memories_in_files(monitor):
        path = f"/objects/{name}"
        if monitor.execute("qom-get", {"path": path, "property": "share"}):
            file = monitor.execute("qom-get", {"path": path, "property": "mem-path"})
            raise Unsupported(
                f"The memory of '{name}' is the file '{file}' with share=on: a second QEMU would write into it while the "
                "first one runs on it; `replace` would end that one first"
            )


def memories_in_files(monitor: QemuMonitor) -> list[str]:
    """The names of the memory backends that have a file."""
    objects = monitor.execute("qom-list", {"path": "/objects"})
    return [each["name"] for each in objects if each["type"] == "child<memory-backend-file>"]


def give_sockets_back(pid: int) -> None:
    """The other one has ended, and this one is the machine: it is found again at the names that it had."""
    _give_back(list(_listens_at(pid)))


def give_sockets_up(pid: int) -> None:
    """This one will end: its names are the other's."""
    _give_up(_listens_at(pid))


def _give_back(paths: Sequence[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            _kept(path).replace(path)
    # Of two names of one socket none is replaced.
    _give_up(paths)


def _give_up(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            _kept(path).unlink(missing_ok=True)


def _kept(path: Path) -> Path:
    return path.with_name(path.name + _KEPT)


def _listens_at(pid: int) -> Iterator[Path]:
    """Names of the sockets at which a process accepts connections; none where the kernel does not tell us."""
    ours = set()
    try:
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                ours.add(os.readlink(entry.path))
        lines = Path("/proc/net/unix").read_text(errors="surrogateescape").splitlines()
        place = Path(os.readlink(f"/proc/{pid}/cwd"))
    except OSError:
        return
    for line in lines[1:]:
        # man 5 proc: address, users, protocol, flags, type, state, inode, name; @ begins one that is no file's.
        words = line.split(maxsplit=7)
        if len(words) < 8 or words[7].startswith("@"):
            continue
        if int(words[3], 16) & _ACCEPTS and f"socket:[{words[6]}]" in ours:
            yield place / words[7]
