"""The bytes of the machine-state stream: QEMU's migration format, version 3, as savevm writes it. Big-endian
throughout.

    51 45 56 4d  u32 3                                        header
    07  u32 n  machine name[n]                                CONFIGURATION; its subsections may follow
    01  section  payload  footer                              START: of RAM, the list of its blocks
    02  u32 section_id  payload  footer                       PART, any number: page records
    03  u32 section_id  payload  footer                       END: the last page records
    04  section  payload  footer                              FULL, one a device: its fields
    00                                                        EOF
    06  u32 n  JSON[n]                                        VMDESCRIPTION

    section     u32 section_id, u8 n, idstr[n], u32 instance_id, u32 version_id
    footer      7e  u32 section_id
    subsection  05  u8 n  name[n]  u32 version_id  fields     in a payload, after its fields; we write none

A section's id is any number that no other section of the stream has; what it is for is said by idstr and
instance_id. But a QEMU that loads one stream after another remembers the ids of the first: a PART whose id
some device had there goes to that device. So ours are none that QEMU gives. A payload has no length of its
own: only who knows its fields (fields.py), or RAM's records (ram.py), finds the footer.

COMMAND, `08 u16 command, u16 n, bytes[n]`, stands between sections. We never write one, since QEMU 7.2
refuses the only one of a savevm stream, 11 with n = 0, which QEMU writes from 9.0 on before RAM's END and
which is skipped here.
"""

import struct

MAGIC = 0x5145564D
VERSION = 3
OBSOLETE_VERSION = 2

EOF = 0x00
START = 0x01
PART = 0x02
END = 0x03
FULL = 0x04
SUBSECTION = 0x05
DESCRIPTION = 0x06
CONFIGURATION = 0x07
COMMAND = 0x08
FOOTER = 0x7E

SWITCHOVER_START = 11
"""The one command of a savevm stream; it has no argument and means nothing where memory is not sent over a
wire."""

RAM_NAME = "ram"
RAM_VERSION = 4

_HEADER = struct.Struct(">II")
_SECTION_IDS = struct.Struct(">II")
_MARK = struct.Struct(">BI")


def header(machine: str) -> bytes:
    """The beginning of a stream, CONFIGURATION included.

    :param machine: the board's name.
    """
    name = machine.encode()
    return _HEADER.pack(MAGIC, VERSION) + _MARK.pack(CONFIGURATION, len(name)) + name


def section_head(kind: int, section_id: int, name: str, instance_id: int, version: int) -> bytes:
    """The beginning of a START or FULL section. :raise ValueError: a name of more than 255 bytes; a defect of
    the device's code."""
    idstr = name.encode()
    return (
        _MARK.pack(kind, section_id) + bytes((len(idstr),)) + idstr + _SECTION_IDS.pack(instance_id, version)
    )


def mark(kind: int, number: int) -> bytes:
    """PART, END, FOOTER or DESCRIPTION: the kind and one number, an id or a length."""
    return _MARK.pack(kind, number)
