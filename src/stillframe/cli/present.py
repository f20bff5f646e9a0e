"""How things look on the terminal: tables, JSON and errors, the same in every command; and sizes, read."""

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from stillframe.errors import StillframeError
from stillframe.text import printable

_SUFFIXES = {
    "": 1,
    "b": 1,
    "k": 1 << 10,
    "m": 1 << 20,
    "g": 1 << 30,
    "t": 1 << 40,
    "p": 1 << 50,
    "e": 1 << 60,
}


def parse_size(text: str) -> int:
    """Bytes from a number with a suffix: "10G", "1.5K", "0x200".

    :raise ValueError: it is none.
    """
    digits = text.strip().lower()
    suffix = digits[-1:] if digits[-1:] in _SUFFIXES and not digits.startswith("0x") else ""
    number = digits.removesuffix(suffix) if suffix else digits
    scale = _SUFFIXES[suffix]
    if "." in number:
        whole, fraction = number.split(".", 1)
        if not (whole + fraction).isascii() or not (whole + fraction).isdigit():
            raise ValueError(f"'{text}' is not a size")
        return int(whole or "0") * scale + int(fraction or "0") * scale // int("1" + "0" * len(fraction))
    if not number.isascii() or "_" in number or number.startswith(("+", "-")):
        raise ValueError(f"'{text}' is not a size")
    return int(number, 16 if number.startswith("0x") else 10) * scale


def read_size(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
    """A callback of click's for sizes with a suffix."""
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError:
        raise click.BadParameter(
            f"'{text}' is not a size. You may use k, M, G, T, P or E suffixes for kilobytes, megabytes, "
            "gigabytes, terabytes, petabytes and exabytes."
        ) from None


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under a heading, columns aligned on the left, without a newline at the end."""
    lines = [[printable(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def print_json(value: Any) -> None:
    """For programs, on standard output."""
    print(json.dumps(value, indent=4))


def print_error(error: StillframeError) -> None:
    """What happened, what was left behind, and what to do, on standard error."""
    lines = [f"stillframe: {printable(error.message)}"]
    lines += [f"  {printable(text)}" for text in (error.left, error.remedy) if text]
    print("\n".join(lines), file=sys.stderr)
