"""The C library, for the calls that Python has no name for."""

import ctypes
import os
from typing import Final

LIBC: Final = ctypes.CDLL(None, use_errno=True)
"""Looked up once: that takes longer than most calls, and some are made while a guest stands still."""


def last_error() -> OSError:
    """Of this thread's last call into `LIBC`."""
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))
