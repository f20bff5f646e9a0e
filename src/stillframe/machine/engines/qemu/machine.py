"""A machine whose guest runs in a QEMU process, behind the same monitor and console as any other.

    we              nodes, exports of them, snapshots, jobs, monitor, the console's outer end
    QEMU            processors, memory, devices; its disks are our exports

What a client does to the guest is passed on. What we do ourselves (the stops of a save, migrations) is not told to clients, and
the QEMU that is the machine changes with a load: only `become` does that.

Threads: any may call. `_control` is held through a pause of ours, so a client's `stop` and `cont` come before it or after it.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from stillframe.block.node import Node
from stillframe.errors import (
    Failed,
    NotFound,
    PeerError,
    Refused,
    StillframeError,
    io_failed,
)
from stillframe.events import Event, EventBus
from stillframe.machine.control import Quiesce, Successor
from stillframe.machine.engines.qemu import passing
from stillframe.machine.engines.qemu.adopt import active_table, end_migration
from stillframe.machine.engines.qemu.beside import beside, does_not_start
from stillframe.machine.engines.qemu.capture import Capture, Capturing, Instant, MigrationStatus, Pause
from stillframe.machine.engines.qemu.command_line import QemuConfig, command_line
from stillframe.machine.engines.qemu.console import SerialRelay
from stillframe.machine.engines.qemu.disks import DiskExports, disks_of
from stillframe.machine.engines.qemu.display import Addresses, addresses, move
from stillframe.machine.engines.qemu.home import LoadNote, ProcessNote, open_process
from stillframe.machine.engines.qemu.last_known import LastKnown
from stillframe.machine.engines.qemu.monitor import STOPPED_BY_US, asked, let_run
from stillframe.machine.engines.qemu.outside import refuse_outside_state
from stillframe.machine.engines.qemu.process import QemuProcess, socket_words
from stillframe.machine.engines.qemu.quiescing import Quiescing
from stillframe.machine.engines.qemu.running import Running, Started, started_at
from stillframe.machine.engines.qemu.successor import QemuSuccessor
from stillframe.machine.engines.qemu.unlike import refuse_unlike
from stillframe.machine.machine import Disk, Shutdown
from stillframe.machine.run_state import RunState
from stillframe.sockets import connected_unix_socket
from stillframe.vmstate.relayed import RelayedHead

_log = logging.getLogger(__name__)

_QUIT_SECONDS: Final = 10.0
_STATUS_SECONDS: Final = 1.0
_HIDDEN_EVENTS: Final = frozenset({"MIGRATION", "MIGRATION_PASS"})
_NOBODY_ASKED: Final = frozenset({"host-signal", "host-error"})


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """What a QEMU had that was ended before there was another. :param ran: its guest did. :param display: where its display was."""

    ran: bool
    display: Addresses


class QemuMachine:
    """See the module's text.

    :param config: what was asked for. :param events: where QEMU's events go, and ours.
    """

    def __init__(self, config: QemuConfig, events: EventBus) -> None:
        self.name = config.name
        self.events = events
        self.memory_size = config.memory_size
        self._config = config
        self._home = config.home
        self._home.mark_nodes(config.nodes)
        self._exports = DiskExports(self._home.path / "disks", config.nodes)
        self._serial = SerialRelay(config.console) if config.console is not None else None
        self._control = threading.RLock()
        self._last_known = LastKnown()
        self._quiescing = Quiescing(self._agent_port, self.runs, has_port=config.agent)
        self._number = 0
        self._memory_lost: str | None = None
        self._left_behind: LeftBehind | None = None
        self._told: Shutdown | None = None
        self._shutdown: Shutdown | None = None
        self._begun = threading.Event()
        self._ending = threading.Lock()
        self._ended = threading.Event()
        self._process: QemuProcess | None = None
        self._former: QemuProcess | None = None
        self._status = MigrationStatus()
        self.failure: str | None = None
        """Why QEMU ended, where nobody asked it to."""

    # What it is

    @property
    def other_monitor(self) -> "QemuMachine":
        """QEMU's: itself."""
        return self

    @property
    def _qemu(self) -> QemuProcess:
        """Waits for its start, which ends within `process.START_SECONDS`."""
        self._begun.wait()
        if self._process is None:
            raise Refused("QEMU could not be started")
        return self._process

    @property
    def disks(self) -> tuple[Disk, ...]:
        """The guest's devices with a node of ours behind them, as QEMU names them; flash first."""
        return disks_of(self._config)

    @property
    def run_state(self) -> RunState:
        """What it is doing now; what is last known where QEMU does not answer soon, or owes an answer anyway."""
        if self._memory_lost is not None:
            return RunState.IO_ERROR if self._left_behind is None else RunState.INTERNAL_ERROR
        process = self._process
        if process is not None and not self._last_known.in_pause and not process.monitor.owes_an_answer:
            with contextlib.suppress(PeerError):
                self._last_known.ask(process.monitor, _STATUS_SECONDS)
        return self._last_known.state

    @property
    def shutdown(self) -> Shutdown | None:
        """Why it ended, once it has."""
        return self._shutdown

    # From start to end

    def start(self, *, paused: bool = False) -> None:
        """Start QEMU. :raise Refused: it does not take its command line, in its words."""
        try:
            self._home.note(runs=not paused)
            running, number = self._spawn(incoming=False)
            self._home.note(process=ProcessNote(number, running.pid, started_at(running.pid)))
            try:
                self._process = self._connected(running, number, self._status)
            except BaseException:
                running.kill()
                raise
        finally:
            self._begun.set()
        self._attach_serial(self._process)
        if not paused:
            self.cont()
        self._home.forget_intent()

    def adopt(self) -> None:
        """Instead of `start`: the QEMU of the record, which `adopt.take_over` has left as the machine, is ours.

        :raise Refused: it has ended meanwhile, or its guest cannot go on. :raise PeerError: it does not answer. It is ended then.
        """
        record = self._home.record
        note = record.process if record is not None else None
        try:
            running = open_process(note) if note is not None else None
            if record is None or note is None or running is None:
                raise Refused("The machine's QEMU has ended")
            self._number = note.directory
            try:
                process = self._connected(running, note.directory, self._status)
                end_migration(process.monitor)
                # Where a stream was to come that nobody waits for any more.
                (process.directory / "migration").unlink(missing_ok=True)
            except BaseException as error:
                running.kill()
                if isinstance(error, StillframeError):
                    error.left = "Its QEMU was ended, as if its plug was pulled; its images are whole"
                raise
            self._process = process
        finally:
            self._begun.set()
        self._attach_serial(process)
        runs = self.runs()
        if record.runs and not runs and process.monitor.execute("query-status")["status"] in STOPPED_BY_US:
            process.monitor.execute("cont")
        self._home.forget_intent()

    def _spawn(self, *, incoming: bool) -> tuple[Running, int]:
        """A process, and the number of its directory. Without a record nobody would find it when we are gone: it ends with us."""
        self._number += 1
        directory = self._home.path / str(self._number)
        try:
            directory.mkdir(mode=0o700)
        except OSError as error:
            raise io_failed("Could not make a directory for QEMU", error) from error
        words = command_line(self._config, self._exports.path, successor_in=directory if incoming else None)
        words += socket_words(directory, serial=self._serial is not None, agent=self._config.agent)
        running = Started(words, directory / "errors", ends_with_us=self._home.record is None)
        return running, self._number

    def _connected(self, running: Running, number: int, status: MigrationStatus) -> QemuProcess:
        process: QemuProcess | None = None

        def hear(event: Event) -> None:
            if event.name in _HIDDEN_EVENTS:
                status.hear(event)
            if process is self._process or process is None:
                self._hear(event)

        def ended() -> None:
            status.end()
            if process is not None and process is self._process and self._left_behind is None:
                self._has_ended(process)

        process = QemuProcess(running, self._home.path / str(number), hear, ended)
        return process

    def _attach_serial(self, process: QemuProcess) -> None:
        if self._serial is not None:
            self._serial.attach(connected_unix_socket(process.directory / "serial"))

    def _hear(self, event: Event) -> None:
        if not self._last_known.hear(event) or event.name in _HIDDEN_EVENTS:
            return
        if event.name == "SHUTDOWN":
            if self._shutdown is not None:
                return
            # It may stay all the same: -no-shutdown.
            self._told = Shutdown(bool(event.data.get("guest")), str(event.data.get("reason")))
        self.events.pass_on(event)

    def _has_ended(self, process: QemuProcess) -> None:
        """On the thread that read its monitor, or that made it the machine."""
        process.wait(_QUIT_SECONDS)
        with self._ending:
            self._say_why_it_ended(process)
        self._ended.set()

    def _say_why_it_ended(self, process: QemuProcess) -> None:
        if self._shutdown is None:
            self._shutdown = self._told or Shutdown(guest=False, reason="host-error")
            state = RunState.SHUTDOWN
            if self._told is None or self._told.reason in _NOBODY_ASKED or process.exit_status:
                self.failure = (
                    f"QEMU ended with {process.exit_text}: {process.last_words or 'it said nothing'}"
                )
                state = RunState.INTERNAL_ERROR
            self._last_known.end(state)
            if self._told is None:
                self.events.emit("SHUTDOWN", guest=False, reason="host-error")

    def quit(self, reason: str = "host-qmp-quit") -> None:
        """End the machine; returns at once. A job under way sees QEMU's end."""
        if self._shutdown is None:
            self._shutdown = Shutdown(guest=False, reason=reason)
            self.events.emit("SHUTDOWN", guest=False, reason=reason)
        threading.Thread(target=self._quit, name="qemu-quit", daemon=True).start()
        self._ended.set()

    def _quit(self) -> None:
        if self._process is not None:
            with contextlib.suppress(PeerError):
                self._process.monitor.execute("quit", seconds=_QUIT_SECONDS)

    def wait(self, timeout: float | None = None) -> Shutdown | None:
        """Sleep until the machine has ended, or for `timeout` seconds; why it ended, None if it has not."""
        self._ended.wait(timeout)
        return self._shutdown

    def close(self) -> None:
        """End QEMU if it runs, and take everything away; nodes are not closed."""
        with self._control:
            if self._process is not None:
                if not self._process.monitor.ended:
                    self._quit()
                self._process.wait(_QUIT_SECONDS)
                self._process.kill()
            if self._serial is not None:
                self._serial.close()
            self._exports.close()
            self._home.close()

    # What clients do to the guest

    def stop(self) -> None:
        """Pause the guest; a pause of ours is waited for."""
        with self._control:
            self._last_known.stop_asked = True
            self._ask("stop")
            self._last_known.stopped()
            self._home.forget_intent()

    def cont(self) -> None:
        """Let the guest run. :raise Refused: not all of its memory has come; or QEMU refuses."""
        self.refuse_without_memory()
        with self._control:
            try:
                let_run(self._qemu.monitor, _QUIT_SECONDS)
            except PeerError as error:
                raise asked(error) from error
            self._last_known.stop_asked = False
        self._quiescing.wake_if_due()

    def reset(self) -> None:
        """Press the reset button."""
        with self._control:
            self._ask("system_reset")

    def powerdown(self) -> None:
        """Press the power button."""
        self._ask("system_powerdown")

    def _ask(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        if self._left_behind is not None:
            self.refuse_without_memory()
        try:
            return self._qemu.monitor.execute(command, arguments)
        except PeerError as error:
            raise asked(error) from error

    def execute(self, command: str, arguments: Mapping[str, Any]) -> Any:
        """A client's command that is not ours. :raise Refused: QEMU says no, or it would take the state out of our hands."""
        passing.refuse(command, arguments, self._is_new)
        return self._ask(command, arguments)

    def execute_typed(self, command: str, words: Sequence[str], line: str) -> str:
        """See `control.OtherMonitor`."""
        passing.refuse_typed(command, words, self._is_new)
        return str(self._ask("human-monitor-command", {"command-line": line}))

    def _is_new(self, name: str) -> bool:
        """Whether a node is ours, and none of QEMU's."""
        return self._config.is_node(name) and all(node.node_name != name for node in self._config.nodes)

    def commands(self) -> Sequence[str]:
        """The names of QEMU's commands that `execute` takes."""
        return [each["name"] for each in self._ask("query-commands") if passing.is_passed(each["name"])]

    # What we do to it

    def at_instant(self, fn: Callable[[], None]) -> int:
        """See `control.MachineControl`."""
        with self.paused(), self._exports.held():
            fn()
        return 0

    @contextmanager
    def paused(self, stop: Callable[[], None] | None = None) -> Iterator[Pause]:
        """Nobody else changes the run state, and clients hear nothing of ours; at the end the guest runs if it ran before.

        :param stop: stops it in another way than by the command.
        """
        with self._control, self._last_known.pause():
            try:
                gone = self._left_behind
                pause = Pause(ran=self.runs() if gone is None else gone.ran)
                if pause.ran:
                    self._home.note(runs=True)
                try:
                    if stop is not None:
                        stop()
                    elif pause.ran and gone is None:
                        self._qemu.monitor.execute("stop")
                        # One that had stopped by itself in that moment is not to go on.
                        pause.ran = self._last_known.ask(self._qemu.monitor, _QUIT_SECONDS) is RunState.PAUSED
                    yield pause
                finally:
                    if pause.ran and not self._qemu.monitor.ended and self._memory_lost is None:
                        pause.wait_for_itself(self.runs)
                        if not self.runs():
                            let_run(self._qemu.monitor, _QUIT_SECONDS)
            finally:
                self._home.forget_intent()

    def runs(self) -> bool:
        """Whether QEMU says so."""
        return self._last_known.ask(self._qemu.monitor, _QUIT_SECONDS) is RunState.RUNNING

    def stop_asked(self) -> bool:
        """See `capture.Guest`."""
        return self._last_known.stop_asked

    @contextmanager
    def stopping_itself(self) -> Iterator[None]:
        """See `capture.Guest`."""
        self._last_known.stops_itself = True
        try:
            yield
        finally:
            self._last_known.stops_itself = False

    @contextmanager
    def standing_still(self, decides: Node, *, gone: str | None = None) -> Iterator[None]:
        """See `control.StreamedMachine`. Clients hear of it, as of a load of QEMU's."""
        ran = False
        try:
            with self.paused() as pause:
                ran = pause.ran
                self._home.note(load=LoadNote(decides.node_name, active_table(decides)))
                if ran and self._left_behind is None:
                    self.events.emit("STOP")
                if gone is not None:
                    self._leave(gone, ran=ran)
                yield
        finally:
            if ran and self._left_behind is None:
                self.events.emit("RESUME")
                self._quiescing.wake_if_due()

    def _leave(self, why: str, *, ran: bool) -> None:
        """End QEMU before there is another. :param ran: whether its guest did."""
        process = self._qemu
        self._memory_lost = why
        if self._left_behind is None:
            # Set first: an end that we bring about is not the machine's.
            self._left_behind = LeftBehind(ran, addresses(process.monitor))
        process.kill()

    @contextmanager
    def captured(
        self,
        at_instant: Callable[[], None],
        refuse_if_cancelled: Callable[[], None] = lambda: None,
        quiesce: Quiesce | None = None,
        others_at_rest: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> Iterator[Capture]:
        """See `control.StreamedMachine`."""

        def with_disks_at_rest() -> None:
            with self._exports.held():
                at_instant()

        process = self._qemu
        if self.runs():
            # Memory that is sent before the pause has QEMU stop the guest by itself.
            self._home.note(runs=True)
        words = self._config.words
        capturing = Capturing(process.monitor, process.pid, process.directory, self._status, self, words)
        quiesced = partial(self._quiescing.quiesced, quiesce)
        instant = Instant(with_disks_at_rest, others_at_rest)
        with ExitStack() as stack:
            try:
                capture = stack.enter_context(capturing.captured(instant, refuse_if_cancelled, quiesced))
            except BaseException:
                self._home.forget_intent()
                raise
            yield capture

    def _agent_port(self) -> Path | None:
        process = self._qemu
        return None if process.monitor.ended else process.directory / "agent"

    def refuse_unlike(self, head: RelayedHead) -> None:
        """See `control.StreamedMachine`."""
        if self._left_behind is None:
            refuse_unlike(self._qemu.monitor, head)

    def refuse_outside_state(self) -> None:
        """See `control.StreamedMachine`."""
        refuse_outside_state(self._qemu.monitor)

    @contextmanager
    def successor(self) -> Iterator[QemuSuccessor]:
        """See `control.StreamedMachine`."""
        former = self._qemu if self._left_behind is None else None
        status = MigrationStatus()
        process = None
        with beside(former, lambda: former is self._process):
            try:
                process = self._begin_successor(status)
                with contextlib.closing(QemuSuccessor(process, status)) as found:
                    yield found
            finally:
                gone = self._former if process is self._process else process
                self._former = None
                if gone is not None:
                    gone.kill()
                    gone.remove_files()
                if process is not self._process:
                    self._home.try_to_note(successor=None, load=None)
                elif self._memory_lost is None:
                    self._home.try_to_note(filling=False)

    def _begin_successor(self, status: MigrationStatus) -> QemuProcess:
        """:raise Refused: it does not start, in its words."""
        running, number = self._spawn(incoming=True)
        try:
            note = ProcessNote(number, running.pid, started_at(running.pid))
            if self._left_behind is None:
                self._home.note(successor=note, load=None)
            else:
                # What its commit will be is noted already.
                self._home.note(successor=note)
            return self._connected(running, number, status)
        except BaseException as error:
            running.kill()
            if isinstance(error, Refused) and not isinstance(error, NotFound) and self._left_behind is None:
                raise does_not_start(error) from error
            raise

    def become(self, successor: Successor) -> None:
        """See `control.StreamedMachine`."""
        if not isinstance(successor, QemuSuccessor):
            raise TypeError("the successor of a QEMU is a QEMU")
        process = successor.process
        if process.monitor.ended:
            raise Failed(f"The QEMU that was to go on ended with {process.exit_text}: {process.last_words}")
        # Nothing may fail from here on: the images would go back.
        former, self._process, self._status = self._qemu, process, successor.status
        self._memory_lost = None
        self._last_known.another()
        self._quiescing.loaded()
        with contextlib.suppress(PeerError):
            # It may stand still in the run state of the snapshot.
            self._last_known.ask(process.monitor, _STATUS_SECONDS)
        with contextlib.suppress(PeerError):
            self._attach_serial(process)
        display = addresses(former.monitor) if self._left_behind is None else self._left_behind.display
        self._left_behind = None
        # It is waited for when the guest runs; but its display's address is free only then.
        self._former = former
        if display:
            former.kill()
        else:
            former.end()
        if self._home.record is not None:
            now = self._home.record.successor
            self._home.try_to_note(process=now, successor=None, load=None, filling=successor.is_filling)
        move(process.monitor, display)
        if process.monitor.ended:
            self._has_ended(process)

    def lose_memory(self, why: str) -> None:
        """See `control.StreamedMachine`. Its processors wait for pages that will not come; QEMU is not asked to stop them."""
        self._memory_lost = why
        self.events.emit("STOP")

    def refuse_without_memory(self) -> None:
        """See `control.StreamedMachine`."""
        if self._memory_lost is not None:
            raise Refused(self._memory_lost, remedy="Load a snapshot.")
