"""The part of Unicorn's C interface that the engine uses, typed; public functions only (unicorn.h of 2.1).

The Python binding is passed by: its wrappers cost as much as what they wrap, and a hook must be able to be a native function.
"""

import ctypes
from collections.abc import Callable
from ctypes import CFUNCTYPE, byref, c_bool, c_int, c_int64, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any

from unicorn import riscv_const, unicorn_const
from unicorn.unicorn_py3.unicorn import uclib

from stillframe.errors import Failed

TrapCallback = CFUNCTYPE(None, c_void_p, c_uint32, c_void_p)
AccessCallback = CFUNCTYPE(c_bool, c_void_p, c_int, c_uint64, c_int, c_int64, c_void_p)
InvalidCallback = CFUNCTYPE(c_bool, c_void_p, c_void_p)
ReadCallback = CFUNCTYPE(c_uint64, c_void_p, c_uint64, c_uint, c_void_p)
WriteCallback = CFUNCTYPE(None, c_void_p, c_uint64, c_uint, c_uint64, c_void_p)

HOOK_TRAP: int = unicorn_const.UC_HOOK_INTR
HOOK_CODE: int = unicorn_const.UC_HOOK_CODE
HOOK_BLOCK: int = unicorn_const.UC_HOOK_BLOCK
HOOK_STORE_UNMAPPED: int = unicorn_const.UC_HOOK_MEM_WRITE_UNMAPPED
HOOK_INVALID: int = unicorn_const.UC_HOOK_INSN_INVALID

OK: int = unicorn_const.UC_ERR_OK
UNMAPPED_CAUSES: dict[int, int] = {
    unicorn_const.UC_ERR_READ_UNMAPPED: 5,
    unicorn_const.UC_ERR_WRITE_UNMAPPED: 7,
    unicorn_const.UC_ERR_FETCH_UNMAPPED: 1,
}
"""What an access to nothing ends `start` with, and the cause of the trap that it should have been."""
EXCEPTION: int = unicorn_const.UC_ERR_EXCEPTION

X0: int = riscv_const.UC_RISCV_REG_X0
PC: int = riscv_const.UC_RISCV_REG_PC
PRIV: int = riscv_const.UC_RISCV_REG_PRIV


def register(name: str) -> int:
    """Unicorn's number of a register or CSR, as "MSTATUS"."""
    number: int = getattr(riscv_const, f"UC_RISCV_REG_{name}")
    return number


def _bind(library: ctypes.CDLL, name: str, *arguments: Any) -> Callable[..., int]:
    function = library[name]
    function.argtypes = arguments
    function.restype = c_int
    return function


class Library:
    """The functions. `path` is where the wheel keeps its library."""

    def __init__(self) -> None:
        self.path: str = uclib._name
        library = ctypes.CDLL(self.path)
        self.open = _bind(library, "uc_open", c_int, c_int, c_void_p)
        self.close = _bind(library, "uc_close", c_void_p)
        self.emu_start = _bind(library, "uc_emu_start", c_void_p, c_uint64, c_uint64, c_uint64, c_size_t)
        self.emu_stop = _bind(library, "uc_emu_stop", c_void_p)
        self.reg_read = _bind(library, "uc_reg_read", c_void_p, c_int, c_void_p)
        self.reg_write = _bind(library, "uc_reg_write", c_void_p, c_int, c_void_p)
        self.mem_map_ptr = _bind(library, "uc_mem_map_ptr", c_void_p, c_uint64, c_size_t, c_uint32, c_void_p)
        self.vmem_read = _bind(library, "uc_vmem_read", c_void_p, c_uint64, c_int, c_void_p, c_size_t)
        self.mmio_map = _bind(
            library, "uc_mmio_map", c_void_p, c_uint64, c_size_t, c_void_p, c_void_p, c_void_p, c_void_p
        )
        self.hook_add = library["uc_hook_add"]
        self.hook_add.argtypes = (c_void_p, c_void_p, c_int, c_void_p, c_void_p, c_uint64, c_uint64)
        self.hook_add.restype = c_int
        self.ctl = library["uc_ctl"]
        self.ctl.argtypes = (c_void_p, c_int)
        self.ctl.restype = c_int
        self.context_size = _bind(library, "uc_context_size", c_void_p)
        self.context_alloc = _bind(library, "uc_context_alloc", c_void_p, c_void_p)
        self.context_save = _bind(library, "uc_context_save", c_void_p, c_void_p)
        self.context_restore = _bind(library, "uc_context_restore", c_void_p, c_void_p)
        self.context_free = _bind(library, "uc_context_free", c_void_p)
        strerror = library["uc_strerror"]
        strerror.argtypes = (c_int,)
        strerror.restype = ctypes.c_char_p
        self._strerror = strerror

    def describe(self, error: int) -> str:
        """Unicorn's words for an error number."""
        text: bytes | None = self._strerror(error)
        return (text or b"unknown error").decode()


_library: Library | None = None


def library() -> Library:
    """Loaded once a process."""
    global _library
    if _library is None:
        _library = Library()
    return _library


