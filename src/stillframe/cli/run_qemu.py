"""`stillframe run --engine qemu`: what QEMU is to be, where it lives, and how one that was left alone is taken over."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from stillframe.errors import InvalidRequest, Refused
from stillframe.machine.build import MachineHome, QemuConfig, drive_of, refuse_words, take_over
from stillframe.monitor.addresses import machine_home

if TYPE_CHECKING:
    from stillframe.block.graph import BlockGraph
    from stillframe.cli.run_options import RunOptions
    from stillframe.machine.console import Console

_WITH_ADOPT = frozenset({"adopt", "console", "addresses", "allow_local_users", "detach"})


def new_home(options: "RunOptions", words: Sequence[str]) -> MachineHome:
    """The directory of a new machine. :param words: that it was asked for with.

    :raise InUse: there is a machine of that name. :raise Refused: its QEMU waits for somebody who goes on with it.
    """
    if options.name is None:
        return MachineHome.temporary()
    return MachineHome.named(machine_home(options.name, create=True), words)


def refuse_beside_adopt(context: click.Context) -> None:
    """:raise InvalidRequest: something was given that an adopted machine has already."""
    for key in context.params:
        if context.get_parameter_source(key) is ParameterSource.COMMANDLINE and key not in _WITH_ADOPT:
            raise InvalidRequest(
                "A machine that is adopted is what it was",
                remedy="Beside --adopt, give --console, --qmp, --allow-local-users and --detach alone.",
            )


def former_request(home: MachineHome, context: click.Context) -> dict[str, Any]:
    """What the machine was asked for with, as `run` takes it; paths are from where this goes to.

    :param context: of the command that adopts it. :raise Refused: it makes no sense any more.
    """
    name = home.path.stem
    if home.record is None:
        raise TypeError("a machine that is found has a record")
    try:
        os.chdir(home.record.place)
        former = context.command.make_context("run", list(home.record.words), parent=context.parent).params
    except (OSError, click.UsageError) as error:
        raise Refused(
            f"The words that the machine '{name}' was started with cannot be used: {error}"
        ) from error
    if former["name"] != name or former["engine"] != "qemu" or former["adopt"] is not None:
        raise Refused(f"The record of the machine '{name}' is another one's")
    given = context.params
    return {
        **former,
        "console": given["console"] or former["console"],
        "addresses": (*former["addresses"], *given["addresses"]),
        "allow_local_users": former["allow_local_users"] or given["allow_local_users"],
        "detach": False,
    }


@contextmanager
def opening_again(home: MachineHome, graph: "BlockGraph") -> Iterator[None]:
    """In the block the images are opened; at its end the guest may have them back, or was ended.

    :raise StillframeError: see `take_over`; what the block raises leaves QEMU waiting.
    """
    home.begin_opening()
    try:
        yield
        take_over(home, graph.get)
    except BaseException:
        if home.stays:
            home.give_up(graph.get)
        raise


def qemu_config(
    options: "RunOptions", graph: "BlockGraph", console: "Console", home: MachineHome
) -> QemuConfig:
    """What the machine is to be; its nodes are in use from here on. :raise Refused: the words do not fit, or a node does not."""
    refuse_words(options.words)
    users = [(drive_of(text), f"device {number}") for number, text in enumerate(options.devices_as_given)]
    users += [(name, f"flash {number}") for number, name in enumerate(options.flash)]
    nodes = []
    for name, user in users:
        if name is not None:
            node = graph.find(name)
            graph.use(node, user, writable=not node.read_only)
            nodes.append(node)
    return QemuConfig(
        name=options.name,
        program=options.qemu,
        machine_type=options.board or None,
        memory_size=options.memory,
        kernel=options.kernel,
        initrd=options.initrd,
        append=options.append,
        bios=options.bios,
        devices=options.devices_as_given,
        nodes=tuple(nodes),
        flash=options.flash,
        words=options.words,
        console=None if options.console.kind == "none" else console,
        agent=options.agent,
        home=home,
        keep_after_shutdown=options.keep_after_shutdown,
        reconnect_seconds=options.reconnect,
        is_node=lambda name: graph.get(name) is not None,
    )
