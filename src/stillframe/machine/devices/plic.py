"""The platform-level interrupt controller (RISC-V PLIC specification 1.0.0), as QEMU's riscv64 `virt` has it.

    0x000000  priority of source n, u32 at 4 n              0x200000 + 0x1000 c  threshold of context c
    0x001000  pending, a bit a source                       0x200004 + 0x1000 c  claim (read), complete (write)
    0x002000 + 0x80 c  enable bits of context c             context 0: M mode of the hart, context 1: its S mode

Sources are lines that devices hold, and edges that are remembered until claimed. The guest runs in S mode alone, so only
context 1 is wired to the processor.
"""

from collections.abc import Callable

from stillframe.machine.devices import Device
from stillframe.vmstate.fields import Description, Field, Values

SOURCES = 96
_WORDS = SOURCES // 32
_PRIORITIES = 7
_CONTEXTS = 2
_SUPERVISOR = 1
_ALL = (1 << SOURCES) - 2


def _to_words(bits: int) -> tuple[int, ...]:
    return tuple(bits >> 32 * word & 0xFFFF_FFFF for word in range(_WORDS))


def _to_bits(words: tuple[int, ...]) -> int:
    return sum(word << 32 * index for index, word in enumerate(words))


class Plic(Device):
    """:param drive: gets the level of the processor's external interrupt whenever it changes."""

    section_name = "plic"
    description = Description(
        "riscv-plic",
        version=1,
        fields=(
            Field("priority", "uint32", count=SOURCES),
            Field("enable", "uint32", count=_WORDS * _CONTEXTS),
            Field("threshold", "uint32", count=_CONTEXTS),
            Field("lines", "uint32", count=_WORDS),
            Field("edges", "uint32", count=_WORDS),
            Field("claimed", "uint32", count=_WORDS),
        ),
    )

    def __init__(self, drive: Callable[[bool], None]) -> None:
        self._drive = drive
        self._driven = False
        self.reset()

    def reset(self) -> None:
        self._priority = [0] * SOURCES
        self._enable = [0] * _CONTEXTS
        self._threshold = [0] * _CONTEXTS
        self._lines = self._edges = self._claimed = 0
        self._update()

    def set_line(self, source: int, raised: bool) -> None:
        """A device's line changes or stays."""
        lines = self._lines | 1 << source if raised else self._lines & ~(1 << source)
        if lines != self._lines:
            self._lines = lines
            self._update()

    def pulse(self, source: int) -> None:
        """An edge: pending until it is claimed."""
        self._edges |= 1 << source
        self._update()

    def _pending(self) -> int:
        return (self._lines | self._edges) & ~self._claimed & _ALL

    def _best(self, context: int) -> int:
        """The source that a claim would get: the highest priority above the threshold, then the lowest number; 0: none."""
        candidates = self._pending() & self._enable[context]
        best, best_priority = 0, self._threshold[context]
        while candidates:
            source = (candidates & -candidates).bit_length() - 1
            candidates &= candidates - 1
            if self._priority[source] > best_priority:
                best, best_priority = source, self._priority[source]
        return best

    def _update(self) -> None:
        raised = self._best(_SUPERVISOR) != 0
        if raised != self._driven:
            self._driven = raised
            self._drive(raised)

    def read(self, offset: int, size: int) -> int:
        """The guest reads; registers are words."""
        if offset < 0x1000:
            return self._priority[offset // 4] if offset // 4 < SOURCES else 0
        if offset < 0x2000:
            word = (offset - 0x1000) // 4
            return self._pending() >> 32 * word & 0xFFFF_FFFF if word < _WORDS else 0
        if offset < 0x200000:
            context, word = divmod((offset - 0x2000) // 4, 32)
            known = context < _CONTEXTS and word < _WORDS
            return self._enable[context] >> 32 * word & 0xFFFF_FFFF if known else 0
        context, register = divmod(offset - 0x200000, 0x1000)
        if context >= _CONTEXTS:
            return 0
        if register == 0:
            return self._threshold[context]
        if register == 4:
            source = self._best(context)
            if source:
                self._claimed |= 1 << source
                self._edges &= ~(1 << source)
                self._update()
            return source
        return 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes; registers are words."""
        value &= 0xFFFF_FFFF
        if offset < 0x1000:
            if 0 < offset // 4 < SOURCES:
                self._priority[offset // 4] = value & _PRIORITIES
        elif 0x2000 <= offset < 0x200000:
            context, word = divmod((offset - 0x2000) // 4, 32)
            if context < _CONTEXTS and word < _WORDS:
                kept = self._enable[context] & ~(0xFFFF_FFFF << 32 * word)
                self._enable[context] = (kept | value << 32 * word) & _ALL
        elif offset >= 0x200000:
            context, register = divmod(offset - 0x200000, 0x1000)
            if context < _CONTEXTS:
                if register == 0:
                    self._threshold[context] = value & _PRIORITIES
                elif register == 4 and value < SOURCES:
                    self._claimed &= ~(1 << value)
        self._update()

    def save_state(self) -> Values:
        return {
            "priority": tuple(self._priority),
            "enable": tuple(word for bits in self._enable for word in _to_words(bits)),
            "threshold": tuple(self._threshold),
            "lines": _to_words(self._lines),
            "edges": _to_words(self._edges),
            "claimed": _to_words(self._claimed),
        }

    def check_state(self, values: Values) -> None:
        self.integers(values, "priority", SOURCES, maximum=_PRIORITIES)
        self.integers(values, "enable", _WORDS * _CONTEXTS, maximum=0xFFFF_FFFF)
        self.integers(values, "threshold", _CONTEXTS, maximum=_PRIORITIES)
        for name in ("lines", "edges", "claimed"):
            self.integers(values, name, _WORDS, maximum=0xFFFF_FFFF)

    def load_state(self, values: Values) -> None:
        self._priority = list(self.integers(values, "priority", SOURCES))
        enable = self.integers(values, "enable", _WORDS * _CONTEXTS)
        self._enable = [_to_bits(enable[c * _WORDS : (c + 1) * _WORDS]) & _ALL for c in range(_CONTEXTS)]
        self._threshold = list(self.integers(values, "threshold", _CONTEXTS))
        self._lines, self._edges, self._claimed = (
            _to_bits(self.integers(values, name, _WORDS)) & _ALL for name in ("lines", "edges", "claimed")
        )
        self._driven = self._best(_SUPERVISOR) != 0
        self._drive(self._driven)
