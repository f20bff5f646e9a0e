"""What every device of a machine has: a section of the machine state, and four moments of the machine's life.

A device is touched by one thread at a time: the vCPU's, inside the guest's access or at a boundary, or whoever owns the stopped
machine. Work of other threads reaches it through the machine's mailbox.
"""

from abc import ABC, abstractmethod

from stillframe.errors import StateMismatch
from stillframe.vmstate.fields import Description, Value, Values


class Device(ABC):
    """A device with a section of its own; see `vmstate.fields.StateDevice` for the meaning of its members."""

    section_name: str
    instance_id: int = 0
    description: Description

    @abstractmethod
    def save_state(self) -> Values:
        """The state, one value a field."""

    @abstractmethod
    def check_state(self, values: Values) -> None:
        """Refuse values that cannot be taken. :raise StateMismatch: naming section and field."""

    @abstractmethod
    def load_state(self, values: Values) -> None:
        """Take checked values over."""

    def reset(self) -> None:  # noqa: B027 - most devices have nothing to do at most moments
        """As after power-on."""

    def drain(self) -> None:  # noqa: B027
        """Return when no request is in flight. The guest stands still, so none can come."""

    def resumed(self) -> None:  # noqa: B027
        """The guest is about to run: do again what was parked."""

    def close(self) -> None:  # noqa: B027
        """End threads and sockets; the machine is no longer run."""

    def refuse(self, field: str, why: str) -> StateMismatch:
        """The error for a field of a saved state that this device cannot take; for `check_state` to raise."""
        return StateMismatch(
            f"The state of device '{self.section_name}' does not fit: field '{field}' {why}",
            section=self.section_name,
            field=field,
        )

    def integer(self, values: Values, field: str, *, maximum: int = (1 << 64) - 1, minimum: int = 0) -> int:
        """One integer field. :raise StateMismatch: it is none, or outside of the bounds."""
        value = values.get(field)
        if not isinstance(value, int):
            raise self.refuse(field, "is not a number")
        if not minimum <= value <= maximum:
            raise self.refuse(field, f"is {value:#x}, not within {minimum:#x} to {maximum:#x}")
        return int(value)

    def integers(
        self, values: Values, field: str, count: int | None = None, *, maximum: int = (1 << 64) - 1
    ) -> tuple[int, ...]:
        """An array of integers. :raise StateMismatch: as `integer`, or another count than expected."""
        value = values.get(field)
        if isinstance(value, int):
            value = (value,)
        if not isinstance(value, tuple):
            raise self.refuse(field, "is not an array of numbers")
        if count is not None and len(value) != count:
            raise self.refuse(field, f"has {len(value)} elements instead of {count}")
        if any(not 0 <= element <= maximum for element in value):
            raise self.refuse(field, f"has an element above {maximum:#x}")
        return value

    def buffer(self, values: Values, field: str, length: int | None = None) -> bytes:
        """A field of bytes. :raise StateMismatch: it is none, or of another length."""
        value: Value | None = values.get(field)
        if not isinstance(value, bytes):
            raise self.refuse(field, "is not a run of bytes")
        if length is not None and len(value) != length:
            raise self.refuse(field, f"has {len(value)} bytes instead of {length}")
        return value
