"""`stillframe run`: a machine is put together from its options, and served until it ends."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from stillframe.cli.main import EXIT_FAILED
from stillframe.cli.run_options import (
    ConsoleOptions,
    DeviceOptions,
    MonitorPlace,
    monitor_places,
    parse_console,
    parse_device,
    parse_memory,
)
from stillframe.data import bundled_guest
from stillframe.errors import InvalidRequest

if TYPE_CHECKING:
    from stillframe.block.graph import BlockGraph
    from stillframe.events import EventBus
    from stillframe.machine.build import MachineConfig, MachineHome, QemuMachine
    from stillframe.machine.console import Console
    from stillframe.machine.machine import Machine
    from stillframe.machine.tracking import HashName
    from stillframe.monitor.host import Host
    from stillframe.monitor.server import MonitorServer

_BUNDLED = Path("bundled")
_READY = b"ready\n"
_READY_FD = "STILLFRAME_READY_FD"
_SWITCH_SECONDS = 0.0002
"""How long a thread that computes may keep another from the interpreter. The guest's own thread needs it for every trap, and
waited for up to Python's 5 ms while a job or a monitor computed."""
_WORDS = "stillframe.run.words"
_HOME = "stillframe.run.home"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Everything that was asked for, checked as far as words can be.

    :param entropy: whether there is a virtio-rng device.
    :param loadvm: the snapshot to begin with.
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
    algorithm: "HashName"
    paused: bool
    keep_after_shutdown: bool
    engine: str
    qemu: str
    agent: bool
    devices_as_given: tuple[str, ...]
    reconnect: int
    words: tuple[str, ...]
    entropy: bool = True
    loadvm: str | None = None


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


def serve(
    options: RunOptions,
    add_nodes: "Callable[[BlockGraph], None]",
    *,
    asked: Sequence[str] = (),
    found: "MachineHome | None" = None,
) -> int:
    """Put a machine together and serve it until it ends.

    :param add_nodes: opens the nodes that it begins with. :param asked: the words that the machine was asked for with.
    :param found: of a machine that is to be taken over.
    :return: the process's exit code.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    return asyncio.run(_serve(options, add_nodes, asked, found))


def _add_nodes(graph: "BlockGraph", texts: Sequence[str]) -> None:
    from stillframe.block.options import parse_options

    for text in texts:
        graph.blockdev_add(parse_options(text))


def start_detached(module: str, words: Sequence[str]) -> int:
    """Start the machine as a process of its own session; return once it listens and runs.

    :param module: the program, as Python's `-m` finds it.
    """
    ready_read, ready_write = os.pipe()
    with os.fdopen(ready_read, "rb") as ready:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[ready_write],
            env={**os.environ, _READY_FD: str(ready_write)},
            start_new_session=True,
        )
        os.close(ready_write)
        if ready.read() == _READY:
            # It is nobody's child any more that a `wait` would be for.
            child.returncode = 0
            return 0
    return child.wait()


def _tell_ready() -> None:
    """Let a waiting `--detach` go; from then on nobody reads what we print."""
    text = os.environ.pop(_READY_FD, None)
    if text is None:
        return
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 2)
    os.close(null)
    with os.fdopen(int(text), "wb") as ready:
        ready.write(_READY)


async def _serve(
    options: RunOptions,
    add_nodes: "Callable[[BlockGraph], None]",
    asked_words: Sequence[str],
    found: "MachineHome | None",
) -> int:
    from stillframe.block.graph import BlockGraph
    from stillframe.events import EventBus
    from stillframe.jobs import Jobs
    from stillframe.monitor.host import Host
    from stillframe.monitor.server import MonitorServer

    loop = asyncio.get_running_loop()
    ended = asyncio.Event()

    def end() -> None:
        loop.call_soon_threadsafe(ended.set)

    def asked() -> None:
        if ended.is_set():
            # Whoever asks twice does not want to wait for a job's end; images are whole after any death.
            click.echo("stillframe: ended at once, without waiting for jobs", err=True)
            os._exit(EXIT_FAILED)
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, asked)
    events, graph = EventBus(), BlockGraph()
    with contextlib.ExitStack() as stack:
        home = found
        if options.engine == "qemu" and home is None:
            from stillframe.cli.run_qemu import new_home

            # Before an image is opened, on which another QEMU may wait.
            home = stack.enter_context(contextlib.closing(new_home(options, asked_words)))
        stack.callback(graph.close)
        with _opening(found, graph):
            add_nodes(graph)
            _recover(graph)
        console = stack.enter_context(_console(options.console, end))
        machine = _built(options, graph, console, events, home)
        stack.callback(machine.close)
        host = Host(machine, graph, Jobs(events), events, options.algorithm)
        begun = asyncio.Event()
        server = MonitorServer(host, begun=begun)
        try:
            for place in options.monitors:
                await server.listen(
                    place.address, mode=place.mode, allow_local_users=options.allow_local_users
                )
            awaited = [server.wait_for_client(place.address) for place in options.monitors if place.waits]
            await _first_of(ended.wait(), asyncio.gather(*awaited))
            await asyncio.to_thread(_start, host, options, found)
            begun.set()
            _tell_ready()
            await _until_over(machine, server, ended)
        finally:
            await asyncio.to_thread(host.end, "host-signal")
            await server.close()
    if machine.failure is not None:
        click.echo(f"stillframe: {machine.failure}", err=True)
        return EXIT_FAILED
    return 0


def _start(host: "Host", options: RunOptions, found: "MachineHome | None") -> None:
    """Power on, or take over; with the snapshot that was asked for, if one was. :raise StillframeError: it cannot be loaded."""
    from stillframe.machine.build import QemuMachine

    if found is not None and isinstance(host.machine, QemuMachine):
        host.machine.adopt()
        return
    tag = options.loadvm
    if tag is None:
        host.machine.start(paused=options.paused)
        return
    host.machine.start(paused=True)
    host.jobs.run_internal(
        "loadvm", lambda context: host.snapshots.load_everything(context, tag), queue=host.snapshots.queue
    )
    if not options.paused:
        host.machine.cont()


def _opening(found: "MachineHome | None", graph: "BlockGraph") -> contextlib.AbstractContextManager[None]:
    if found is None:
        return contextlib.nullcontext()
    from stillframe.cli.run_qemu import opening_again

    return opening_again(found, graph)


def _built(
    options: RunOptions,
    graph: "BlockGraph",
    console: "Console",
    events: "EventBus",
    home: "MachineHome | None",
) -> "Machine | QemuMachine":
    """The machine, not yet started. :raise Refused: its words do not fit."""
    from stillframe.machine.build import build_machine, build_qemu_machine

    if home is not None:
        from stillframe.cli.run_qemu import qemu_config

        return build_qemu_machine(qemu_config(options, graph, console, home), events)
    return build_machine(_machine_config(options, graph, console), events)


def _recover(graph: "BlockGraph") -> None:
    """Before anything reads the nodes: what a crash left of operations over several of them is brought to an end.

    :raise StillframeError: a node is in the middle of a load that its images here do not suffice to resolve.
    """
    from stillframe.snapshots.recovery import recover_graph, refuse_withheld, snapshot_nodes

    found = recover_graph(graph)
    for each in found:
        click.echo(f"stillframe: {each}", err=True)
    refuse_withheld(snapshot_nodes(graph.nodes()), found)


async def _until_over(
    machine: "Machine | QemuMachine", server: "MonitorServer", ended: asyncio.Event
) -> None:
    """Wait for a signal, Ctrl-A x, a client's `quit`, or the guest's own end."""

    def watch() -> None:
        machine.wait()
        with contextlib.suppress(RuntimeError):
            # The loop is gone where something else has ended the machine first.
            loop.call_soon_threadsafe(guest_ended.set)

    loop, guest_ended = asyncio.get_running_loop(), asyncio.Event()
    threading.Thread(target=watch, name="machine-end", daemon=True).start()
    await _first_of(ended.wait(), guest_ended.wait(), server.wait_over())
    if guest_ended.is_set() and machine.shutdown is not None and machine.shutdown.reason == "host-qmp-quit":
        # The client that asked has its answer still to come.
        await server.wait_over()


async def _first_of(*waits: Awaitable[object]) -> None:
    """Wait for one of several things; the others are given up."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()


