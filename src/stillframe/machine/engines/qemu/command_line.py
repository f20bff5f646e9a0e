"""QEMU's command line: what `stillframe run --engine qemu` was asked for, in QEMU's own options.

A node of ours is a block node of the same name there, connected to its export. Everything else that a user gives behind `--` is
handed on as it stands, but for what would take the machine's state out of our hands.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stillframe.block.node import Node
from stillframe.errors import InvalidRequest
from stillframe.machine.console import Console
from stillframe.machine.engines.qemu.display import aside
from stillframe.machine.engines.qemu.home import MachineHome

_OURS: Final = {
    "-S": "--paused",
    "-incoming": "`stillframe load`",
    "-loadvm": "`stillframe load`",
    "-daemonize": "--detach",
    "-snapshot": "`stillframe load`, which goes back as well",
    "-m": "--memory",
    "-name": "--name",
}


@dataclass(frozen=True, slots=True)
class QemuConfig:
    """What `stillframe run --engine qemu` takes, nodes opened.

    :param program: QEMU's, by name or path. :param machine_type: as its `-machine`; None for its own choice.
    :param devices: as its `-device`; those with `drive=` name a node. :param nodes: that the devices and flash use, by node-name.
    :param flash: node-names of the flash banks, in their order. :param words: all else, handed on.
    :param console: the first serial port's other end; None: QEMU's own choice.
    :param home: the machine's directory. :param keep_after_shutdown: a guest that powers itself off does not end the machine.
    :param reconnect_seconds: for which the guest's disk requests wait while nobody serves them; then they fail.
    :param agent: the guest gets a port for QEMU's guest agent, whose other end is ours.
    :param is_node: whether there is a node of that name now, among those of ours that it does not use as well.
    """

    name: str | None
    program: str
    machine_type: str | None
    memory_size: int
    kernel: Path | None
    initrd: Path | None
    append: str
    bios: Path | None
    devices: tuple[str, ...]
    nodes: tuple[Node, ...]
    flash: tuple[str, ...]
    words: tuple[str, ...]
    console: Console | None
    home: MachineHome
    keep_after_shutdown: bool
    reconnect_seconds: int
    agent: bool = False
    is_node: Callable[[str], bool] = lambda name: False


def refuse_words(words: Sequence[str]) -> None:
    """:raise InvalidRequest: one of them is ours to decide."""
    for word in words:
        instead = _OURS.get("-" + word.lstrip("-") if word.startswith("-") else word)
        if instead is not None:
            raise InvalidRequest(f"'{word}' cannot be handed on to QEMU", remedy=f"Use {instead}.")


def drive_of(device: str) -> str | None:
    """The node-name that a `--device` uses; None without one."""
    for pair in device.split(",")[1:]:
        key, _, value = pair.partition("=")
        if key == "drive":
            return value
    return None


def command_line(config: QemuConfig, exports: Path, *, successor_in: Path | None) -> list[str]:
    """The program and its arguments; it waits for `cont`.

    :param exports: the socket of our exports, each named as its node.
    :param successor_in: the private directory of one that is to be given its state, beside another with the same words; None for
        the first.
    """
    words = [config.program, "-S", "-m", f"{config.memory_size >> 20}M"]
    if config.name is not None:
        words += ["-name", config.name.replace(",", ",,")]
    if config.machine_type is not None:
        words += ["-machine", config.machine_type]
    for node in config.nodes:
        words += ["-blockdev", json.dumps(_blockdev(node, exports, config.reconnect_seconds))]
    for number, name in enumerate(config.flash):
        words += ["-machine", f"pflash{number}={name}"]
    for option, path in (("-kernel", config.kernel), ("-initrd", config.initrd), ("-bios", config.bios)):
        if path is not None:
            words += [option, str(path)]
    if config.append:
        words += ["-append", config.append]
    for device in config.devices:
        words += ["-device", device]
    if not {"-display", "-nographic", "-vnc"} & set(config.words):
        words += ["-display", "none"]
    if config.keep_after_shutdown:
        words += ["-no-shutdown"]
    if successor_in is None:
        return [*words, *config.words]
    return [*words, *aside(config.words, successor_in / "vnc"), "-incoming", "defer"]


def _blockdev(node: Node, exports: Path, reconnect_seconds: int) -> dict[str, object]:
    return {
        "driver": "nbd",
        "node-name": node.node_name,
        "server": {"type": "unix", "path": str(exports)},
        "export": node.node_name,
        "reconnect-delay": reconnect_seconds,
        "read-only": node.read_only,
        "discard": "unmap",
    }
