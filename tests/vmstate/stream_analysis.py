"""A reader of machine-state streams that knows no device: it walks by the JSON at the end, as QEMU's
analyze-migration does.

Written for the tests, without a line of `stillframe.vmstate`: what it can read, others can read.
"""

import json
import struct
from typing import Any


class Walk:
    """The whole of a stream. `memory` holds each block's bytes, `sections` the fields by idstr and
    instance."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.json = self._find_description()
        self.memory: dict[str, bytearray] = {}
        self.sections: dict[tuple[str, int], dict[str, Any]] = {}
        self.machine = ""
        self.commands: list[int] = []
        self._block = ""
        self._names: dict[int, str] = {}
        self._walk()

    def _find_description(self) -> dict[str, Any]:
        tail_at = max(0, len(self.data) - (10 << 20))
        tail = self.data[tail_at:]
        begin = tail.index(b"{", tail.rindex(b"\0"))
        kind, length = struct.unpack_from(">BI", tail, begin - 5)
        assert kind == 6
        found: dict[str, Any] = json.loads(tail[begin : begin + length])
        return found

    def _unpack(self, form: str) -> Any:
        values = struct.unpack_from(">" + form, self.data, self.at)
        self.at += struct.calcsize(">" + form)
        return values[0] if len(values) == 1 else values

    def _bytes(self, length: int) -> bytes:
        taken = self.data[self.at : self.at + length]
        assert len(taken) == length
        self.at += length
        return taken

    def _string(self) -> str:
        return self._bytes(self._unpack("B")).decode()

    def _walk(self) -> None:
        assert self._unpack("II") == (0x5145564D, 3)
        described = {(d["name"], d["instance_id"]): d for d in self.json["devices"]}
        while kind := self._unpack("B"):
            if kind == 7:
                self.machine = self._bytes(self._unpack("I")).decode()
            elif kind in (1, 4):
                number, name = self._unpack("I"), self._string()
                instance, version = self._unpack("II")
                self._names[number] = name
                if name == "ram":
                    self._ram()
                else:
                    device = described[name, instance]
                    assert device["version"] == version
                    self.sections[name, instance] = self._fields(device["fields"])
                assert self._unpack("BI") == (0x7E, number)
            elif kind in (2, 3):
                number = self._unpack("I")
                assert self._names[number] == "ram"
                self._ram()
                assert self._unpack("BI") == (0x7E, number)
            elif kind == 8:
                command, length = self._unpack("HH")
                self.commands.append(command)
                assert length == 0
            else:
                raise AssertionError(f"section type {kind:#x}")

    def _ram(self) -> None:
        while True:
            word = self._unpack("Q")
            flags, address = word & 0xFFF, word & ~0xFFF
            if flags & 0x10:
                return
            if flags & 0x04:
                while address:
                    name, length = self._string(), self._unpack("Q")
                    self.memory[name] = bytearray(length)
                    address -= length
                continue
            if not flags & 0x20:
                self._block = self._string()
            block = self.memory[self._block]
            if flags & 0x08:
                block[address : address + 4096] = self._bytes(4096)
            else:
                assert flags & 0x02
                block[address : address + 4096] = self._bytes(1) * 4096

    def _fields(self, fields: list[dict[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for field in fields:
            values = [self._bytes(field["size"]) for _ in range(field.get("array_len", 1))]
            if field["type"] not in ("buffer", "unused_buffer"):
                signed = field["type"].startswith("int")
                numbers = [int.from_bytes(value, "big", signed=signed) for value in values]
                found[field["name"]] = tuple(numbers) if "array_len" in field else numbers[0]
            else:
                found[field["name"]] = values[0]
        return found
