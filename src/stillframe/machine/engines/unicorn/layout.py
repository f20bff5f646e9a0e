"""What of Unicorn's insides the engine uses, found and proven before it is used.

Unicorn 2.1.4 lays its processor out as below. Two things come of it, both much faster than the public functions: the CPU state
is read and written in place, and a slice is counted in translated blocks instead of instructions.

    uc_struct                                  CPURISCVState, in u64                       (also what uc_context_save copies,
       440  the CPU object ──► ... 36112 ──►      0 gpr   32 fpr   64 pc   65 load_res      after a header of 40 bytes)
      1360  handle of the count hook             66 load_val   67 frm   68 badaddr
      1368  emu_counter                          74 priv   78 mstatus   79 mip   81 mie   82 mideleg   84 satp
      1376  emu_count                            85 stval   87 medeleg   88 stvec   89 sepc   90 scause
      2034  no_exit_request (u8)                126 PMP   191 rdtime callback: where the copied part ends

- The count hook is a function of Unicorn's own that Unicorn hooks to every instruction when `uc_emu_start` gets a count: it
  counts and, past the bound, stops from inside, at an exact instruction. Hooked to every *block* instead (`uc_hook_add` with its
  address, the handle put where Unicorn keeps the hook's) it counts those, and stops as exactly, before the first instruction of a
  block.
- `no_exit_request` keeps Unicorn from looking for a stop after each load and store, inside the instruction, where an exit runs
  the instruction twice; the look at every block's start remains.

Nothing is believed: `find_counter` and `find_state` compare each place with what the public functions say, read memory only
through /proc/self/mem, where a wrong address is an error and not a crash, and then watch the behaviour itself. Where anything
differs they return None, and the engine keeps to the public functions.
"""

import ctypes
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from stillframe.machine.engines.unicorn.library import (
    HOOK_BLOCK,
    HOOK_CODE,
    OK,
    PC,
    X0,
    Processor,
    register,
)
from stillframe.machine.memory import MemoryBlock

CONTEXT_HEADER = 40
STATE_WORDS = 191

GPR, FPR, AT_PC, LOAD_RES, LOAD_VAL, FRM, BADADDR = 0, 32, 64, 65, 66, 67, 68
AT_PRIV, MSTATUS, MIP, MIE, STVAL, STVEC, SEPC, SCAUSE = 74, 78, 79, 81, 85, 88, 89, 90
RDTIME = 191

_CPU, _COUNT_HOOK, _COUNTER, _COUNT, _NO_EXIT = 440, 1360, 1368, 1376, 2034
_STATE_IN_CPU = 36112
_HOOK = struct.Struct("<5i?3xQQQQ")

_PROBED_CSRS = {
    "MSCRATCH": 122,
    "SSCRATCH": 121,
    "SEPC": 89,
    "SCAUSE": 90,
    "STVEC": 88,
    "STVAL": 85,
    "MEPC": 92,
}


@dataclass(frozen=True, slots=True)
class Counter:
    """Unicorn's own function for counting and stopping. :param address: where it is in this process."""

    address: int


def _peek(address: int, length: int) -> bytes:
    """Memory of this process; empty or short where there is none."""
    if not 0 < address < 1 << 63:
        return b""
    descriptor = os.open("/proc/self/mem", os.O_RDONLY)
    try:
        return os.pread(descriptor, length, address)
    except OSError:
        return b""
    finally:
        os.close(descriptor)


def _word(address: int) -> int:
    data = _peek(address, 8)
    return int.from_bytes(data, "little") if len(data) == 8 else 0


def _is_code_of(path: str, address: int) -> bool:
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, permissions, *_, name = line.rstrip("\n").split(maxsplit=5)
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= address < end:
                return "x" in permissions and os.path.realpath(name) == os.path.realpath(path)
    return False


@contextmanager
def _pattern(processor: Processor) -> Iterator[bytes]:
    """The registers hold values that cannot be there by chance; x1 to x31 as bytes. Zero again afterwards."""
    values = [0x5A5A_0000_1111_0000 + number * 0x101 for number in range(1, 32)]
    for number, value in enumerate(values, 1):
        processor.write(X0 + number, value)
    for number, name in enumerate(_PROBED_CSRS):
        processor.write(register(name), 0x1234_0000 + number * 0x100)
    processor.write(PC, 0x5150)
    try:
        yield struct.pack("<31Q", *values)
    finally:
        for number in range(1, 32):
            processor.write(X0 + number, 0)
        for name in _PROBED_CSRS:
            processor.write(register(name), 0)


def _shows(words: Sequence[int], general: bytes) -> bool:
    """Whether a CPU state is what `_pattern` has put into the registers of a processor in M mode."""
    placed = all(words[index] == 0x1234_0000 + n * 0x100 for n, index in enumerate(_PROBED_CSRS.values()))
    return (
        placed
        and struct.pack("<31Q", *words[1:32]) == general
        and words[AT_PC] == 0x5150
        and words[AT_PRIV] == 3
    )


def context_is_known(processor: Processor) -> bool:
    """Whether `uc_context_save` holds the CPU state where this module says; public functions only. In M mode."""
    if processor.context_size != CONTEXT_HEADER + 8 * STATE_WORDS:
        return False
    with _pattern(processor) as general:
        return _shows(struct.unpack_from(f"<{STATE_WORDS}Q", processor.context(), CONTEXT_HEADER), general)


