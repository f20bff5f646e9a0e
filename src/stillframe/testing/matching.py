"""What a message is to be, where not all of it is known beforehand."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True, slots=True)
class _Any:
    """Stands for every value."""

    def __repr__(self) -> str:
        return "ANY"


ANY: Final = _Any()


@dataclass(frozen=True, slots=True)
class Text:
    """Stands for every string that a pattern describes, wholly."""

    pattern: str


def matches(found: Any, wanted: Any) -> bool:
    """Whether a value is as wanted: an object has the wanted members, and may have more; a list has just these elements."""
    if wanted is ANY:
        return True
    if isinstance(wanted, Text):
        return isinstance(found, str) and re.fullmatch(wanted.pattern, found, re.DOTALL) is not None
    if isinstance(wanted, Mapping):
        return isinstance(found, Mapping) and all(
            name in found and matches(found[name], value) for name, value in wanted.items()
        )
    if isinstance(wanted, list | tuple):
        return (
            isinstance(found, list)
            and len(found) == len(wanted)
            and all(matches(left, right) for left, right in zip(found, wanted, strict=True))
        )
    return bool(found == wanted)


_VARYING = frozenset(
    {
        *("timestamp", "current-progress", "total-progress", "offset", "len", "choices"),
        *("actual-size", "vm-state-size", "icount"),
        *("date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec"),
    }
)


def plain(value: Any, hidden: frozenset[str] = _VARYING) -> Any:
    """A message without times, sizes and progress, so that two runs can be compared.

    :param hidden: the members that vary.
    """
    if isinstance(value, Mapping):
        return {name: plain(member, hidden) for name, member in value.items() if name not in hidden}
    if isinstance(value, list):
        return [plain(member, hidden) for member in value]
    return value
