"""`stillframe image map`: which bytes of a disk lie where."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from stillframe.cli.image_open import force_share_option, format_option, opened
from stillframe.cli.present import read_size
from stillframe.errors import Unsupported
from stillframe.text import printable

if TYPE_CHECKING:
    from stillframe.block.node import Node
    from stillframe.block.status import Status


@click.command(
    "map",
    epilog="""\b
EXAMPLES
  stillframe image map disk.qcow2
  stillframe image map --json overlay.qcow2
  stillframe image map --start-offset 1G --max-length 64M disk.qcow2""",
)
@format_option
@force_share_option
@click.option(
    "-s", "--start-offset", metavar="SIZE", callback=read_size, default="0", help="Begin at this byte."
)
@click.option(
    "-l", "--max-length", metavar="SIZE", callback=read_size, help="Look at so many bytes, not at all."
)
@click.option("--json", "as_json", is_flag=True, help="For programs, in the shape of qemu-img 10's.")
@click.argument("file")
def map_image(
    kind: str | None, force_share: bool, start_offset: int, max_length: int | None, as_json: bool, file: str
) -> None:
    """Show which parts of a disk hold data, and where in which file of the backing chain.

    A table of the data alone; with --json all parts: whether an image of the chain has the part ("present", "depth"),
    whether it reads as zeroes, and where it lies in that image's file, if it lies there as it is.
    """
    from stillframe.block.status import mapped

    with opened(file, kind, force_share=force_share, with_backing=True) as node:
        runs = mapped(node, start_offset, max_length)
        for line in _json_lines(runs) if as_json else _lines(node, runs):
            print(line)


def _json_lines(runs: "Iterator[Status]") -> Iterator[str]:
    """One line a run, as soon as it is known: the list of a large disk is long."""
    line = "["
    for run in runs:
        if line != "[":
            yield line + ","
            line = ""
        entry: dict[str, Any] = {
            "start": run.offset,
            "length": run.length,
            "depth": run.depth,
            "present": run.present,
            "zero": run.zero,
            "data": run.data,
            "compressed": run.compressed,
        }
        if run.host_offset is not None:
            entry["offset"] = run.host_offset
        text = json.dumps(entry)
        line += "{ " + text[1:]
    yield line + "]"


def _lines(node: "Node", runs: "Iterator[Status]") -> Iterator[str]:
    from stillframe.block.status import chain, data_file

    files = [printable(data_file(layer).info().filename) for layer in chain(node)]
    yield f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File"
    for run in runs:
        if not run.data or run.zero:
            continue
        if run.host_offset is None:
            raise Unsupported(
                "File contains external, encrypted or compressed clusters.",
                remedy="They lie nowhere as they are; --json shows them.",
            )
        yield f"{_hex(run.offset):<16}{_hex(run.length):<16}{_hex(run.host_offset):<16}{files[run.depth]}"


def _hex(number: int) -> str:
    """As C prints it with a prefix: none before a zero."""
    return f"{number:#x}" if number else "0"
