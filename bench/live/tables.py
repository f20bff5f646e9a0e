"""A line of a table of ours beside QEMU's, the bars that it is held to, and how it is shown and written."""

import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from peers import peer


@dataclass(slots=True)
class Row:
    """One line of the table; figures are one a round.

    :param unit: "ms", "MB" or "×". :param bar: in words: `limit` or `least`. :param normal: ours without a snapshot.
    :param limit: what ours may be at most. :param least: what ours must be at least.
    """

    work: str
    unit: str
    bar: str = ""
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    normal: list[float] = field(default_factory=list)
    limit: "Callable[[Row], float] | None" = None
    least: "Callable[[Row], float] | None" = None

    @property
    def is_met(self) -> bool | None:
        """Whether the median is; None without a bar."""
        ours = statistics.median(self.ours)
        if self.least is not None:
            return ours >= self.least(self)
        return None if self.limit is None else ours <= self.limit(self)

    @property
    def ratio(self) -> float | None:
        """Ours to theirs, by medians."""
        return statistics.median(self.ours) / statistics.median(self.theirs) if self.theirs else None


def share_of_theirs(factor: float) -> Callable[[Row], float]:
    """A bar: so much of QEMU's."""
    return lambda row: factor * statistics.median(row.theirs)


def gap_limit(row: Row) -> float:
    """A limit: the larger of 20 ms over normal and 1/50 of QEMU's."""
    return max(20.0 + statistics.median(row.normal), statistics.median(row.theirs) / 50)


def at_most(value: float) -> Callable[[Row], float]:
    """A bar: a figure of its own."""
    return lambda row: value


at_least = at_most


def show(title: str, rows: list[Row]) -> None:
    """The table."""
    table = Table(title=title)
    for column in ("work", "ours", "normal", "QEMU", "ours / QEMU", "bar"):
        table.add_column(column, justify="left" if column in ("work", "bar") else "right")
    for row in rows:
        cells = [f"{statistics.median(row.ours):,.2f} {row.unit}" if row.ours else "-"]
        cells += [
            f"{statistics.median(each):,.1f} {row.unit}" if each else "" for each in (row.normal, row.theirs)
        ]
        verdict = {None: "", True: ": met", False: ": MISSED"}[row.is_met]
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        table.add_row(row.work, *cells, ratio, row.bar + verdict)
    Console(width=170 if not sys.stdout.isatty() else None).print(table)


def report(rows: list[Row], rounds: int, program: str, version: str = "host") -> dict[str, object]:
    """For --json. :param program: QEMU's, whose version is told."""
    said = subprocess.run([peer(program, version), "--version"], capture_output=True, text=True, check=True)
    lines = [
        {
            "work": row.work,
            "unit": row.unit,
            "bar": row.bar,
            "ours": row.ours,
            "theirs": row.theirs,
            "normal": row.normal,
            "ratio": row.ratio,
            "met": row.is_met,
        }
        for row in rows
    ]
    host = {"machine": platform.machine(), "cores": os.cpu_count(), "load": os.getloadavg()}
    return {"host": {**host, "qemu": said.stdout.splitlines()[0]}, "rounds": rounds, "rows": lines}
