"""The engine `unicorn`: an RV64GC hart run by Unicorn 2.1.4 in this process, in slices of an exact count.

A slice ends from inside, at an instruction that is known beforehand, by Unicorn's own count; nobody ever calls `uc_emu_stop` from
outside, which would run an instruction twice. How the count is taken:

    counting       what the count is of         where a slice ends      chosen                        sha256 of 64 MB in Linux
    BLOCKS         translated blocks            before a block          with the host's clock         2.4 s (QEMU's TCG: 2.7 s)
    INSTRUCTIONS   instructions                 before a block          with `icount`                 8 to 10 s
    EXACT          instructions                 before an instruction   where `layout` finds another  18 s
                                                                        Unicorn than it knows

With the host's clock a slice is sized to take at most a millisecond, less when a timer is due earlier, from the rate of the slices
before; a slice that turns out slower is ended by its next trap or device access. With `icount` slices are bounded by number alone,
and interrupts that a device raises in the guest's access wait for the slice to end, right after it: so the guest sees the same in
every run. Without a count at all sha256 takes 2.3 s; the rest of `icount`'s cost is a call for each instruction, and
what would save it is a count of blocks by their length, which no function of Unicorn's does.

Reading `cycle` or `instret` gives the guest the host's counter, which nothing can prevent; the device tree does not offer them.
"""

import ctypes
import time
from collections.abc import Callable
from ctypes import CFUNCTYPE, c_uint64
from enum import Enum

from stillframe.errors import Failed, Unsupported
from stillframe.machine.clock import VirtualClock
from stillframe.machine.devices import Device
from stillframe.machine.engines import EnvironmentCall, Exit, MmioRegion
from stillframe.machine.engines.unicorn import layout
from stillframe.machine.engines.unicorn.cpu import USER, Cpu, DirectCpu, PublicCpu, reset_words
from stillframe.machine.engines.unicorn.library import (
    EXCEPTION,
    HOOK_INVALID,
    HOOK_STORE_UNMAPPED,
    HOOK_TRAP,
    OK,
    UNMAPPED_CAUSES,
    AccessCallback,
    InvalidCallback,
    Processor,
    TrapCallback,
)
from stillframe.machine.engines.unicorn.state import CpuState
from stillframe.machine.memory import GuestMemory

_SLICE_NS = 1_000_000
_COUNT = 200_000
_FIRST_COUNT = 20_000
_MAXIMUM_COUNT = 4_000_000
_MINIMUM_COUNT = 64

_ECALL, _ILLEGAL, _BREAKPOINT = 8, 2, 3
_WITH_ADDRESS = frozenset({0, 1, 4, 5, 6, 7, 12, 13, 15})
_WFI = 0x10500073
_READ_TIME, _READ_TIME_MASK = 0xC0102073, 0xFFFFF07F
_A0, _A1 = 10, 11

_TimeCallback = CFUNCTYPE(c_uint64)


class Counting(Enum):
    """What the count of a slice is of; the module's text tells when."""

    BLOCKS = "blocks"
    INSTRUCTIONS = "instructions"
    EXACT = "exact"


