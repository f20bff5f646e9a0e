"""What is given as kernel, firmware or initrd: started, or refused in one sentence that names it."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from machine.machines import RAM, machine
from machine.rv64 import Program
from stillframe.errors import InvalidRequest, IOFailed, LimitReached, NotFound, StillframeError, Unsupported
from stillframe.machine.loader import load_firmware, load_kernel

SIZE = 8 << 20


def image(code: bytes, *, magic: bytes = b"RSC\x05", offset: int = 0x20_0000, size: int = 0) -> bytes:
    """A kernel Image: the header's first word jumps over it."""
    jump = struct.pack("<II", 0x0400_006F, 0)
    return jump + struct.pack("<QQQIIQQ4sI", offset, size, 0, 2, 0, 0, 0, magic, 0) + code


def elf(
    code: bytes, *, machine: int = 243, bits: int = 2, address: int = RAM + 0x1000, size: int = 0
) -> bytes:
    ident = b"\x7fELF" + bytes((bits, 1, 1)) + bytes(9)
    if bits == 1:
        return ident + struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, 0, 52, 0, 0, 52, 32, 0, 0, 0, 0)
    header = struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, address, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 7, 120, address, address, len(code), size or len(code), 4096)
    return ident + header + segment + code


def says_hello() -> bytes:
    p = Program()
    for character in "hello":
        p.li("a0", ord(character))
        p.sbi(0x4442434E, 2)
    p.shut_down()
    return p.assemble()


@pytest.mark.parametrize("wrap", [image, elf, lambda code: gzip.compress(image(code))])
def test_kernel_of_every_form_runs(wrap: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(wrap(says_hello()))
    with machine(tmp_path, None, kernel=path) as (built, console, _):
        built.start()
        assert built.wait(20) is not None
        assert bytes(console.output) == b"hello"


def test_firmware_runs_with_the_kernel_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "kernel"
    path.write_bytes(image(says_hello()))
    p = Program()
    p.li("t0", RAM + 0x20_0000)
    p.word(0x0002_8067)  # jr t0
    with machine(tmp_path, p, kernel=path) as (built, console, _):
        built.start()
        assert built.wait(20) is not None
        assert bytes(console.output) == b"hello"


WRONG: dict[str, tuple[bytes, type[StillframeError], str]] = {
    "x86 kernel": (bytes(0x202) + b"HdrS" + bytes(512), Unsupported, "x86"),
    "arm64 kernel": (image(b"", magic=b"ARM\x64"), Unsupported, "arm64"),
    "x86 ELF": (elf(b"x", machine=62), Unsupported, "EM_X86_64"),
    "32-bit ELF": (elf(b"x", bits=1), Unsupported, "32 bits"),
    "text": (b"just some text\n" * 20, InvalidRequest, "neither"),
    "empty": (b"", InvalidRequest, "empty"),
    "truncated ELF": (elf(b"x" * 64)[:70], InvalidRequest, "damaged|nothing"),
    "truncated gzip": (gzip.compress(image(b"x" * 1000))[:40], InvalidRequest, "gzip"),
    "too large an image": (image(b"", size=1 << 30), LimitReached, "memory"),
    "image at the end of everything": (image(b"", offset=(1 << 64) - RAM - 8), StillframeError, "memory|RAM"),
    "ELF outside of RAM": (elf(b"x", address=0x1000), InvalidRequest, "no RAM"),
    "ELF of enormous size": (elf(b"x", size=1 << 62), LimitReached, "memory"),
}


@pytest.mark.parametrize("name", WRONG)
def test_file_that_is_no_kernel_for_this_machine_is_named(name: str, tmp_path: Path) -> None:
    content, error, words = WRONG[name]
    path = tmp_path / "given-kernel"
    path.write_bytes(content)
    with pytest.raises(error, match=words) as caught:
        load_kernel(path, RAM, SIZE)
    assert "given-kernel" in str(caught.value)


def test_missing_file_directory_and_too_large_a_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no-kernel"):
        load_kernel(tmp_path / "no-kernel", RAM, SIZE)
    with pytest.raises(InvalidRequest, match="directory"):
        load_firmware(tmp_path, RAM, SIZE)
    big = tmp_path / "big"
    with big.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(LimitReached, match="8 MiB of memory"):
        load_firmware(big, RAM, SIZE)
    with pytest.raises((IOFailed, NotFound)):
        load_kernel(tmp_path / "big" / "below-a-file", RAM, SIZE)


def test_initrd_without_room_is_refused(tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "kernel", tmp_path / "initrd"
    kernel.write_bytes(image(b"", size=4 << 20))
    initrd.write_bytes(bytes(4 << 20))
    with pytest.raises(LimitReached, match="initrd"):
        with machine(tmp_path, None, kernel=kernel, initrd=initrd):
            pass
