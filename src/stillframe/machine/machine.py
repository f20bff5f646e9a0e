"""A machine: its parts, what it is doing, and who may touch it when.

One thread at a time owns a machine: its vCPU's thread while the guest runs, else whoever asked for an instruction boundary. The
vCPU's thread gives up the ownership between two slices of instructions as soon as anybody else wants it, and gets at least one
slice between two others.

    stop, cont, reset   own the machine, change the run state, give it back
    at_boundary(fn)     owns it for the time of fn; the guest notices nothing but the time
    hold(state)         owns it for as long as the `with` block lasts; nothing of the guest is in flight

`stop`, `cont` and `quit` from another thread during a hold do not wait: they decide what the hold's end makes of the guest.
Everything else waits for the hold's end.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from stillframe.errors import Refused, StillframeError
from stillframe.events import EventBus
from stillframe.machine.clock import VirtualClock
from stillframe.machine.devices import Device
from stillframe.machine.engines import Engine, Exit
from stillframe.machine.mailbox import Mailbox
from stillframe.machine.memory import GuestMemory
from stillframe.machine.run_state import RunState

_log = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Disk:
    """A device of the guest that a block node stands behind.

    :param device_id: as given, or QEMU's path of the device. :param node_name: the node that it uses.
    :param firmware: a flash device: its content is machine state. :param writable: the guest may change it.
    :param io_status: "ok", or why the guest was stopped: "nospace" or "failed".
    """

    device_id: str
    node_name: str
    firmware: bool
    writable: bool
    io_status: Callable[[], str] = lambda: "ok"


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Why a machine ended, as the SHUTDOWN event tells it."""

    guest: bool
    reason: str


class Board:
    """What a board adds to its processor; `boards/` builds them.

    :param name: as in the stream's configuration section and `--board`.
    :param devices: in the order of their sections.
    :param power_on: put the processor, RAM and devices into the state of power-on.
    """

    def __init__(
        self,
        name: str,
        *,
        devices: Sequence[Device] = (),
        disks: Sequence[Disk] = (),
        power_on: Callable[[], None] = lambda: None,
    ) -> None:
        self.name = name
        self.devices = tuple(devices)
        self.disks = tuple(disks)
        self.power_on = power_on


