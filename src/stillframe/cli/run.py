"""`stillframe run`: what a machine is to be, asked for and checked; serve.py makes it."""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillframe.cli.run_options import (
    RunOptions,
    monitor_places,
    parse_console,
    parse_device,
    parse_memory,
)
from stillframe.cli.serve import serve, start_detached
from stillframe.data import bundled_guest
from stillframe.errors import InvalidRequest

if TYPE_CHECKING:
    from stillframe.block.graph import BlockGraph
    from stillframe.machine.tracking import HashName

_BUNDLED = Path("bundled")
_WORDS = "stillframe.run.words"
_HOME = "stillframe.run.home"


class _RunCommand(click.Command):
    """Keeps the words that it was given: a machine's record holds them, for whoever takes it over."""

    def parse_args(self, context: click.Context, args: list[str]) -> list[str]:
        context.meta[_WORDS] = tuple(args)
        return super().parse_args(context, args)


@click.command(
    cls=_RunCommand,
    epilog="""\b
EXAMPLES
  stillframe run --name box --memory 256M --kernel Image --initrd initrd.gz --append console=ttyS0 \\
      --blockdev driver=qcow2,node-name=root,file.driver=file,file.filename=root.qcow2 \\
      --device virtio-blk,drive=root
  stillframe run --name box --detach --console log:box.log --kernel Image
  stillframe run --name box --kernel Image --hash blake3
  stillframe run --machine none --qmp stdio --blockdev '{"driver": "null-co", "node-name": "n"}'
  stillframe run --engine qemu --machine q35 --name box --memory 1G \\
      --blockdev driver=qcow2,node-name=root,file.driver=file,file.filename=root.qcow2 \\
      --device virtio-blk-pci,drive=root -- -accel kvm -cpu host -nic user
  stillframe run --adopt box

\b
ENGINES
  unicorn     riscv64 guests, in this process
  qemu        any guest of a QEMU of yours, 7.2 or newer: it runs the processors and devices, its
              disks are our nodes. --machine and --device are QEMU's own words then, and so is
              everything behind `--`.

\b
CONSOLE
  stdio       this terminal; Ctrl-A x ends the machine (the default, but with --detach)
  unix:PATH   a socket of mode 0600
  log:PATH    appended to a file
  none        dropped (the default with --detach)

\b
MONITOR
  --name NAME listens where `stillframe save NAME …` finds it; --qmp adds further places:
  unix:PATH, stdio, or tcp:HOST:PORT on a loopback address. There is no authentication: a TCP
  port is open to every user of this host, so it needs --allow-local-users, too.

SIGTERM and SIGINT end the machine as `quit` does: jobs are cancelled and waited for, images stay
consistent. A second one ends it at once.""",
)
@click.option("--name", metavar="NAME", help="What the machine is called; other commands find it by this.")
@click.option(
    "--engine",
    type=click.Choice(["unicorn", "qemu"]),
    default="unicorn",
    show_default=True,
    help="What runs the guest's instructions.",
)
@click.option(
    "--qemu", default="qemu-system-x86_64", show_default=True, metavar="PROGRAM", help="Which QEMU it is."
)
@click.option(
    "--agent", is_flag=True, help="A port for QEMU's guest agent, for `save --quiesce`; with --engine qemu."
)
@click.option(
    "--restart",
    is_flag=True,
    help="When QEMU dies, start the machine anew, on its disks as they are; three times a minute at most.",
)
@click.option("--machine", "board", help="The board: virt (the default), or none for nodes alone; or QEMU's.")
@click.option("--memory", default="128M", show_default=True, metavar="SIZE", help="The guest's memory.")
@click.option(
    "--kernel",
    type=click.Path(path_type=Path),
    help="A riscv64 kernel: Image, Image.gz or ELF; or `bundled`, the guest that comes with stillframe.",
)
@click.option("--initrd", type=click.Path(path_type=Path), help="The kernel's initial file system.")
@click.option("--append", default="", metavar="WORDS", help="The kernel's command line.")
@click.option("--bios", type=click.Path(path_type=Path), help="Firmware to start, in S mode.")
@click.option(
    "--blockdev", "blockdevs", multiple=True, metavar="OPTIONS", help="A node: JSON or dotted keys."
)
@click.option(
    "--device", "devices", multiple=True, metavar="OPTIONS", help="A disk: virtio-blk,drive=NODE; repeatable."
)
@click.option(
    "--flash", multiple=True, metavar="NODE", help="A node in a flash device; its content is machine state."
)
@click.option("--qmp", "addresses", multiple=True, metavar="ADDRESS", help="A further monitor; repeatable.")
@click.option(
    "--allow-local-users", is_flag=True, help="Let a TCP monitor be open to all users of this host."
)
@click.option("--console", metavar="WHERE", help="The guest's serial console; see below.")
@click.option(
    "--icount",
    type=click.IntRange(0, 10),
    metavar="SHIFT",
    help="Time from the instructions counted: 2^SHIFT ns each.",
)
@click.option(
    "--hash",
    "algorithm",
    type=click.Choice(["xxh3", "blake3"]),
    default="xxh3",
    show_default=True,
    help="What finds changed pages where the kernel does not tell; blake3 for a guest that you have to fear.",
)
@click.option(
    "--stale",
    type=click.IntRange(0, 100),
    default=50,
    show_default=True,
    metavar="PERCENT",
    help="How much of a state may be pages that have changed since; with more, the next save is a whole one.",
)
@click.option("--paused", is_flag=True, help="Wait for `cont` before the first instruction.")
@click.option("--no-shutdown", is_flag=True, help="Stay when the guest powers itself off.")
@click.option(
    "--reconnect",
    type=click.IntRange(1, 1 << 31),
    default=300,
    show_default=True,
    metavar="SECONDS",
    help="How long a QEMU's disk requests wait when this process was killed, before they fail.",
)
@click.option(
    "--adopt",
    metavar="NAME",
    help="Go on with the QEMU of a machine whose stillframe was killed; all else is as it was.",
)
@click.option("--detach", is_flag=True, help="Go on in the background once the machine runs.")
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def run(
    name: str | None,
    engine: str,
    qemu: str,
    agent: bool,
    restart: bool,
    board: str | None,
    memory: str,
    kernel: Path | None,
    initrd: Path | None,
    append: str,
    bios: Path | None,
    blockdevs: tuple[str, ...],
    devices: tuple[str, ...],
    flash: tuple[str, ...],
    addresses: tuple[str, ...],
    allow_local_users: bool,
    console: str | None,
    icount: int | None,
    algorithm: "HashName",
    stale: int,
    paused: bool,
    no_shutdown: bool,
    reconnect: int,
    adopt: str | None,
    detach: bool,
    words: tuple[str, ...],
) -> int:
    """Run a machine."""
    context = click.get_current_context()
    if adopt is not None:
        return _adopt(adopt, context)
    if words and engine != "qemu":
        raise InvalidRequest(
            f"'{' '.join(words)}' is for a QEMU, and the engine is {engine}", remedy="Add --engine qemu."
        )
    if agent and engine != "qemu":
        raise InvalidRequest("A guest agent's port is for --engine qemu", remedy="Leave --agent out.")
    if restart and engine != "qemu":
        raise InvalidRequest("Only a QEMU can be started anew", remedy="Leave --restart out.")
    standard = "none" if detach or "stdio" in addresses else "stdio"
    console_options = parse_console(console or standard)
    options = RunOptions(
        name=name,
        board=board or ("" if engine == "qemu" else "virt"),
        memory=parse_memory(memory),
        kernel=bundled_guest() if kernel == _BUNDLED else kernel,
        initrd=initrd,
        append=append,
        bios=bios,
        blockdevs=blockdevs,
        devices=() if engine == "qemu" else tuple(parse_device(text) for text in devices),
        flash=flash,
        monitors=monitor_places(name, addresses, console_options),
        allow_local_users=allow_local_users,
        console=console_options,
        icount=icount,
        algorithm=algorithm,
        stale_percent=stale,
        restart=restart,
        paused=paused,
        keep_after_shutdown=no_shutdown,
        engine=engine,
        qemu=qemu,
        agent=agent,
        devices_as_given=devices,
        reconnect=reconnect,
        words=words,
    )
    if detach:
        if "stdio" in (console_options.kind, *addresses):
            raise InvalidRequest(
                "A machine in the background has no standard input and output",
                remedy="Use --console unix:PATH or log:PATH, and --name or --qmp unix:PATH.",
            )
        if not options.monitors:
            raise InvalidRequest(
                "A machine in the background without a monitor could not be spoken with",
                remedy="Give it a --name, or --qmp unix:PATH.",
            )
        return start_detached("stillframe", [word for word in sys.argv[1:] if word != "--detach"])
    if not options.monitors:
        click.echo("stillframe: this machine has no monitor; --name or --qmp would give it one", err=True)
    return serve(
        options,
        lambda graph: _add_nodes(graph, options.blockdevs),
        asked=context.meta[_WORDS],
        found=context.meta.get(_HOME),
    )


def _adopt(name: str, context: click.Context) -> int:
    """Run the command that the machine was started with, but with the QEMU that there is."""
    from stillframe.cli.run_qemu import former_request, refuse_beside_adopt
    from stillframe.machine.build import MachineHome
    from stillframe.monitor.addresses import machine_home

    refuse_beside_adopt(context)
    if context.params["detach"]:
        return start_detached("stillframe", [word for word in sys.argv[1:] if word != "--detach"])
    with contextlib.closing(MachineHome.found(machine_home(name, create=False))) as home:
        request = former_request(home, context)
        context.meta[_HOME] = home
        return int(context.invoke(run, **request))


def _add_nodes(graph: "BlockGraph", texts: Sequence[str]) -> None:
    from stillframe.block.options import parse_options

    for text in texts:
        graph.blockdev_add(parse_options(text))
