"""Where characters of monitors and of the serial port come from and go to: `-chardev`, and the short forms of other options."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from stillframe.cli.drop_in_parameters import refuse_unknown
from stillframe.cli.drop_in_words import BadOption, Option, key_values, switch
from stillframe.monitor.addresses import Address, FdAddress, StdioAddress, TcpAddress, UnixAddress


@dataclass(frozen=True, slots=True)
class Chardev:
    """One of them.

    :param kind: "stdio", "null", "pty", "file", "unix", "tcp", or "fd" for a unix socket that was handed over. :param address: of
        the last three and "stdio". :param path: of "file" and "unix". :param waits: whether the guest waits for a client.
    :param fd: of "file" without a path: what is written to.
    """

    kind: str
    address: Address | None = None
    path: Path | None = None
    waits: bool = False
    fd: int | None = None


def backend(option: Option, kind: str, words: Mapping[str, str]) -> Chardev:
    """:param kind: as QEMU calls it. :param words: its parameters. :raise BadOption: one that there is not."""
    refuse_unknown(option, "chardev", words)
    if kind == "stdio":
        return Chardev("stdio", StdioAddress())
    if kind in ("null", "pty"):
        return Chardev(kind)
    if kind == "file":
        if "path" not in words:
            raise option.refused("chardev: file: no filename given")
        if not switch(option, "append", words.get("append", "on")):
            raise option.refused("Parameter 'append' does not accept value 'off'")
        return Chardev("file", path=Path(words["path"]))
    if kind != "socket":
        raise option.refused(f"'{kind}' is not a valid char driver name")
    if len(words.keys() & {"path", "fd", "host"}) > 1:
        raise option.refused("None or one of 'path', 'fd' or 'host' option required.")
    server = switch(option, "server", words.get("server", "off"))
    waits = server and switch(option, "wait", words.get("wait", "on"))
    if "path" in words:
        path = Path(words["path"])
        if not server:
            raise option.refused(f"Failed to connect to '{path}': only server=on is there")
        return Chardev("unix", UnixAddress(path), path, waits)
    if "fd" in words:
        number, family = _socket(option, words["fd"])
        if not server:
            raise option.refused(f"Failed to connect to 'fd:{number}': only server=on is there")
        return Chardev("fd" if family == socket.AF_UNIX else "tcp", FdAddress(number), None, waits)
    if not words.get("port", "").isdigit():
        raise option.refused("chardev: socket: no path, host or port given")
    return Chardev("tcp", TcpAddress(words.get("host") or "127.0.0.1", int(words["port"])), None, waits)


def _socket(option: Option, text: str) -> tuple[int, int]:
    """The number and the family of a socket that was handed over."""
    if not text.isdecimal():
        raise option.refused(f"Unable to parse FD number {text}")
    try:
        sock = socket.socket(fileno=int(text))
    except (OSError, OverflowError):
        raise option.refused(f"File descriptor '{text}' is not a socket") from None
    return sock.detach(), sock.family


def character(option: Option) -> Chardev | str | None:
    """What `-serial`, `-qmp` and `-monitor` name in short; None for nothing."""
    kind, _, rest = option.value.partition(":")
    if option.value in ("none", "vc") or kind == "vc":
        return None
    if kind == "mon":
        kind, _, rest = rest.partition(":")
    if kind == "chardev":
        return rest
    if kind in ("stdio", "null", "pty"):
        return backend(option, kind, {})
    if kind == "file":
        return backend(option, kind, {"path": rest})
    if kind == "unix":
        return backend(option, "socket", key_values(Option(option.name, rest), "path"))
    if kind == "tcp":
        words = key_values(Option(option.name, rest), "host")
        host, _, port = words.pop("host", "").rpartition(":")
        return backend(option, "socket", {**words, "host": host, "port": port})
    if option.name == "serial":
        raise BadOption(
            f"{option.text}: '{option.value}' is not a valid char driver\n"
            f"{option.text}: could not connect serial device to character backend '{option.value}'"
        )
    raise BadOption(
        f"{option.text}: '{option.value}' is not a valid char driver\n"
        f"{option.text}: parse error: {option.value}"
    )
