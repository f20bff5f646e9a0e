"""Firmware: the supervisor binary interface, answered by us instead of by code in M mode (RISC-V SBI specification 2.0).

    base, TIME, IPI (sPI), RFENCE, HSM with the one hart, SRST, DBCN, and the legacy calls 0, 1, 2, 3, 4 to 8

Its machine state is the timer's deadline alone.
"""

from collections.abc import Callable, Sequence

from stillframe.machine.clock import VirtualClock
from stillframe.machine.devices import Device
from stillframe.machine.engines import Engine
from stillframe.machine.memory import GuestMemory
from stillframe.vmstate.fields import Description, Field, Values

TICK_NS = 100
"""The timebase: 10 MHz, as QEMU's `virt`."""

_SUCCESS, _FAILED, _NOT_SUPPORTED, _INVALID_PARAM, _ALREADY_AVAILABLE = 0, -1, -2, -3, -6
_BASE, _TIME, _IPI, _RFENCE, _HSM, _SRST, _DBCN = (
    0x10,
    0x54494D45,
    0x735049,
    0x52464E43,
    0x48534D,
    0x53525354,
    0x4442434E,
)
_EXTENSIONS = frozenset({0, 1, 2, 3, 4, 5, 6, 7, 8, _BASE, _TIME, _IPI, _RFENCE, _HSM, _SRST, _DBCN})
_SOFTWARE, _TIMER = 1, 5
_NEVER = (1 << 64) - 1
_CONSOLE_BYTES = 4096
_VERSION = 2 << 24

Answer = tuple[int, int | None]


class Sbi(Device):
    """:param transmit: console output. :param take_input: at most so many characters of console input.

    :param shut_down: :param restart: what the guest asks for through SRST.
    """

    section_name = "sbi"
    description = Description("riscv-sbi", version=1, fields=(Field("timer_deadline", "uint64"),))

    def __init__(
        self,
        memory: GuestMemory,
        clock: VirtualClock,
        *,
        transmit: Callable[[bytes], None],
        take_input: Callable[[int], bytes],
        shut_down: Callable[[], None],
        restart: Callable[[], None],
    ) -> None:
        self._memory = memory
        self._clock = clock
        self._transmit = transmit
        self._take_input = take_input
        self._shut_down = shut_down
        self._restart = restart
        self._engine: Engine | None = None
        self._timer = clock.timer(lambda: self._interrupt(_TIMER, raised=True))
        self._deadline = _NEVER

    def attach(self, engine: Engine) -> None:
        """The processor whose interrupts it drives."""
        self._engine = engine

    def _interrupt(self, line: int, *, raised: bool) -> None:
        if self._engine is not None:
            self._engine.set_interrupt(line, raised=raised)

    def call(self, registers: Sequence[int]) -> Answer:
        """An `ecall` with these a0 to a7."""
        extension, function = registers[7], registers[6]
        if extension <= 8:
            return self._legacy(extension, registers)
        if extension == _TIME and function == 0:
            self._set_timer(registers[0])
            return _SUCCESS, 0
        handler = {
            _BASE: self._base,
            _IPI: self._ipi,
            _RFENCE: self._fence,
            _HSM: self._hart_state,
            _SRST: self._system_reset,
            _DBCN: self._debug_console,
        }.get(extension)
        return (_NOT_SUPPORTED, 0) if handler is None else handler(function, registers)

    def _legacy(self, extension: int, registers: Sequence[int]) -> Answer:
        if extension == 0:
            self._set_timer(registers[0])
        elif extension == 1:
            self._transmit(bytes((registers[0] & 0xFF,)))
        elif extension == 2:
            character = self._take_input(1)
            return (character[0] if character else -1), None
        elif extension == 3:
            self._interrupt(_SOFTWARE, raised=False)
        elif extension == 4:
            self._interrupt(_SOFTWARE, raised=True)
        elif extension == 8:
            self._shut_down()
        return _SUCCESS, None

    def _set_timer(self, ticks: int) -> None:
        self._deadline = ticks
        due = ticks * TICK_NS <= self._clock.ns
        self._interrupt(_TIMER, raised=due)
        self._timer.deadline_ns = None if due or ticks >= 1 << 63 else ticks * TICK_NS

    @staticmethod
    def _base(function: int, registers: Sequence[int]) -> Answer:
        values = {0: _VERSION, 1: 0x5346, 2: 1, 4: 0, 5: 0, 6: 0}
        if function == 3:
            return _SUCCESS, int(registers[0] in _EXTENSIONS)
        return (_SUCCESS, values[function]) if function in values else (_NOT_SUPPORTED, 0)

    @staticmethod
    def _names_hart(mask: int, base: int) -> bool | None:
        """Whether a hart mask has hart 0; None where it names a hart that is not there."""
        if base == _NEVER:
            return True
        harts = mask << base if base < 64 else (2 if mask else 0)
        return None if harts & ~1 else bool(harts & 1)

    def _ipi(self, function: int, registers: Sequence[int]) -> Answer:
        if function != 0:
            return _NOT_SUPPORTED, 0
        named = self._names_hart(registers[0], registers[1])
        if named is None:
            return _INVALID_PARAM, 0
        if named:
            self._interrupt(_SOFTWARE, raised=True)
        return _SUCCESS, 0

    def _fence(self, function: int, registers: Sequence[int]) -> Answer:
        """The one hart fences itself before it asks for others."""
        if function > 2:
            return _NOT_SUPPORTED, 0
        return (_INVALID_PARAM if self._names_hart(registers[0], registers[1]) is None else _SUCCESS), 0

    @staticmethod
    def _hart_state(function: int, registers: Sequence[int]) -> Answer:
        if function == 0:
            return (_ALREADY_AVAILABLE if registers[0] == 0 else _INVALID_PARAM), 0
        if function == 1:
            return _FAILED, 0
        if function == 2:
            return (_SUCCESS if registers[0] == 0 else _INVALID_PARAM), 0
        return _NOT_SUPPORTED, 0

    def _system_reset(self, function: int, registers: Sequence[int]) -> Answer:
        if function != 0:
            return _NOT_SUPPORTED, 0
        if registers[0] == 0:
            self._shut_down()
        elif registers[0] in (1, 2):
            self._restart()
        else:
            return _INVALID_PARAM, 0
        return _SUCCESS, 0

    def _debug_console(self, function: int, registers: Sequence[int]) -> Answer:
        length, address = min(registers[0], _CONSOLE_BYTES), registers[1]
        if function == 2:
            self._transmit(bytes((registers[0] & 0xFF,)))
            return _SUCCESS, 0
        if function not in (0, 1):
            return _NOT_SUPPORTED, 0
        data = None if registers[2] else self._memory.read(address, length)
        if data is None:
            return _INVALID_PARAM, 0
        if function == 0:
            self._transmit(data)
            return _SUCCESS, length
        data = self._take_input(length)
        self._memory.write(address, data)
        return _SUCCESS, len(data)

    def reset(self) -> None:
        self._deadline = _NEVER
        self._timer.deadline_ns = None

    def save_state(self) -> Values:
        return {"timer_deadline": self._deadline if self._timer.deadline_ns is not None else _NEVER}

    def check_state(self, values: Values) -> None:
        self.integer(values, "timer_deadline")

    def load_state(self, values: Values) -> None:
        self._deadline = self.integer(values, "timer_deadline")
        self._timer.deadline_ns = None if self._deadline >= 1 << 63 else self._deadline * TICK_NS
