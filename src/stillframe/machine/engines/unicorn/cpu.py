"""Access to the processor's registers: in place, where `layout` has proven the place, or through Unicorn's functions.

Both do the same. What RISC-V calls machine mode belongs to us: the guest runs in S and U mode alone, every exception and
interrupt is its S mode's, and `mstatus.TW` makes its WFI a trap. Interrupts are taken by Unicorn itself once `mip` says so;
exceptions arrive in a hook, with PC 4 past the instruction, and are delivered here (privileged specification, 3.1.6 and 4.1).
"""

import struct
from collections.abc import Sequence
from typing import Protocol

from stillframe.machine.engines.unicorn import layout
from stillframe.machine.engines.unicorn.library import PC, PRIV, X0, Processor, register

USER, SUPERVISOR, MACHINE = 0, 1, 3
INTERRUPTS = 0x222
"""Software, timer and external interrupt of S mode, as bits of `mip`, `mie` and `mideleg`."""

_EXCEPTIONS = 0xB1FF
_SIE, _SPIE, _SPP, _FS = 1 << 1, 1 << 5, 1 << 8, 3 << 13
_TW = 1 << 29  # the specification has it at bit 21; Unicorn 2.1.4 looks here
_NOT_ENTERED = ~(_SIE | _SPIE | _SPP)
_NO_RESERVATION = (1 << 64) - 1
_WORDS = struct.Struct(f"<{layout.STATE_WORDS}Q")

_MIP, _MIE, _MSTATUS, _FFLAGS = register("MIP"), register("MIE"), register("MSTATUS"), register("FFLAGS")
_SSTATUS, _SCAUSE, _SEPC, _STVAL = (
    register("SSTATUS"),
    register("SCAUSE"),
    register("SEPC"),
    register("STVAL"),
)
_STVEC = register("STVEC")


class Cpu(Protocol):
    """The registers of one processor, at an instruction boundary or inside a hook."""

    in_place: bool
    """Whether registers are read and written in place."""

    @property
    def pc(self) -> int: ...

    @pc.setter
    def pc(self, value: int) -> None: ...

    @property
    def privilege(self) -> int: ...

    def arguments(self) -> Sequence[int]:
        """a0 to a7."""
        ...

    def set_x(self, number: int, value: int) -> None: ...

    def fault_address(self) -> int:
        """Of the fault that the hook was called for."""
        ...

    def take_trap(self, cause: int, value: int, pc: int) -> None:
        """Enter the guest's S mode handler for an exception at `pc`."""
        ...

    def interrupt_ready(self) -> bool:
        """Whether a pending interrupt is enabled in `mie`."""
        ...

    def set_interrupt(self, bit: int, *, raised: bool) -> None:
        """Drive a bit of `mip`."""
        ...

    def forget_code(self, start: int, end: int) -> None:
        """Drop translations of code at guest-physical addresses."""
        ...

    def words(self) -> list[int]:
        """The CPU state, laid out as `layout` draws it; the interrupt flags of `mip` included."""
        ...

    def set_words(self, words: Sequence[int]) -> None:
        """Replace it all."""
        ...

    def fflags(self) -> int:
        """The accrued exceptions of the floating point unit, which are not among the words."""
        ...

    def set_fflags(self, flags: int) -> None: ...


def reset_words(words: Sequence[int]) -> list[int]:
    """The state after power-on, of a processor that has just been made: S mode, everything delegated to it."""
    fresh = list(words)
    fresh[layout.AT_PRIV] = SUPERVISOR
    fresh[layout.LOAD_RES] = _NO_RESERVATION
    fresh[layout.MSTATUS] = _TW
    fresh[82], fresh[87] = INTERRUPTS, _EXCEPTIONS
    fresh[120] = 7
    return fresh


