"""QEMU's way of writing options, and its words for those that are wrong.

-m 1G  --m 1G          one dash or two
virt,accel=tcg         a value, then keys; the first may leave its name out
a,,b                   a comma inside a value
server  noserver       a key alone is "on", with "no" before it "off"
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stillframe.errors import InvalidRequest

_SUFFIXES = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_SIZE = re.compile(r"(\d+)(?:(\.\d+)?)([bkmgtpe]?)", re.IGNORECASE)
_ON, _OFF = ("on", "yes", "true", "y"), ("off", "no", "false", "n")


class BadOption(InvalidRequest):
    """What QEMU says of an option that is wrong, option included; more lines may follow."""


@dataclass(frozen=True, slots=True)
class Option:
    """An option as it was given.

    :param name: without its dashes; "" for a word that is no option: a disk image.
    :param value: what followed; "" for an option that takes nothing.
    """

    name: str
    value: str

    @property
    def text(self) -> str:
        """As it is shown in errors."""
        return " ".join(part for part in (self.name and f"-{self.name}", self.value) if part)

    def refused(self, why: str) -> BadOption:
        """The error to raise: "-m abc: why"."""
        return BadOption(f"{self.text}: {why}")


def split_words(words: Sequence[str], takes: Mapping[str, bool]) -> tuple[Option, ...]:
    """The options of a command line, in order.

    :param takes: every option there is, and whether a value follows it.
    :raise BadOption: one that there is not, or without its value. A word that is no option is a disk image, the option "".
    """
    found, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-") or word == "-":
            found.append(Option("", word))
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        if name not in takes:
            raise BadOption(f"{word}: invalid option")
        if not takes[name]:
            found.append(Option(name, ""))
        elif rest:
            found.append(Option(name, rest.pop(0)))
        else:
            raise BadOption(f"{word}: requires an argument")
    return tuple(found)


def split_commas(text: str) -> list[str]:
    """The parts between single commas; two of them are one comma of a value."""
    return [part.replace("\0", ",") for part in text.replace(",,", "\0").split(",")]


def key_values(option: Option, first: str | None = None) -> dict[str, str]:
    """The keys of an option's value.

    :param first: the key whose name may be left out in the first place.
    :raise BadOption: the first has no name, and may not leave it out.
    """
    found: dict[str, str] = {}
    for position, part in enumerate(split_commas(option.value)):
        key, equals, value = part.partition("=")
        if not equals:
            if position == 0 and first is not None:
                key, value = first, part
            elif part.startswith("no"):
                key, value = part[2:], "off"
            else:
                value = "on"
        found[key] = value
    return found


def switch(option: Option, key: str, value: str) -> bool:
    """:raise BadOption: neither on nor off."""
    if value in _ON:
        return True
    if value in _OFF:
        return False
    raise option.refused(f"Parameter '{key}' expects 'on' or 'off'")


def size(option: Option, key: str, value: str, *, unit: str = "m") -> int:
    """Bytes. :param unit: the suffix of a number that has none. :raise BadOption: no size."""
    found = _SIZE.fullmatch(value)
    if not found:
        raise option.refused(
            f"Parameter '{key}' expects a non-negative number below 2^64\n"
            "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
            "and exabytes, respectively."
        )
    shift = _SUFFIXES[(found[3] or unit).lower()]
    whole = int(found[1]) << shift
    return whole + int(float(found[2]) * (1 << shift)) if found[2] else whole
