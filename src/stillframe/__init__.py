"""stillframe: snapshots of whole virtual machines, in QEMU's words, on ordinary qcow2 files."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stillframe.client import Client as Client
    from stillframe.client import connect as connect

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # The client brings asyncio and qemu.qmp along, which `stillframe image` has no use for.
    if name in ("Client", "connect"):
        from stillframe import client

        return getattr(client, name)
    raise AttributeError(f"module 'stillframe' has no attribute '{name}'")
