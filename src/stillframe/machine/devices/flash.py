"""A bank of NOR flash: two 16-bit chips side by side, Intel command set (CFI, JEDEC JESD68), as QEMU's `pflash_cfi01`.

    array       what is stored; a memory block of the machine, so it is machine state, as in QEMU
    node        the same bytes; every byte programmed or erased is written through to it

    0xff read array   0x70 read status   0x50 clear status   0x90 read id   0x98 CFI query   0x60 lock, unlock
    0x10, 0x40 program a word   0x20 0xd0 erase a block   0xe8 n-1, n words, 0xd0 program a buffer

Programming a real chip can only clear bits; here, as in QEMU, the word is stored as it is. After a load the node is made equal to
the array that came with the machine state.
"""

import logging
import struct

from stillframe.block.node import Node
from stillframe.errors import InvalidRequest, StillframeError
from stillframe.machine.devices import Device
from stillframe.machine.memory import MemoryBlock
from stillframe.vmstate.fields import Description, Field, Values

BANK_SIZE = 32 << 20
BLOCK_SIZE = 256 << 10

_log = logging.getLogger(__name__)

_BANK_WIDTH, _CHIP_WIDTH, _CHIPS = 4, 2, 2
_CHUNK = 64 << 10
_BUFFER = 2048 * _CHIPS
_READY, _ERASE_ERROR, _PROGRAM_ERROR = 0x80, 0x20, 0x10
_STATUS_READERS = frozenset({0x10, 0x20, 0x28, 0x40, 0x50, 0x60, 0x70, 0xE8})
_NO_BUFFER = (1 << 32) - 1


def _query_table() -> bytes:
    """The CFI query structure of one chip, from offset 0x10 on 16-bit words."""
    chip = BANK_SIZE // _CHIPS
    blocks, block = BANK_SIZE // BLOCK_SIZE, BLOCK_SIZE // _CHIPS
    table = bytearray(0x52)
    table[0x10:0x13] = b"QRY"
    struct.pack_into("<HHHH", table, 0x13, 0x0001, 0x0031, 0, 0)
    table[0x1B:0x1F] = bytes((0x45, 0x55, 0, 0))
    table[0x1F:0x27] = bytes((0x07, 0x07, 0x0A, 0, 0x04, 0x04, 0x04, 0))
    table[0x27] = chip.bit_length() - 1
    struct.pack_into("<HHBHH", table, 0x28, 2, 11, 1, blocks - 1, block >> 8)
    table[0x31:0x36] = b"PRI10"
    table[0x3F] = 1
    return bytes(table)


_QUERY = _query_table()


