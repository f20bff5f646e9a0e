"""How sizes, dates and clocks are written, as QEMU writes them; and what a terminal may be shown."""

from datetime import datetime

_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def format_size(size: int) -> str:
    """Bytes with three digits and a binary unit: "0 B", "855 KiB", "3.96 MiB"."""
    unit = 0
    while unit < len(_UNITS) - 1 and size >= 1000 << (10 * unit):
        unit += 1
    return f"{size / (1 << (10 * unit)):.3g} {_UNITS[unit]}B"


def format_date(seconds: int) -> str:
    """A moment since the epoch, in local time: "2026-11-22 18:51:59"."""
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def format_clock(nanoseconds: int) -> str:
    """A guest's clock: "0000:00:00.729"."""
    milliseconds = nanoseconds // 1_000_000
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:04d}:{minutes:02d}:{seconds:02d}.{milliseconds:03d}"


def printable(text: str) -> str:
    """Text from an image or a peer, with what could steer a terminal written as escapes."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
