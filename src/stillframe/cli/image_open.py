"""What every command on an image has in common: its options, and the image as an open node."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from stillframe.block.node import Node

FORMATS = click.Choice(["qcow2", "raw"])

format_option = click.option(
    "-f", "--format", "kind", type=FORMATS, help="The image's format; found out where it is left out."
)
force_share_option = click.option(
    "-U",
    "--force-share",
    is_flag=True,
    help="Look at an image that a running machine writes; what is shown may be half a change.",
)


@contextmanager
def opened(
    filename: str,
    kind: str | None,
    *,
    writable: bool = False,
    force_share: bool = False,
    with_backing: bool = False,
) -> "Iterator[Node]":
    """The image as a node; nobody may write to one whose format was only found out to be raw."""
    from stillframe.block.graph import BlockGraph
    from stillframe.block.options import NodeOptions

    graph = BlockGraph()
    try:
        driver = kind or probed(filename)
        children: dict[str, NodeOptions | str | None] = {
            "file": NodeOptions("file", settings={"filename": filename})
        }
        if driver == "qcow2" and not with_backing:
            children["backing"] = None
        yield graph.blockdev_add(
            NodeOptions(
                driver,
                node_name="image",
                read_only=not writable,
                force_share=force_share,
                children=children,
            )
        )
    finally:
        graph.close()


def probed(filename: str) -> str:
    from stillframe.block.file import FileNode
    from stillframe.block.opening import probe_format

    file = FileNode("probe", filename, read_only=True, locking="off")
    try:
        return probe_format(file)
    finally:
        file.close()