class Processor:
    """One `uc_engine`: an RV64GC hart in M mode with nothing mapped.

    :raise Failed: when the library refuses.
    """

    def __init__(self) -> None:
        self.library = library()
        pointer = c_void_p()
        self._check(
            "open",
            self.library.open(unicorn_const.UC_ARCH_RISCV, unicorn_const.UC_MODE_RISCV64, byref(pointer)),
        )
        self.handle: int = pointer.value or 0
        self._kept: list[object] = []
        self._context = c_void_p()
        self._check("allocate a context", self.library.context_alloc(self.handle, byref(self._context)))
        self.context_size: int = self.library.context_size(self.handle)
        self._value = c_uint64()
        self._at_value = ctypes.addressof(self._value)
        self._control(unicorn_const.UC_CTL_UC_USE_EXITS, c_int(1))

    def _check(self, doing: str, error: int) -> None:
        if error != OK:
            raise Failed(f"Unicorn could not {doing}: {self.library.describe(error)}")

    def _control(self, request: int, *arguments: object) -> None:
        code = unicorn_const.UC_CTL_IO_WRITE << 30 | len(arguments) << 26 | request
        self._check("carry out a control request", self.library.ctl(self.handle, code, *arguments))

    def start(self, pc: int, count: int) -> int:
        """Run from `pc`; the error number. `count` bounds the instructions, or what else the count hook sees; 0: no bound."""
        return self.library.emu_start(self.handle, pc, 0, 0, count)

    def stop(self) -> None:
        """From inside a callback of `start`, on the same thread: end it at the next check."""
        self.library.emu_stop(self.handle)

    def read(self, number: int) -> int:
        """A register. CSRs above the present privilege read as garbage."""
        self.library.reg_read(self.handle, number, self._at_value)
        return self._value.value

    def write(self, number: int, value: int) -> None:
        """A register. CSRs above the present privilege are left alone; PRIV drops the load reservation."""
        self._value.value = value
        self.library.reg_write(self.handle, number, self._at_value)

    def fetch(self, pc: int) -> int:
        """The instruction at a virtual address, as the present privilege sees it; 0 where there is none."""
        self._value.value = 0
        read = self.library.vmem_read
        if read(self.handle, pc, unicorn_const.UC_PROT_EXEC, self._at_value, 2) != OK:
            return 0
        low = self._value.value
        if low & 3 != 3:
            return low
        self._value.value = 0
        if read(self.handle, pc + 2, unicorn_const.UC_PROT_EXEC, self._at_value, 2) != OK:
            return 0
        return low | self._value.value << 16

    def map_memory(self, base: int, size: int, host_address: int) -> None:
        """Memory of the caller at a guest-physical address, for everything."""
        error = self.library.mem_map_ptr(self.handle, base, size, unicorn_const.UC_PROT_ALL, host_address)
        self._check(f"map {size} bytes of memory at {base:#x}", error)

    def map_device(self, base: int, size: int, read: Callable[..., int], write: Callable[..., None]) -> None:
        """Callbacks `read(handle, offset, size, user)` and `write(handle, offset, size, value, user)` for a range."""
        callbacks = ReadCallback(read), WriteCallback(write)
        self._kept.append(callbacks)
        at_read, at_write = (ctypes.cast(callback, c_void_p) for callback in callbacks)
        error = self.library.mmio_map(self.handle, base, size, at_read, None, at_write, None)
        self._check(f"map a device at {base:#x}", error)

    def add_hook(self, kind: int, callback: object, begin: int = 1, end: int = 0) -> int:
        """A hook for the addresses from `begin` to `end`, for all if that is less; its handle.

        :param callback: one of this module's callback types, or the address of a native function.
        """
        self._kept.append(callback)
        address = c_void_p(callback) if isinstance(callback, int) else ctypes.cast(callback, c_void_p)  # type: ignore[arg-type]
        hook = c_size_t()
        self._check(
            "add a hook", self.library.hook_add(self.handle, byref(hook), kind, address, None, begin, end)
        )
        return hook.value

    def forget_code(self, start: int, end: int) -> None:
        """Drop translations of code at these addresses, as the present privilege sees them; physical in M mode."""
        self._control(unicorn_const.UC_CTL_TB_REMOVE_CACHE, c_uint64(start), c_uint64(end))

    def forget_everything(self) -> None:
        """Drop all translations, of code and of addresses."""
        self._control(unicorn_const.UC_CTL_TLB_FLUSH)
        self._control(unicorn_const.UC_CTL_TB_FLUSH)

    def context(self) -> bytes:
        """What `uc_context_save` keeps."""
        self._check("save its context", self.library.context_save(self.handle, self._context))
        return ctypes.string_at(self._context.value or 0, self.context_size)

    def set_context(self, offset: int, content: bytes) -> None:
        """Replace what lies from `offset` on in the processor's context."""
        self._check("save its context", self.library.context_save(self.handle, self._context))
        ctypes.memmove((self._context.value or 0) + offset, content, len(content))
        self._check("restore its context", self.library.context_restore(self.handle, self._context))

    def close(self) -> None:
        """Free it; twice is allowed."""
        if self.handle:
            self.library.context_free(self._context)
            self.library.close(self.handle)
            self.handle = 0