def find_state(processor: Processor) -> memoryview | None:
    """The CPU state in place, as u64 words, the rdtime callback included; None where it is not where it should be.

    In M mode.
    """
    address = _word(processor.handle + _CPU) + _STATE_IN_CPU
    length = 8 * (STATE_WORDS + 1)
    with _pattern(processor) as general:
        found = _peek(address, length)
        if len(found) != length or found[: 8 * STATE_WORDS] != processor.context()[CONTEXT_HEADER:]:
            return None
        words = struct.unpack(f"<{STATE_WORDS + 1}Q", found)
        if not _shows(words, general) or words[RDTIME] != 0:
            return None
        state = memoryview((ctypes.c_uint64 * (STATE_WORDS + 1)).from_address(address)).cast("B").cast("Q")
        state[5] = 0x77
        return state if processor.read(X0 + 5) == 0x77 else None


def stop_at_blocks(processor: Processor) -> None:
    """From now on a stop is looked for at the start of blocks alone. Before anything was run, and after `find_counter`."""
    ctypes.c_uint8.from_address(processor.handle + _NO_EXIT).value = 1


def count_blocks(processor: Processor, counter: Counter) -> None:
    """From now on the count of `start` is one of blocks. Before anything was run, and after `stop_at_blocks`."""
    hook = processor.add_hook(HOOK_BLOCK, counter.address)
    ctypes.c_uint64.from_address(processor.handle + _COUNT_HOOK).value = hook


def counted(processor: Processor) -> int:
    """How often the count hook was called in this `start`. Only after `find_counter` proved the place."""
    return ctypes.c_uint64.from_address(processor.handle + _COUNTER).value


_BASE = 0x8000_0000
_DEVICE = 0x1000_0000
# 1: amoadd.d zero, t1, (t0); addi t2, t2, 1; bne t2, t3, 1b; 2: sw t2, 0(t4); j 1b
_LOOP = struct.pack("<6I", 0x0062B02F, 0x00138393, 0xFFC39CE3, 0x007EA023, 0xFF1FF06F, 0)
_T0, _T1, _T2, _T3, _T4 = 5, 6, 7, 28, 29


class _Trial:
    """A processor with a page of code, one of data and a device, to watch the behaviour on."""

    def __init__(self) -> None:
        self.stores = 0
        self.stop_in_store = False
        self.code = MemoryBlock.allocate("code", _BASE, 0x1000, is_ram=True)
        self.data = MemoryBlock.allocate("data", _BASE + 0x1000, 0x1000, is_ram=True)
        self.code.view[: len(_LOOP)] = _LOOP
        self.processor = Processor()
        for block in (self.code, self.data):
            self.processor.map_memory(block.base, block.size, block.host_address)
        self.processor.map_device(_DEVICE, 0x1000, lambda *_: 0, self._stored)
        for number, value in ((_T0, self.data.base), (_T1, 1), (_T2, 0), (_T3, 0), (_T4, _DEVICE)):
            self.processor.write(X0 + number, value)
        self.processor.write(PC, _BASE)

    def _stored(self, *_: object) -> None:
        self.stores += 1
        if self.stop_in_store:
            self.processor.stop()

    @property
    def added(self) -> int:
        return int.from_bytes(self.data.view[:8], "little")

    def run(self, count: int) -> bool:
        return self.processor.start(self.processor.read(PC), count) == OK


_ROUNDS = 300
_found: list[Counter | None] = []


def find_counter() -> Counter | None:
    """The count hook, once a process: found where it must be, and seen to count blocks and to stop exactly."""
    if not _found:
        _found.append(_find_counter())
    return _found[0]


def _find_counter() -> Counter | None:
    trial = _Trial()
    try:
        if not trial.run(1) or _word(trial.processor.handle + _COUNT) != 1:
            return None
        for count in (3, 30, 333):
            if not trial.run(count) or _word(trial.processor.handle + _COUNT) != count:
                return None
            if _word(trial.processor.handle + _COUNTER) != count + 1:
                return None
        hook = _peek(_word(trial.processor.handle + _COUNT_HOOK), _HOOK.size)
        if len(hook) != _HOOK.size:
            return None
        kind, _, _, _, _, deleted, begin, end, callback, user = _HOOK.unpack(hook)
        flags = _peek(trial.processor.handle + _NO_EXIT - 2, 4)
        if (kind, deleted, begin, end, user) != (HOOK_CODE, False, 1, 0, 0) or flags not in (
            b"\0\0\0\1",
            b"\0\1\0\1",
        ):
            return None
        if not _is_code_of(trial.processor.library.path, callback):
            return None
    finally:
        trial.processor.close()
    counter = Counter(callback)
    return counter if _behaves(counter) else None


def _behaves(counter: Counter) -> bool:
    trial = _Trial()
    try:
        stop_at_blocks(trial.processor)
        count_blocks(trial.processor, counter)
        trial.processor.write(X0 + _T3, (1 << 64) - 1)
        for stops in range(1, _ROUNDS + 1):
            if not trial.run(1 + stops % 7) or trial.added != trial.processor.read(X0 + _T2):
                return False
        if trial.added != sum(1 + stops % 7 for stops in range(1, _ROUNDS + 1)):
            return False
        trial.processor.write(X0 + _T3, 0)
        trial.stop_in_store = True
        for stops in range(1, 11):
            trial.processor.write(X0 + _T3, trial.processor.read(X0 + _T2) + 1)
            if not trial.run(1 << 20) or trial.stores != stops:
                return False
        return True
    finally:
        trial.processor.close()
