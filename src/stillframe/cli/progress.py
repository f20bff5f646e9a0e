"""How far a job is: a bar with bytes and time left on a terminal, nothing where nobody watches."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stillframe.text import printable

if TYPE_CHECKING:
    from stillframe.client import ProgressListener


@contextmanager
def progress_bar(words: str, *, shown: bool) -> "Iterator[ProgressListener | None]":
    """A bar on standard error while the block lasts; None where it is not a terminal or not wanted.

    :param words: what is being done, as "Saving before-upgrade".
    """
    if not shown or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(printable(words), total=None)

        def listener(done: int, total: int) -> None:
            # QEMU's own snapshot jobs count to one: there is nothing to show but that it works.
            if total > 1:
                progress.update(task, completed=done, total=total)

        yield listener


@contextmanager
def work_progress(words: str, *, asked: bool, quiet: bool) -> "Iterator[ProgressListener | None]":
    """The bar for work of this very process; where nobody watches, percentages as qemu-img's, if asked for."""
    if quiet or sys.stderr.isatty() or not asked:
        with progress_bar(words, shown=not quiet) as listener:
            yield listener
        return
    last = ""

    def percentages(done: int, total: int) -> None:
        nonlocal last
        text = f"    ({100 * done / total if total else 100:.2f}/100%)"
        if text != last:
            last = text
            print(text, end="\r", flush=True)

    percentages(0, 1)
    yield percentages
    print()
