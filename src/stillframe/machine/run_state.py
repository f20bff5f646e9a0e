"""What a machine is doing, in QEMU's words."""

from enum import StrEnum


class RunState(StrEnum):
    """The run states of QEMU's `RunState` that a machine of ours can be in."""

    PRELAUNCH = "prelaunch"
    RUNNING = "running"
    PAUSED = "paused"
    SAVE_VM = "save-vm"
    RESTORE_VM = "restore-vm"
    IO_ERROR = "io-error"
    SHUTDOWN = "shutdown"
    INTERNAL_ERROR = "internal-error"
    SUSPENDED = "suspended"
    WATCHDOG = "watchdog"
    GUEST_PANICKED = "guest-panicked"
    DEBUG = "debug"

    @property
    def needs_reset(self) -> bool:
        """The guest cannot go on from here; only `system_reset` (or a load) makes it runnable again."""
        return self in (RunState.SHUTDOWN, RunState.INTERNAL_ERROR)