class UnicornEngine:
    """See the module's text.

    :param clock: the guest's time; with `icount` it makes the engine count instructions.
    :param environment_call: the firmware: gets a0 to a7 of an `ecall` from S mode and returns a0 and a1.
    :param public_only: keep to Unicorn's public functions even where `layout` allows more; for tests and for the doubtful.
    :raise Unsupported: when this Unicorn is not one whose state can be saved, or cannot count instructions for `icount`.
    """

    name = "unicorn"
    has_processor = True

    def __init__(
        self, clock: VirtualClock, environment_call: EnvironmentCall, *, public_only: bool = False
    ) -> None:
        self._clock = clock
        self._environment_call = environment_call
        self._processor = processor = Processor()
        if not layout.context_is_known(processor):
            processor.close()
            raise Unsupported(
                "This build of the library Unicorn lays its CPU state out unlike 2.1.4, so it cannot be saved",
                remedy="Install the wheel unicorn==2.1.4 from the package registry.",
            )
        state = None if public_only else layout.find_state(processor)
        counter = None if state is None else layout.find_counter()
        if counter is None and clock.icount_shift is not None:
            processor.close()
            raise Unsupported(
                "This build of the library Unicorn is unlike 2.1.4, and instructions cannot be counted on it",
                remedy="Run without --icount, or install the wheel unicorn==2.1.4.",
            )
        self.counting = Counting.EXACT
        if counter is not None:
            layout.stop_at_blocks(processor)
            self.counting = Counting.INSTRUCTIONS
            if clock.icount_shift is None:
                layout.count_blocks(processor, counter)
                self.counting = Counting.BLOCKS
        self._cpu: Cpu = PublicCpu(processor) if state is None else DirectCpu(processor, state)
        self._power_on_words = reset_words(self._cpu.words())
        self._state = CpuState(self._cpu, processor)
        self._memory: GuestMemory | None = None
        self._failure: BaseException | None = None
        self._lost_store_pc: int | None = None
        self._leave = self._breakpoint = self._in_access = False
        self._latched: dict[int, bool] = {}
        self._running = False
        self._executed = 0
        self._rate = 0.0
        self._slice_end_ns: float = 0
        processor.add_hook(HOOK_TRAP, TrapCallback(self._on_trap))
        processor.add_hook(HOOK_INVALID, InvalidCallback(self._on_breakpoint))
        if state is not None:
            self._time_callback = _TimeCallback(self._time)
            state[layout.RDTIME] = ctypes.cast(self._time_callback, ctypes.c_void_p).value or 0
        if clock.icount_shift is not None:
            clock.running = self._counted

    @property
    def devices(self) -> tuple[Device, ...]:
        return (self._state,)

    def attach(self, memory: GuestMemory, regions: tuple[MmioRegion, ...]) -> None:
        """RAM goes in as it is; other blocks are their devices' affair."""
        for block in memory:
            if block.is_ram:
                self._processor.map_memory(block.base, block.size, block.host_address)
        for region in regions:
            self._processor.map_device(region.base, region.size, self._reader(region), self._writer(region))
        self._watch_stores_to_nothing(memory)
        self._memory = memory
        memory.invalidate = lambda address, length: self._cpu.forget_code(address, address + length)
        memory.invalidate_all = self._processor.forget_everything

    def _watch_stores_to_nothing(self, memory: GuestMemory) -> None:
        """Below and above RAM: where such a hook reaches RAM, Unicorn takes every store there for one to code."""
        callback = AccessCallback(self._on_store_to_nothing)
        ram = sorted((block.base, block.base + block.size) for block in memory if block.is_ram)
        starts = [0, *(end for _, end in ram)]
        ends = [*(base - 1 for base, _ in ram), (1 << 64) - 1]
        for start, end in zip(starts, ends, strict=True):
            self._processor.add_hook(HOOK_STORE_UNMAPPED, callback, start, end)

    # Slices

    def run_until(self, *, count: int | None, deadline_ns: int | None) -> Exit:
        """One slice: with `icount` of `count` instructions to the next block, else as long as fits before the deadline."""
        self._leave = False
        if self._state.halted:
            if not self._cpu.interrupt_ready():
                self._executed = 0
                return Exit.IDLE
            self._state.halted = False
        if self._clock.icount_shift is not None:
            self._slice_end_ns = float("inf")
            self._start(min(count or _COUNT, _COUNT))
            for bit, raised in self._latched.items():
                self._cpu.set_interrupt(bit, raised=raised)
            self._latched.clear()
        else:
            began = time.monotonic_ns()
            length = (
                _SLICE_NS if deadline_ns is None else min(_SLICE_NS, max(0, deadline_ns - self._clock.ns))
            )
            self._slice_end_ns = began + length
            budget = int(self._rate * length) if self._rate else _FIRST_COUNT
            budget = min(max(budget, _MINIMUM_COUNT), _MAXIMUM_COUNT)
            self._start(budget)
            took = time.monotonic_ns() - began
            if took < self._slice_end_ns - began or took > 2 * length:
                self._learn(budget, took)
            else:
                self._rate *= 1.05
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure
        if self._leave:
            return Exit.LEAVE
        return Exit.IDLE if self._state.halted else Exit.BUDGET

    def _learn(self, budget: int, took_ns: int) -> None:
        """What the next slice's size is made of; a slice that ended early, idle or in an access, says nothing."""
        if self._state.halted or self._leave or took_ns <= 0:
            return
        rate = budget / took_ns
        self._rate = rate if rate < self._rate or not self._rate else min(rate, self._rate * 2)

    def _start(self, budget: int) -> None:
        cpu = self._cpu
        self._running = True
        error = self._processor.start(cpu.pc, budget)
        self._executed = self._counted()
        self._running = False
        if error == OK:
            return
        lost_store_pc, self._lost_store_pc = self._lost_store_pc, None
        if error == EXCEPTION and self._breakpoint:
            self._breakpoint = False
        elif error in UNMAPPED_CAUSES:
            cpu.take_trap(UNMAPPED_CAUSES[error], 0, cpu.pc if lost_store_pc is None else lost_store_pc)
        elif self._failure is None:
            raise Failed(
                f"The engine stopped at {cpu.pc:#x}: {self._processor.library.describe(error)}",
                left="The guest stands at that instruction.",
            )

    def _counted(self) -> int:
        """Instructions of the present slice so far."""
        return layout.counted(self._processor) if self._running else 0

    def executed(self) -> int:
        return self._executed

    def kick(self) -> None:
        """A slice lasts about a millisecond and cannot be cut short from outside: nothing to do."""

    def leave(self) -> None:
        self._leave = True
        if self._running:
            self._stop()

    def _stop(self) -> None:
        if self.counting is not Counting.EXACT or not self._in_access:
            self._processor.stop()

    # Callbacks of Unicorn, on the thread that runs the slice. An exception must not fall into C: it ends the slice.

    def _failed(self, error: BaseException) -> None:
        self._failure = error
        self._stop()

    def _on_trap(self, _handle: int, cause: int, _user: int) -> None:
        try:
            if self._lost_store_pc is not None:
                self._stop()
                return
            cpu = self._cpu
            pc = (cpu.pc - 4) & 0xFFFF_FFFF_FFFF_FFFF
            if cause in _WITH_ADDRESS:
                cpu.take_trap(cause, cpu.fault_address(), pc)
            elif cause == _ECALL:
                if cpu.privilege == USER:
                    cpu.take_trap(cause, 0, pc)
                else:
                    cpu.pc = pc + 4
                    result, value = self._environment_call(cpu.arguments())
                    cpu.set_x(_A0, result & 0xFFFF_FFFF_FFFF_FFFF)
                    if value is not None:
                        cpu.set_x(_A1, value & 0xFFFF_FFFF_FFFF_FFFF)
            elif cause == _ILLEGAL:
                self._illegal(pc)
            else:
                cpu.take_trap(cause, 0, pc)
            if time.monotonic_ns() >= self._slice_end_ns:
                self._stop()
        except BaseException as error:
            self._failed(error)

    def _illegal(self, pc: int) -> None:
        cpu = self._cpu
        instruction = self._processor.fetch(pc)
        if instruction == _WFI and cpu.privilege != USER:
            cpu.pc = pc + 4
            if not cpu.interrupt_ready():
                self._state.halted = True
                self._stop()
        elif instruction & _READ_TIME_MASK == _READ_TIME:
            number = instruction >> 7 & 31
            if number:
                cpu.set_x(number, self._time())
            cpu.pc = pc + 4
        else:
            cpu.take_trap(_ILLEGAL, instruction, pc)

    def _on_breakpoint(self, _handle: int, _user: int) -> bool:
        try:
            if self._lost_store_pc is not None:
                self._stop()
                return True
            self._breakpoint = True
            self._cpu.take_trap(_BREAKPOINT, self._cpu.pc, self._cpu.pc)
        except BaseException as error:
            self._failed(error)
        return True

    def _on_store_to_nothing(
        self, _handle: int, _kind: int, _at: int, _size: int, _value: int, _user: int
    ) -> bool:
        """Unicorn goes on to the end of the block before it ends `start`: what else happens there is not the guest's."""
        try:
            if self._lost_store_pc is None:
                self._lost_store_pc = self._cpu.pc
        except BaseException as error:
            self._failed(error)
        return False

    def _time(self) -> int:
        return self._clock.ns // 100

    def _reader(self, region: MmioRegion) -> Callable[[int, int, int, int], int]:
        read = region.read

        def on_read(_handle: int, offset: int, size: int, _user: int) -> int:
            self._in_access = True
            try:
                return read(offset, size)
            except BaseException as error:
                self._failed(error)
                return 0
            finally:
                self._in_access = False

        return on_read

    def _writer(self, region: MmioRegion) -> Callable[[int, int, int, int, int], None]:
        write = region.write

        def on_write(_handle: int, offset: int, size: int, value: int, _user: int) -> None:
            self._in_access = True
            try:
                write(offset, size, value)
                if time.monotonic_ns() >= self._slice_end_ns:
                    self._stop()
            except BaseException as error:
                self._failed(error)
            finally:
                self._in_access = False

        return on_write

    # Between instructions

    def set_interrupt(self, line: int, *, raised: bool) -> None:
        if self._in_access and self._clock.icount_shift is not None:
            self._latched[1 << line] = raised
            self._stop()
        else:
            self._cpu.set_interrupt(1 << line, raised=raised)

    def interrupt_ready(self) -> bool:
        return self._cpu.interrupt_ready()

    def reset(self, entry: int, arguments: tuple[int, ...]) -> None:
        self._cpu.set_words(self._power_on_words)
        self._cpu.set_fflags(0)
        self._state.halted = False
        self._cpu.pc = entry
        for number, argument in enumerate(arguments, _A0):
            self._cpu.set_x(number, argument)
        self._processor.forget_everything()

    def close(self) -> None:
        self._processor.close()
