"""Kernels, firmware and initial ramdisks: what kind of file it is, and where it goes in RAM.

kernel    a RISC-V Image (header of Documentation/arch/riscv/boot-image-header.rst), plain or gzip, or an ELF
firmware  an ELF, or raw bytes for the start of RAM
top of RAM, downwards: device tree, initial ramdisk
"""

import gzip
import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillframe.errors import InvalidRequest, LimitReached, NotFound, Unsupported, io_failed

_IMAGE_MAGIC = b"RSC\x05"
_OTHER_IMAGES = {b"ARM\x64": "arm64"}
_GZIP = b"\x1f\x8b"
_ELF = b"\x7fELF"
_X86_SETUP = (0x202, b"HdrS")
_HEADER_LENGTH = 64
_ALIGN = 2 << 20
_UNPACKED_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True)
class Blob:
    """Bytes for RAM. :param address: guest-physical."""

    address: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Program:
    """What is started. :param entry: guest-physical. :param end: the first address that it does not use."""

    blobs: tuple[Blob, ...]
    entry: int
    end: int


def _read(path: Path, what: str, limit: int) -> bytes:
    try:
        if path.is_dir():
            raise InvalidRequest(f"The {what} '{path}' is a directory")
        size = path.stat().st_size
        if size > limit:
            raise LimitReached(
                f"The {what} '{path}' has {size} bytes, which {limit >> 20} MiB of memory cannot hold",
                remedy="Give the machine more memory (--memory).",
            )
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"The {what} '{path}' does not exist") from error
    except OSError as error:
        raise io_failed(f"Could not read the {what} '{path}'", error) from error
    if not data:
        raise InvalidRequest(f"The {what} '{path}' is empty")
    return data


def _unpack(path: Path, data: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as stream:
            return stream.read(_UNPACKED_LIMIT)
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidRequest(f"The kernel '{path}' is a damaged gzip file: {error}") from error


def load_kernel(path: Path, ram_base: int, ram_size: int) -> Program:
    """:raise NotFound: :raise IOFailed: :raise InvalidRequest: no kernel. :raise Unsupported: one for another machine.

    :raise LimitReached: more than the memory holds.
    """
    data = _read(path, "kernel", ram_size)
    if data.startswith(_GZIP):
        data = _unpack(path, data)
    if data.startswith(_ELF):
        return _load_elf(path, "kernel", data, ram_base, ram_size)
    at, magic = _X86_SETUP
    if data[at : at + 4] == magic:
        raise Unsupported(f"The kernel '{path}' is for x86 (a bzImage), not for riscv64")
    if data[56:60] in _OTHER_IMAGES:
        raise Unsupported(f"The kernel '{path}' is for {_OTHER_IMAGES[data[56:60]]}, not for riscv64")
    if len(data) < _HEADER_LENGTH or data[56:60] != _IMAGE_MAGIC:
        raise InvalidRequest(
            f"The kernel '{path}' is neither a RISC-V Image nor an ELF file",
            remedy="Raw firmware is started with --bios.",
        )
    text_offset, image_size = struct.unpack_from("<QQ", data, 8)
    start, end = ram_base + text_offset, ram_base + text_offset + max(image_size, len(data))
    _fits(path, "kernel", start, end, ram_base, ram_size)
    return Program((Blob(start, data),), start, end)


def load_firmware(path: Path, ram_base: int, ram_size: int) -> Program:
    """As `load_kernel`; what is no ELF is taken as it is, to the start of RAM."""
    data = _read(path, "firmware", ram_size)
    if data.startswith(_ELF):
        return _load_elf(path, "firmware", data, ram_base, ram_size)
    return Program((Blob(ram_base, data),), ram_base, ram_base + len(data))


def _fits(path: Path, what: str, start: int, end: int, ram_base: int, ram_size: int) -> None:
    if start < ram_base or end < start:
        raise InvalidRequest(f"The {what} '{path}' wants to be at {start:#x}, where there is no RAM")
    if end > ram_base + ram_size:
        raise LimitReached(
            f"The {what} '{path}' needs memory up to {end - ram_base >> 20} MiB, the machine has {ram_size >> 20} MiB",
            remedy="Give the machine more memory (--memory).",
        )


def _load_elf(path: Path, what: str, data: bytes, ram_base: int, ram_size: int) -> Program:
    from elftools.common.exceptions import ELFError
    from elftools.elf.elffile import ELFFile

    try:
        elf: Any = ELFFile(io.BytesIO(data))
        machine, wide, entry = elf["e_machine"], elf.elfclass == 64, elf["e_entry"]
        segments = [(s.header, s.data()) for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
    except (ELFError, ValueError, UnicodeDecodeError, AttributeError, TypeError) as error:
        raise InvalidRequest(f"The {what} '{path}' is a damaged ELF file: {error}") from error
    if machine != "EM_RISCV" or not wide:
        raise Unsupported(
            f"The {what} '{path}' is for another machine ({machine}, {64 if wide else 32} bits), not for riscv64"
        )
    blobs, start_at, last = [], entry, ram_base
    for header, content in segments:
        address, size = header["p_paddr"], header["p_memsz"]
        if not size:
            continue
        _fits(path, what, address, address + size, ram_base, ram_size)
        blobs.append(Blob(address, content.ljust(size, b"\0")))
        last = max(last, address + size)
        if header["p_vaddr"] <= entry < header["p_vaddr"] + size:
            start_at = entry - header["p_vaddr"] + address
    if not blobs:
        raise InvalidRequest(f"The {what} '{path}' is an ELF file with nothing to load")
    return Program(tuple(blobs), start_at, last)


def read_initrd(path: Path, ram_size: int) -> bytes:
    """:raise NotFound: :raise IOFailed: :raise LimitReached: as `load_kernel`."""
    return _read(path, "initrd", ram_size)


def below(top: int, length: int, floor: int, what: str) -> int:
    """An address for `length` bytes under `top`, and not under `floor`.

    :raise LimitReached: there is no room.
    """
    address = (top - length) & ~(_ALIGN - 1)
    if address < floor:
        raise LimitReached(
            f"The {what} of {length} bytes does not fit into memory beside the kernel",
            remedy="Give the machine more memory (--memory).",
        )
    return address
