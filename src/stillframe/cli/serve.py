"""A machine served from its options until it ends: nodes, machine, jobs and monitors put together."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import click

from stillframe.cli.main import EXIT_FAILED
from stillframe.cli.run_options import ConsoleOptions, RunOptions
from stillframe.monitor.addresses import Address, listening_filename

if TYPE_CHECKING:
    from stillframe.block.graph import BlockGraph
    from stillframe.events import EventBus
    from stillframe.machine.build import MachineConfig, MachineHome, QemuMachine
    from stillframe.machine.console import Console
    from stillframe.machine.machine import Machine
    from stillframe.monitor.host import CharacterDevice, Host
    from stillframe.monitor.server import MonitorServer

_READY = b"ready\n"
_READY_FD = "STILLFRAME_READY_FD"
_RESTARTS, _RESTART_SECONDS = 3, 60.0
"""How often a machine may be started anew, and in what time: one that dies at once, each time, is not."""
_SWITCH_SECONDS = 0.0002
"""How long a thread that computes may keep another from the interpreter. The guest's own thread needs it for every trap, and
waited for up to Python's 5 ms while a job or a monitor computed."""


def serve(
    options: RunOptions,
    add_nodes: "Callable[[BlockGraph], None]",
    *,
    asked: Sequence[str] = (),
    found: "MachineHome | None" = None,
    command_line: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> int:
    """Put a machine together and serve it until it ends; with `options.restart` once more where it ended by itself.

    :param add_nodes: opens the nodes that it begins with. :param asked: the words that the machine was asked for with.
    :param found: of a machine that is to be taken over. :param command_line: as of `Host`.
    :return: the process's exit code.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    if found is not None and found.record is not None:
        asked = found.record.words
    begun: list[float] = []
    while True:
        failure = asyncio.run(_serve(options, add_nodes, asked, found, command_line))
        if failure is None:
            return 0
        click.echo(f"stillframe: {failure}", err=True)
        now = time.monotonic()
        begun = [each for each in begun if now - each < _RESTART_SECONDS]
        if not options.restart or len(begun) >= _RESTARTS:
            return EXIT_FAILED
        begun.append(now)
        click.echo("stillframe: the machine is started anew", err=True)
        found = None


def start_detached(module: str, words: Sequence[str], descriptors: Sequence[int] = ()) -> int:
    """Start the machine as a process of its own session; return once it listens and runs.

    :param module: the program, as Python's `-m` finds it. :param descriptors: that it goes on with.
    """
    ready_read, ready_write = os.pipe()
    with os.fdopen(ready_read, "rb") as ready:
        child = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[ready_write, *descriptors],
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
    command_line: Mapping[str, Mapping[str, str]],
) -> str | None:
    """:return: why the machine has ended, where nobody asked it to."""
    from stillframe.block.graph import BlockGraph
    from stillframe.events import EventBus
    from stillframe.jobs import Jobs
    from stillframe.monitor.host import Host
    from stillframe.monitor.server import MonitorServer
    from stillframe.snapshots.keeping import KeepingOptions

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
        host = Host(
            machine,
            graph,
            Jobs(events),
            events,
            KeepingOptions(options.algorithm, options.stale_percent / 100),
            own_uuid=options.uuid,
            command_line=command_line,
            peripherals=_peripherals(options),
        )
        begun = asyncio.Event()
        server = MonitorServer(host, begun=begun)
        try:
            listening = [
                await server.listen(
                    place.address, mode=place.mode, allow_local_users=options.allow_local_users
                )
                for place in options.monitors
            ]
            host.chardevs = _character_devices(options, console, listening)
            awaited = [server.wait_for_client(place.address) for place in options.monitors if place.waits]
            await _first_of(ended.wait(), asyncio.gather(*awaited))
            await asyncio.to_thread(_start, host, options, found)
            begun.set()
            _tell_ready()
            await _until_over(machine, server, ended)
        finally:
            await asyncio.to_thread(host.end, "host-signal")
            await server.close()
    return machine.failure


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


def _peripherals(options: RunOptions) -> dict[str, str]:
    disks = [device.options["id"] for device in options.devices if "id" in device.options]
    found = dict.fromkeys(disks, "virtio-blk-device")
    return found if options.entropy_id is None else {**found, options.entropy_id: "virtio-rng-device"}


def _character_devices(
    options: RunOptions, console: "Console", listening: Sequence[Address]
) -> "tuple[CharacterDevice, ...]":
    """:param listening: where the monitors are, in their order."""
    from stillframe.monitor.host import CharacterDevice

    found = []
    if options.console.kind != "none" or options.console.label:
        found.append(CharacterDevice(options.console.label or "serial0", lambda: console.filename))
    for number, (place, address) in enumerate(zip(options.monitors, listening, strict=True)):
        label = place.label or f"compat_monitor{number}"
        # Asked now: a descriptor is another's once the monitor is closed.
        found.append(CharacterDevice(label, partial(str, listening_filename(address))))
    return tuple(found)


@contextlib.contextmanager
def _console(options: ConsoleOptions, end: Callable[[], None]) -> "Iterator[Console]":
    from stillframe.machine.console import Console, LogConsole, PtyConsole, SocketConsole

    if options.kind == "stdio":
        from stillframe.cli.terminal import TerminalConsole, raw_terminal

        with raw_terminal():
            console: Console = TerminalConsole(end)
            with contextlib.closing(console):
                yield console
        return
    where = options.fd if options.fd is not None else options.path or Path()
    console = {
        "unix": lambda: SocketConsole(where),
        "log": lambda: LogConsole(where),
        "pty": PtyConsole,
        "none": Console,
    }[options.kind]()
    with contextlib.closing(console):
        if options.kind == "pty":
            terminal = console.filename.removeprefix("pty:")
            click.echo(f"char device redirected to {terminal} (label {options.label})")
        yield console
