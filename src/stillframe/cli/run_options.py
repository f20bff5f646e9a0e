"""What `stillframe run` is given, read and refused before anything is opened."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stillframe.errors import InvalidRequest, Unsupported
from stillframe.monitor.addresses import Address, StdioAddress, UnixAddress, machine_socket, parse_address

_UNITS = {"": 1 << 20, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+)([bkmgt]?)(?:ib?)?", re.IGNORECASE)
_MINIMUM_MEMORY = 1 << 20
_PAGE = 4096


@dataclass(frozen=True, slots=True)
class DeviceOptions:
    """A `--device`. :param kind: "virtio-blk". :param options: the rest, by key."""

    kind: str
    options: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class MonitorPlace:
    """Where a monitor listens.

    :param mode: "control" for QMP, "readline" for the human one. :param label: of its character device; "" for QEMU's usual one.
    :param waits: whether the guest does not begin before somebody has connected.
    """

    address: Address
    mode: str = "control"
    waits: bool = False
    label: str = ""


_DEVICE_KEYS = {
    "virtio-blk": frozenset({"drive", "id", "serial", "werror", "rerror"}),
}
_QEMU_NAMES = {"virtio-blk-device": "virtio-blk"}


@dataclass(frozen=True, slots=True)
class ConsoleOptions:
    """A `--console`.

    :param kind: "stdio", "unix", "log", "pty" or "none". :param path: of "unix" and "log".
    :param label: of its character device; "" for QEMU's usual one. :param fd: without a path: of "unix" a socket to
        listen at, of "log" what is written to.
    """

    kind: str
    path: Path | None = None
    label: str = ""
    fd: int | None = None


def parse_memory(text: str) -> int:
    """Bytes of guest memory; a number alone counts MiB, as QEMU's.

    :raise InvalidRequest: not a size, too small, or not whole pages.
    """
    found = _SIZE.fullmatch(text)
    if not found:
        raise InvalidRequest(f"'{text}' is not a size of memory", remedy="Write it like 256M or 1G.")
    size = int(found[1]) * _UNITS[found[2].lower()]
    if size < _MINIMUM_MEMORY or size % _PAGE:
        raise InvalidRequest(
            f"A machine cannot have {size} bytes of memory",
            remedy="Give at least 1M, in whole pages of 4 KiB.",
        )
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > available:
        raise InvalidRequest(
            f"The guest is to have {size >> 20} MiB of memory, and this host has {available >> 20} MiB",
            remedy="Give it less: --memory",
        )
    return size


def parse_device(text: str) -> DeviceOptions:
    """A device and its options.

    :raise InvalidRequest: an unknown device or option. :raise Unsupported: one of QEMU's that we have not.
    """
    kind, *pairs = text.split(",")
    kind = _QEMU_NAMES.get(kind, kind)
    keys = _DEVICE_KEYS.get(kind)
    if keys is None:
        raise Unsupported(f"There is no device '{kind}'", remedy=f"There are: {', '.join(_DEVICE_KEYS)}.")
    options: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if key not in keys or not equals:
            raise InvalidRequest(
                f"'{pair}' is not an option of {kind}", remedy=f"There are: {', '.join(sorted(keys))}."
            )
        options[key] = value
    if kind == "virtio-blk" and "drive" not in options:
        raise InvalidRequest("virtio-blk needs a node: drive=NODE", remedy="--device virtio-blk,drive=root")
    return DeviceOptions(kind, options)


def parse_console(text: str) -> ConsoleOptions:
    """:raise InvalidRequest: it is none of the kinds."""
    kind, _, path = text.partition(":")
    if text in ("stdio", "none"):
        return ConsoleOptions(text)
    if kind in ("unix", "log") and path:
        return ConsoleOptions(kind, Path(path))
    raise InvalidRequest(f"'{text}' is not a console", remedy="Use stdio, unix:PATH, log:PATH or none.")


def monitor_places(
    name: str | None, given: tuple[str, ...], console: ConsoleOptions
) -> tuple[MonitorPlace, ...]:
    """Where the monitors are to listen: at the name's own socket, and wherever asked.

    :raise InvalidRequest: not an address, or standard input and output promised twice.
    """
    addresses: list[Address] = [parse_address(text) for text in given]
    if name is not None:
        addresses.append(UnixAddress(machine_socket(name, create=True)))
    on_stdio = sum(isinstance(address, StdioAddress) for address in addresses) + (console.kind == "stdio")
    if on_stdio > 1:
        raise InvalidRequest(
            "Standard input and output can serve one only: a console or a monitor",
            remedy="Put the console elsewhere: --console unix:PATH, log:PATH or none.",
        )
    return tuple(MonitorPlace(address) for address in addresses)


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Everything that was asked for, checked as far as words can be.

    :param algorithm: :param stale_percent: see `KeepingOptions`. :param entropy: whether there is a virtio-rng device.
    :param entropy_id: its id, if it has one.
    :param loadvm: the snapshot to begin with.
    :param uuid: the machine's.
    """

    name: str | None
    board: str
    memory: int
    kernel: Path | None
    initrd: Path | None
    append: str
    bios: Path | None
    blockdevs: tuple[str, ...]
    devices: tuple[DeviceOptions, ...]
    flash: tuple[str, ...]
    monitors: tuple[MonitorPlace, ...]
    allow_local_users: bool
    console: ConsoleOptions
    icount: int | None
    paused: bool
    keep_after_shutdown: bool
    engine: str
    qemu: str
    agent: bool
    devices_as_given: tuple[str, ...]
    reconnect: int
    words: tuple[str, ...]
    algorithm: Literal["xxh3", "blake3"] = "xxh3"
    stale_percent: int = 50
    restart: bool = False
    entropy: bool = True
    entropy_id: str | None = None
    loadvm: str | None = None
    uuid: str | None = None