class Flash(Device):
    """:param bank: 0 or 1. :param block: its array, of `BANK_SIZE`. :param node: of that size too.

    :raise InvalidRequest: the node has another size.
    """

    description = Description(
        "cfi-flash",
        version=1,
        fields=(
            Field("command", "uint8"),
            Field("cycle", "uint8"),
            Field("status", "uint8"),
            Field("counter", "uint32"),
            Field("buffer_block", "uint32"),
            Field("buffer", "buffer", count=_BUFFER),
        ),
    )

    def __init__(self, bank: int, block: MemoryBlock, node: Node) -> None:
        if node.size != BANK_SIZE:
            raise InvalidRequest(
                f"Node '{node.node_name}' has {node.size} bytes; a flash bank needs exactly {BANK_SIZE}",
                remedy=f"Make a raw image of that size: truncate -s {BANK_SIZE >> 20}M FILE.",
            )
        self.section_name = f"flash{bank}"
        self.block = block
        self.node = node
        self._clear()
        for offset in range(0, BANK_SIZE, _CHUNK):
            chunk = node.read(offset, _CHUNK)
            if chunk.count(0) != len(chunk):
                block.view[offset : offset + _CHUNK] = chunk

    def _clear(self) -> None:
        self._command = self._cycle = self._counter = 0
        self._status = _READY
        self._buffer = bytearray(_BUFFER)
        self._buffer_block = _NO_BUFFER

    def reset(self) -> None:
        self._clear()

    def write_back(self) -> None:
        """Make the node equal to the array, writing only what differs. A read-only node is left as it is.

        :raise IOFailed: some of it may have been written.
        """
        if self.node.read_only:
            return
        changed = False
        for offset in range(0, BANK_SIZE, _CHUNK):
            wanted = self.block.view[offset : offset + _CHUNK]
            if self.node.read(offset, _CHUNK) != wanted:
                self.node.write(offset, wanted)
                changed = True
        if changed:
            self.node.flush()

    # The guest reads

    def read(self, offset: int, size: int) -> int:
        """The guest reads: the array, or what the last command asked for."""
        if self._command in _STATUS_READERS:
            return self._on_both(self._status) & (1 << 8 * size) - 1
        if self._command in (0x90, 0x98):
            word = offset // _BANK_WIDTH
            value = self._identify(word & 0xFF) if self._command == 0x90 else self._query(word)
            return self._on_both(value) >> 8 * (offset % _BANK_WIDTH) & (1 << 8 * size) - 1
        return int.from_bytes(self.block.view[offset : offset + size], "little")

    @staticmethod
    def _on_both(value: int) -> int:
        word = value | value << 8 * _CHIP_WIDTH
        return word | word << 32

    @staticmethod
    def _identify(word: int) -> int:
        return {0: 0x89, 1: 0x18}.get(word, 0)

    @staticmethod
    def _query(word: int) -> int:
        return _QUERY[word] if word < len(_QUERY) else 0

    # The guest writes

    def write(self, offset: int, size: int, value: int) -> None:
        """The guest writes: a step of a command."""
        command = value & 0xFF
        step = (self._begin, self._second, self._fill, self._confirm)[self._cycle]
        step(offset, size, value, command)

    def _begin(self, offset: int, size: int, value: int, command: int) -> None:
        if command in (0x10, 0x40, 0x20, 0x28, 0x60, 0xE8):
            self._command, self._cycle = command, 1
            self._status |= _READY
        elif command in (0x70, 0x90, 0x98):
            self._command = command
        elif command == 0x50:
            self._status = _READY
            self._command = 0
        else:
            self._command = 0

    def _second(self, offset: int, size: int, value: int, command: int) -> None:
        if self._command in (0x10, 0x40):
            self._store(offset, value.to_bytes(8, "little")[:size])
            self._cycle = 0
        elif self._command in (0x20, 0x28):
            self._cycle = 0
            if command == 0xD0:
                self._erase(offset)
            else:
                self._command = 0
        elif self._command == 0x60:
            self._cycle = 0
            if command not in (0xD0, 0x01):
                self._command = 0
        else:
            self._counter = value & 0xFFFF
            if (self._counter + 1) * size > _BUFFER:
                self._status |= _PROGRAM_ERROR
                self._command = self._cycle = 0
                return
            self._buffer_block = offset & ~(_BUFFER - 1)
            self._buffer[:] = self.block.view[self._buffer_block : self._buffer_block + _BUFFER]
            self._cycle = 2

    def _fill(self, offset: int, size: int, value: int, command: int) -> None:
        at = offset - self._buffer_block
        if 0 <= at <= _BUFFER - size:
            self._buffer[at : at + size] = value.to_bytes(8, "little")[:size]
        else:
            self._status |= _PROGRAM_ERROR
        if self._counter == 0:
            self._cycle = 3
        else:
            self._counter -= 1

    def _confirm(self, offset: int, size: int, value: int, command: int) -> None:
        self._cycle = 0
        if command == 0xD0 and not self._status & _PROGRAM_ERROR:
            self._store(self._buffer_block, bytes(self._buffer))
        else:
            self._command = 0
        self._buffer_block = _NO_BUFFER

    def _erase(self, offset: int) -> None:
        start = offset & ~(BLOCK_SIZE - 1)
        self._store(start, b"\xff" * BLOCK_SIZE, failed=_ERASE_ERROR)

    def _store(self, offset: int, data: bytes, *, failed: int = _PROGRAM_ERROR) -> None:
        """Node first: what the guest then reads is what would be there after a restart."""
        if self.node.read_only:
            self._status |= failed
            return
        try:
            self.node.write(offset, data)
        except StillframeError as error:
            _log.error("Flash could not write to node '%s': %s", self.node.node_name, error)
            self._status |= failed
            return
        self.block.view[offset : offset + len(data)] = data
        self._status |= _READY

    def save_state(self) -> Values:
        return {
            "command": self._command,
            "cycle": self._cycle,
            "status": self._status,
            "counter": self._counter,
            "buffer_block": self._buffer_block,
            "buffer": bytes(self._buffer),
        }

    def check_state(self, values: Values) -> None:
        self.integer(values, "command", maximum=0xFF)
        self.integer(values, "cycle", maximum=3)
        self.integer(values, "status", maximum=0xFF)
        self.integer(values, "counter", maximum=_BUFFER)
        block = self.integer(values, "buffer_block", maximum=_NO_BUFFER)
        if block != _NO_BUFFER and (block % _BUFFER or block >= BANK_SIZE):
            raise self.refuse("buffer_block", f"is {block:#x}, not a buffer within the bank")
        if self.integer(values, "cycle") >= 2 and block == _NO_BUFFER:
            raise self.refuse("buffer_block", "is missing in the middle of a buffer program")
        self.buffer(values, "buffer", _BUFFER)

    def load_state(self, values: Values) -> None:
        """The block has its content already; now the node gets it. :raise IOFailed: it did not, or not all."""
        self._command, self._cycle, self._status, self._counter, self._buffer_block = (
            self.integer(values, name) for name in ("command", "cycle", "status", "counter", "buffer_block")
        )
        self._buffer = bytearray(self.buffer(values, "buffer"))
        self.write_back()