def _machine_config(options: RunOptions, graph: "BlockGraph", console: "Console") -> "MachineConfig":
    from stillframe.machine.build import DriveConfig, MachineConfig

    drives = []
    for number, device in enumerate(options.devices):
        node = graph.find(device.options["drive"])
        user = device.options.get("id", f"virtio-blk {number}")
        graph.use(node, user, writable=not node.read_only)
        drives.append(
            DriveConfig(
                node,
                device.options.get("id"),
                device.options.get("serial", ""),
                device.options.get("werror", "enospc"),
                device.options.get("rerror", "report"),
            )
        )
    banks = []
    for number, name in enumerate(options.flash):
        node = graph.find(name)
        graph.use(node, f"flash {number}", writable=not node.read_only)
        banks.append(node)
    return MachineConfig(
        name=options.name,
        board=options.board,
        memory_size=options.memory,
        kernel=options.kernel,
        initrd=options.initrd,
        append=options.append,
        bios=options.bios,
        drives=tuple(drives),
        flash=tuple(banks),
        entropy=options.entropy,
        console=console,
        icount_shift=options.icount,
        exit_on_shutdown=not options.keep_after_shutdown,
    )


@contextlib.contextmanager
def _console(options: ConsoleOptions, end: Callable[[], None]) -> "Iterator[Console]":
    from stillframe.machine.console import Console, LogConsole, SocketConsole

    if options.kind == "stdio":
        from stillframe.cli.terminal import TerminalConsole, raw_terminal

        with raw_terminal():
            console: Console = TerminalConsole(end)
            with contextlib.closing(console):
                yield console
        return
    path = options.path or Path()
    console = {
        "unix": lambda: SocketConsole(path),
        "log": lambda: LogConsole(path),
        "none": Console,
    }[options.kind]()
    with contextlib.closing(console):
        yield console
