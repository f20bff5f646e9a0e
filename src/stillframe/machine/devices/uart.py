"""The serial port: a 16550A, registers a byte apart (National Semiconductor PC16550D data sheet).

    0  RBR/THR (DLL)   1  IER (DLM)   2  IIR/FCR   3  LCR   4  MCR   5  LSR   6  MSR   7  SCR      (DLAB = LCR bit 7)

Characters leave at once. They come from the console as fast as the guest takes them: what does not fit the FIFO of 16 stays
with the console.
"""

from collections.abc import Callable

from stillframe.machine.console import Console
from stillframe.machine.devices import Device
from stillframe.machine.mailbox import Mailbox
from stillframe.vmstate.fields import Description, Field, Values

_FIFO = 16
_RECEIVE, _TRANSMIT = 1, 2
_LOOPBACK, _DLAB, _FIFOS_ON = 0x10, 0x80, 1
_REGISTERS = ("ier", "lcr", "mcr", "scr", "fcr", "dll", "dlm")


class Uart(Device):
    """:param line: its interrupt line. :param mailbox: where input of the console is delivered from."""

    section_name = "serial"
    description = Description(
        "uart16550",
        version=1,
        fields=(
            *(Field(name, "uint8") for name in _REGISTERS),
            Field("transmitter_empty_pending", "bool"),
            Field("received_count", "uint8"),
            Field("received", "buffer", count=_FIFO),
        ),
    )

    def __init__(self, line: Callable[[bool], None], console: Console, mailbox: Mailbox) -> None:
        self._line = line
        self._console = console
        self._clear()
        console.on_input = lambda: mailbox.post(self._take_input)

    def _clear(self) -> None:
        self._registers = dict.fromkeys(_REGISTERS, 0)
        self._registers["dll"] = 12
        self._empty_pending = False
        self._received = bytearray()

    def reset(self) -> None:
        self._clear()
        self._update()

    def close(self) -> None:
        self._console.close()

    def _take_input(self) -> None:
        room = _FIFO - len(self._received)
        if room > 0:
            self._received += self._console.take(room)
            self._update()

    def _interrupt(self) -> int:
        """The cause as IIR tells it; 1: none."""
        enabled = self._registers["ier"]
        if enabled & _RECEIVE and self._received:
            return 4
        if enabled & _TRANSMIT and self._empty_pending:
            return 2
        return 1

    def _update(self) -> None:
        self._line(self._interrupt() != 1)

    def transmit(self, data: bytes) -> None:
        """To the console; firmware's output goes the same way."""
        self._console.write(data)

    def read(self, offset: int, size: int) -> int:
        """The guest reads a register."""
        registers = self._registers
        if offset == 0:
            if registers["lcr"] & _DLAB:
                return registers["dll"]
            if not self._received:
                return 0
            character = self._received.pop(0)
            self._take_input()
            self._update()
            return character
        if offset == 1:
            return registers["dlm" if registers["lcr"] & _DLAB else "ier"]
        if offset == 2:
            cause = self._interrupt()
            if cause == 2:
                self._empty_pending = False
                self._update()
            return cause | (0xC0 if registers["fcr"] & _FIFOS_ON else 0)
        if offset == 5:
            return 0x60 | (1 if self._received else 0)
        if offset == 6:
            control = registers["mcr"]
            if control & _LOOPBACK:
                return (control & 2) << 3 | (control & 1) << 5 | (control & 4) << 4 | (control & 8) << 4
            return 0xB0
        return registers[{3: "lcr", 4: "mcr", 7: "scr"}[offset]] if offset in (3, 4, 7) else 0

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes a register."""
        registers, value = self._registers, value & 0xFF
        divisor = registers["lcr"] & _DLAB
        if offset == 0 and divisor:
            registers["dll"] = value
        elif offset == 0:
            if not registers["mcr"] & _LOOPBACK:
                self.transmit(bytes((value,)))
            elif len(self._received) < _FIFO:
                self._received.append(value)
            self._empty_pending = True
        elif offset == 1 and divisor:
            registers["dlm"] = value
        elif offset == 1:
            if value & _TRANSMIT and not registers["ier"] & _TRANSMIT:
                self._empty_pending = True
            registers["ier"] = value & 0x0F
        elif offset == 2:
            registers["fcr"] = value & ~6
            if value & 2:
                self._received.clear()
                self._take_input()
        elif offset in (3, 4, 7):
            registers[{3: "lcr", 4: "mcr", 7: "scr"}[offset]] = value & (0x1F if offset == 4 else 0xFF)
        self._update()

    def save_state(self) -> Values:
        return {
            **self._registers,
            "transmitter_empty_pending": self._empty_pending,
            "received_count": len(self._received),
            "received": bytes(self._received).ljust(_FIFO, b"\0"),
        }

    def check_state(self, values: Values) -> None:
        for name in _REGISTERS:
            self.integer(values, name, maximum=0xFF)
        self.integer(values, "transmitter_empty_pending", maximum=1)
        self.integer(values, "received_count", maximum=_FIFO)
        self.buffer(values, "received", _FIFO)

    def load_state(self, values: Values) -> None:
        self._registers = {name: self.integer(values, name) for name in _REGISTERS}
        self._empty_pending = bool(self.integer(values, "transmitter_empty_pending"))
        count = self.integer(values, "received_count")
        self._received = bytearray(self.buffer(values, "received")[:count])
        self._take_input()
        self._update()
