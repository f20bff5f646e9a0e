"""The sections that a stream is made of besides RAM: a device's, and `globalstate`, which no device has."""

from collections.abc import Mapping
from dataclasses import dataclass

from stillframe.vmstate.fields import Description, Field, Value, Values

SectionKey = tuple[str, int]
"""idstr and instance id: what tells a section from all others."""


@dataclass(frozen=True, slots=True)
class SectionState:
    """What a section to be written holds: a device's state, taken at the pause."""

    name: str
    instance_id: int
    description: Description
    values: Values


@dataclass(frozen=True, slots=True)
class SurveyedSection:
    """A section as it was found in a stream.

    :param offset: of its first byte in the stream. :param version: that it was written in.
    """

    name: str
    instance_id: int
    version: int
    offset: int
    values: Mapping[str, Value]


_RUN_STATE_BYTES = 32

GLOBAL_STATE = Description(
    "globalstate",
    version=1,
    fields=(
        Field("size", "uint32"),
        Field("runstate", "buffer", count=_RUN_STATE_BYTES),
        Field("has_vm_was_suspended", "uint8"),
        Field("vm_was_suspended", "uint8"),
        Field("unused", "buffer", count=66),
    ),
)
"""What the guest was doing at the save, as QEMU writes it. A load reads it and does not obey it: the machine
goes on as it did."""

GLOBAL_STATE_KEY: SectionKey = (GLOBAL_STATE.name, 0)


def global_state(run_state: str) -> SectionState:
    """The last section of every stream. :param run_state: QEMU's word, at most 31 bytes."""
    text = run_state.encode()
    values: dict[str, Value] = {
        "size": len(text) + 1,
        "runstate": text.ljust(_RUN_STATE_BYTES, b"\0"),
        "has_vm_was_suspended": 1,
        "vm_was_suspended": 0,
        "unused": bytes(66),
    }
    return SectionState(GLOBAL_STATE.name, 0, GLOBAL_STATE, values)


def saved_run_state(section: SurveyedSection) -> str:
    """The run state that a `globalstate` names; what is not text in it is replaced."""
    data = section.values["runstate"]
    return data.split(b"\0", 1)[0].decode(errors="replace") if isinstance(data, bytes) else ""