class PublicCpu:
    """Through Unicorn's public functions alone; 13 to 17 µs a trap."""

    in_place = False

    def __init__(self, processor: Processor) -> None:
        self._processor = processor

    @property
    def pc(self) -> int:
        return self._processor.read(PC)

    @pc.setter
    def pc(self, value: int) -> None:
        self._processor.write(PC, value)

    @property
    def privilege(self) -> int:
        return self._processor.read(PRIV)

    def arguments(self) -> Sequence[int]:
        return [self._processor.read(X0 + number) for number in range(10, 18)]

    def set_x(self, number: int, value: int) -> None:
        self._processor.write(X0 + number, value)

    def fault_address(self) -> int:
        at = layout.CONTEXT_HEADER + 8 * layout.BADADDR
        return int.from_bytes(self._processor.context()[at : at + 8], "little")

    def take_trap(self, cause: int, value: int, pc: int) -> None:
        processor = self._processor
        came_from = processor.read(PRIV)
        processor.write(PRIV, SUPERVISOR)
        status = processor.read(_SSTATUS)
        entered = status & _NOT_ENTERED | (_SPIE if status & _SIE else 0) | (_SPP if came_from else 0)
        processor.write(_SSTATUS, entered & _NO_RESERVATION)
        processor.write(_SCAUSE, cause)
        processor.write(_SEPC, pc)
        processor.write(_STVAL, value)
        processor.write(PC, processor.read(_STVEC) & ~3)

    def _as_machine(self, number: int, value: int | None = None) -> int:
        processor = self._processor
        privilege = processor.read(PRIV)
        processor.write(PRIV, MACHINE)
        if value is not None:
            processor.write(number, value)
        result = processor.read(number)
        processor.write(PRIV, privilege)
        return result

    def interrupt_ready(self) -> bool:
        return bool(self._as_machine(_MIP) & self._as_machine(_MIE))

    def set_interrupt(self, bit: int, *, raised: bool) -> None:
        pending = self._as_machine(_MIP)
        self._as_machine(_MIP, pending | bit if raised else pending & ~bit)

    def forget_code(self, start: int, end: int) -> None:
        privilege = self._processor.read(PRIV)
        self._processor.write(PRIV, MACHINE)
        self._processor.forget_code(start, end)
        self._processor.write(PRIV, privilege)

    def words(self) -> list[int]:
        return list(_WORDS.unpack_from(self._processor.context(), layout.CONTEXT_HEADER))

    def set_words(self, words: Sequence[int]) -> None:
        self._processor.set_context(layout.CONTEXT_HEADER, _WORDS.pack(*words))
        self._as_machine(_MIP, words[layout.MIP])

    def _with_fpu(self, value: int | None) -> int:
        status = self._as_machine(_MSTATUS)
        self._as_machine(_MSTATUS, status | _FS)
        flags = self._as_machine(_FFLAGS, value)
        self._as_machine(_MSTATUS, status)
        return flags

    def fflags(self) -> int:
        return self._with_fpu(None)

    def set_fflags(self, flags: int) -> None:
        self._with_fpu(flags)


class DirectCpu:
    """In place; about 1 µs a trap. :param state: what `layout.find_state` found."""

    in_place = True

    def __init__(self, processor: Processor, state: memoryview) -> None:
        self._processor = processor
        self._state = state

    @property
    def pc(self) -> int:
        return int(self._state[64])

    @pc.setter
    def pc(self, value: int) -> None:
        self._state[64] = value

    @property
    def privilege(self) -> int:
        return int(self._state[74])

    def arguments(self) -> Sequence[int]:
        return self._state[10:18].tolist()

    def set_x(self, number: int, value: int) -> None:
        self._state[number] = value

    def fault_address(self) -> int:
        return int(self._state[68])

    def take_trap(self, cause: int, value: int, pc: int) -> None:
        state = self._state
        status = state[78]
        entered = status & _NOT_ENTERED
        if status & _SIE:
            entered |= _SPIE
        if state[74]:
            entered |= _SPP
        state[78] = entered
        state[90] = cause
        state[89] = pc
        state[85] = value
        state[64] = state[88] & ~3
        state[74] = SUPERVISOR
        state[65] = _NO_RESERVATION

    def interrupt_ready(self) -> bool:
        return bool(self._state[79] & self._state[81])

    def set_interrupt(self, bit: int, *, raised: bool) -> None:
        state = self._state
        pending = state[79]
        privilege = state[74]
        state[74] = MACHINE
        self._processor.write(_MIP, pending | bit if raised else pending & ~bit)
        state[74] = privilege

    def forget_code(self, start: int, end: int) -> None:
        state = self._state
        privilege = state[74]
        state[74] = MACHINE
        self._processor.forget_code(start, end)
        state[74] = privilege

    def words(self) -> list[int]:
        words: list[int] = self._state.tolist()
        return words[: layout.STATE_WORDS]

    def set_words(self, words: Sequence[int]) -> None:
        for index, word in enumerate(words):
            self._state[index] = word
        state = self._state
        privilege = state[74]
        state[74] = MACHINE
        self._processor.write(_MIP, words[layout.MIP])
        state[74] = privilege

    def _with_fpu(self, value: int | None) -> int:
        state = self._state
        privilege, status = state[74], state[78]
        state[74], state[78] = MACHINE, status | _FS
        if value is not None:
            self._processor.write(_FFLAGS, value)
        flags = self._processor.read(_FFLAGS)
        state[74], state[78] = privilege, status
        return flags

    def fflags(self) -> int:
        return self._with_fpu(None)

    def set_fflags(self, flags: int) -> None:
        self._with_fpu(flags)