class Machine:
    """See the module's text for the rules of ownership.

    :param name: as given by the user; None without one.
    :param exit_on_shutdown: a guest that powers itself off ends the machine, as QEMU without `-no-shutdown`.
    """

    def __init__(
        self,
        *,
        name: str | None,
        board: Board,
        engine: Engine,
        memory: GuestMemory,
        clock: VirtualClock,
        mailbox: Mailbox,
        events: EventBus,
        exit_on_shutdown: bool = True,
    ) -> None:
        self.name = name
        self.board = board
        self.engine = engine
        self.memory = memory
        self.clock = clock
        self.events = events
        self.mailbox = mailbox
        self._exit_on_shutdown = exit_on_shutdown
        self._turn = threading.Condition()
        self._owner: int | None = None
        self._depth = 0
        self._waiting = 0
        self._give_way = self._guests_turn = False
        self._run_state = RunState.PRELAUNCH
        self._after_hold: RunState | None = None
        self._requested: deque[Callable[[], None]] = deque()
        self._shutdown: Shutdown | None = None
        self._memory_lost: str | None = None
        self._ended = threading.Event()
        self._closing = False
        self._thread: threading.Thread | None = None
        mailbox.ring = engine.kick

    # What it is

    @property
    def processor_threads(self) -> tuple[int, ...]:
        """The host's numbers of the threads that run a processor each; none before the start."""
        return () if self._thread is None or self._thread.native_id is None else (self._thread.native_id,)

    @property
    def other_monitor(self) -> None:
        """Nobody else runs its guest."""
        return None

    @property
    def devices(self) -> tuple[Device, ...]:
        """Everything with a section of its own, in the order of saving and loading."""
        return (self.clock, *self.engine.devices, *self.board.devices)

    @property
    def disks(self) -> tuple[Disk, ...]:
        """The guest's devices with a block node, in the order in which they were given; flash first."""
        return self.board.disks

    @property
    def run_state(self) -> RunState:
        """What it is doing now."""
        return self._run_state

    @property
    def shutdown(self) -> Shutdown | None:
        """Why it ended, once it has."""
        return self._shutdown

    def new_generation_id(self) -> None:
        """Tell the guest that it is not the only one with its past: after a load."""
        for device in self.devices:
            renew = getattr(device, "new_generation_id", None)
            if renew is not None:
                self.at_boundary(renew)

    @property
    def failure(self) -> None:
        """It never ends without having been asked to, by its guest at least."""

    # Ownership

    @contextmanager
    def _owned(self) -> Iterator[None]:
        self._acquire(None)
        try:
            yield
        finally:
            self._release()

    def _acquire(self, defer: Callable[[], None] | None) -> bool:
        """Become the owner; or, with `defer`, call that instead if another thread holds the machine, and return False.

        What ends the wait: the vCPU reaches the end of its slice, or the owner gives the machine back.
        """
        me = threading.get_ident()
        with self._turn:
            if self._owner == me:
                self._depth += 1
                return True
            self._waiting += 1
            self._give_way = True
            self.engine.kick()
            self.mailbox.wake()
            try:
                while self._owner is not None or self._guests_turn:
                    if self._after_hold is not None and defer is not None:
                        defer()
                        return False
                    self._turn.wait()
                self._owner, self._depth = me, 1
                return True
            finally:
                self._waiting -= 1
                self._turn.notify_all()

    def _release(self) -> None:
        with self._turn:
            self._depth -= 1
            if self._depth == 0:
                self._owner = None
                on_vcpu = threading.current_thread() is self._thread
                self._guests_turn = not on_vcpu and self._run_state is RunState.RUNNING and self._can_run
                self._turn.notify_all()

    @property
    def _can_run(self) -> bool:
        """There is a vCPU's thread, and it will take its turn."""
        return self._thread is not None and not self._closing

    def at_boundary(self, fn: Callable[[], Result]) -> Result:
        """Run `fn` while the vCPU stands between two instructions, and return what it returns.

        Waits for the end of a slice (milliseconds), or of a hold by another thread.
        """
        with self._owned():
            return fn()

    def at_instant(self, fn: Callable[[], None]) -> int:
        """`at_boundary`, with none of the guest's requests in flight. :return: the virtual clock, nanoseconds."""
        with self._owned():
            for device in self.devices:
                device.drain()
            fn()
            return self.clock.ns

    # Run states

    def start(self, *, paused: bool = False) -> None:
        """Power on. The guest runs at once, or waits in `prelaunch` for `cont`."""
        with self._owned():
            self.board.power_on()
            if self.engine.has_processor and self._thread is None:
                self._thread = threading.Thread(
                    target=self._vcpu, name=f"vcpu-{self.name or ''}", daemon=True
                )
                self._thread.start()
            if not paused:
                self._go()

    def stop(self) -> None:
        """Pause the guest; a guest that does not run stays as it is. On return none of its requests is in flight."""

        def defer() -> None:
            if self._after_hold is RunState.RUNNING:
                self._after_hold = RunState.PAUSED

        if self._acquire(defer):
            try:
                if self._after_hold is not None:
                    defer()
                else:
                    self._halt(RunState.PAUSED)
            finally:
                self._release()

    def cont(self) -> None:
        """Let the guest run; does nothing if it does.

        :raise Refused: after a shutdown or an internal error, until a reset.
        """

        self.refuse_without_memory()

        def defer() -> None:
            self._refuse_without_reset(self._after_hold)
            self._after_hold = RunState.RUNNING

        if self._acquire(defer):
            try:
                if self._after_hold is not None:
                    defer()
                else:
                    self._refuse_without_reset(self._run_state)
                    self._go()
            finally:
                self._release()

    @staticmethod
    def _refuse_without_reset(state: RunState | None) -> None:
        if state is not None and state.needs_reset:
            raise Refused("Resetting the Virtual Machine is required", remedy="Use system_reset, then cont.")

    def lose_memory(self, why: str) -> None:
        """Not all of the memory is what it should be: the guest stops at the next boundary, with `io-error`, and goes on only
        after a load or a reset. Waits for nothing but a hold, where there is no processor.
        """
        self._memory_lost = why
        self.request_stop(RunState.IO_ERROR)
        self.engine.kick()
        self.mailbox.wake()
        if not self.engine.has_processor:
            # Nobody else comes to a boundary.
            self.at_boundary(self._do_requested)

    def refuse_without_memory(self) -> None:
        """:raise Refused: `lose_memory` was called, and neither a reset nor a load has ended since."""
        if self._memory_lost is not None:
            raise Refused(self._memory_lost, remedy="Load a snapshot, or reset the machine.")

    def memory_is_whole(self, still: Callable[[], bool] = lambda: True) -> None:
        """Held, by a load: all memory is defined again.

        :param still: of memory that is to come: whether it still can. Devices ask before they act on what they have read.
        """
        self._memory_lost = None
        self.memory.is_whole = still

    def reset(self) -> None:
        """Press the reset button: power-on state, the run state stays. A hold is waited for."""
        with self._owned():
            self._reset(guest=False, reason="host-qmp-system-reset")

    def powerdown(self) -> None:
        """Press the power button. The board has none that a guest listens to, so only the event tells of it."""
        self.events.emit("POWERDOWN")

    def quit(self, reason: str = "host-qmp-quit") -> None:
        """End the machine: the guest stops where it is. Returns at once; `wait` and `close` see it through."""
        self._end(Shutdown(guest=False, reason=reason))

        def defer() -> None:
            self._after_hold = RunState.SHUTDOWN

        with self._turn:
            if self._after_hold is not None:
                defer()
        self.engine.kick()
        self.mailbox.wake()

    def wait(self, timeout: float | None = None) -> Shutdown | None:
        """Sleep until the machine has ended, or for `timeout` seconds; why it ended, None if it has not."""
        self._ended.wait(timeout)
        return self._shutdown

    def close(self) -> None:
        """Give everything back: threads, sockets, memory. Waits for the end of a hold; nodes are not closed."""
        with self._owned():
            if self._run_state is RunState.RUNNING:
                self._halt(RunState.SHUTDOWN, announce=False)
            self._closing = True
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        for device in self.devices:
            device.close()
        self.engine.close()

    @contextmanager
    def hold(self, state: RunState) -> Iterator[None]:
        """The machine for the caller alone, at a boundary, with nothing in flight.

        A guest that runs is stopped, with STOP and the run state `state`; at the end of the block, exceptions included, it
        goes on, with RESUME, unless `stop`, `quit` or an I/O error decided otherwise meanwhile.
        """
        with self._owned():
            if self._after_hold is not None:
                yield
                return
            self._after_hold = self._run_state
            try:
                if self._run_state is RunState.RUNNING:
                    self._halt(state)
                yield
            finally:
                with self._turn:
                    then, self._after_hold = self._after_hold, None
                if then is RunState.RUNNING:
                    self._go()
                else:
                    self._run_state = then

    def set_run_state(self, state: RunState) -> None:
        """Inside a hold: what its end makes of the guest, as a load that brings back a paused machine wants."""
        with self._turn:
            if self._after_hold is None:
                raise RuntimeError("set_run_state outside of a hold")
            self._after_hold = state

    def _go(self) -> None:
        """Owned: the guest runs from here on."""
        if self._run_state is RunState.RUNNING or self._shutdown is not None:
            return
        for device in self.devices:
            device.resumed()
        self.clock.start()
        with self._turn:
            self._run_state = RunState.RUNNING
            self._turn.notify_all()
        self.events.emit("RESUME")

    def _halt(self, state: RunState, *, announce: bool = True) -> None:
        """Owned: the guest stands still from here on, its requests finished or parked."""
        if self._run_state is not RunState.RUNNING:
            return
        self.clock.stop()
        self._run_state = state
        for device in self.devices:
            device.drain()
        if announce:
            self.events.emit("STOP")

    def _reset(self, *, guest: bool, reason: str) -> None:
        for device in self.devices:
            device.drain()
        self.mailbox.run()
        for device in self.devices:
            device.reset()
        self.board.power_on()
        self.memory_is_whole()
        if self._run_state.needs_reset:
            self._run_state = RunState.PRELAUNCH
        self.events.emit("RESET", guest=guest, reason=reason)

    def _end(self, why: Shutdown) -> None:
        with self._turn:
            if self._shutdown is not None:
                return
            self._shutdown = why
        self.events.emit("SHUTDOWN", guest=why.guest, reason=why.reason)
        self._ended.set()

    # Requests of the guest and its devices, made inside an access or at a boundary

    def request(self, action: Callable[[], None]) -> None:
        """Have `action` done by the vCPU's thread at the next boundary, before any further instruction."""
        self._requested.append(action)
        self.engine.leave()

    def request_stop(self, state: RunState) -> None:
        """A device cannot go on: stop the guest in `state`. While it is being stopped anyway, that is what it ends in."""
        with self._turn:
            if self._after_hold is not None:
                if self._after_hold is RunState.RUNNING:
                    self._after_hold = state
                return
        if self._run_state is RunState.RUNNING:
            self.request(lambda: self._halt(state))
        elif self._run_state is RunState.PAUSED:
            self._run_state = state

    def request_reset(self) -> None:
        """The guest resets itself."""
        self.request(lambda: self._reset(guest=True, reason="guest-reset"))

    def request_shutdown(self) -> None:
        """The guest powers itself off."""

        def shut_down() -> None:
            if self._exit_on_shutdown:
                self._end(Shutdown(guest=True, reason="guest-shutdown"))
            else:
                self.events.emit("SHUTDOWN", guest=True, reason="guest-shutdown")
            self._halt(RunState.SHUTDOWN, announce=False)

        self.request(shut_down)

    # The vCPU's thread

    def _vcpu(self) -> None:
        me = threading.get_ident()
        while True:
            with self._turn:
                while not self._closing and (
                    self._owner is not None
                    or self._run_state is not RunState.RUNNING
                    or (self._waiting and not self._guests_turn)
                ):
                    self._turn.wait()
                self._guests_turn = False
                if self._closing:
                    return
                self._owner, self._depth = me, 1
                self._give_way = self._waiting > 0
            try:
                self._run_burst()
            except Exception as error:
                if isinstance(error, StillframeError):
                    _log.error("The processor of machine '%s' stopped: %s", self.name or "", error)
                else:
                    _log.exception(
                        "The processor of machine '%s' stopped by a defect of stillframe", self.name or ""
                    )
                self._halt(RunState.INTERNAL_ERROR)
            finally:
                self._release()

    def _run_burst(self) -> None:
        """Owned by the vCPU's thread: run the guest until somebody else wants the machine or it no longer runs."""
        clock, engine, mailbox = self.clock, self.engine, self.mailbox
        counted = clock.icount_shift is not None
        while self._run_state is RunState.RUNNING:
            if self._shutdown is not None:
                self._halt(RunState.SHUTDOWN, announce=False)
                return
            mailbox.run()
            clock.run_timers()
            if not self._requested:
                deadline = clock.next_deadline_ns
                if counted:
                    budget = (
                        None if deadline is None else -(-(deadline - clock.ns) >> (clock.icount_shift or 0))
                    )
                    exit_ = engine.run_until(count=budget, deadline_ns=None)
                    clock.instructions += engine.executed()
                else:
                    exit_ = engine.run_until(count=None, deadline_ns=deadline)
                if exit_ is Exit.IDLE:
                    self._idle()
            self._do_requested()
            if self._give_way:
                return

    def _do_requested(self) -> None:
        while self._requested:
            self._requested.popleft()()

    def _idle(self) -> None:
        """Sleep until an interrupt is pending, a timer is due, or somebody calls."""
        clock = self.clock
        while not (
            self.engine.interrupt_ready()
            or self.mailbox.waiting
            or self._give_way
            or self._shutdown
            or self._requested
        ):
            deadline = clock.next_deadline_ns
            remaining = None if deadline is None else (deadline - clock.ns) / 1e9
            if remaining is not None and remaining <= 0:
                return
            self.mailbox.wait(remaining)
            if (
                deadline is not None
                and clock.icount_shift is not None
                and not self.mailbox.waiting
                and not self._give_way
            ):
                clock.advance_to(deadline)
