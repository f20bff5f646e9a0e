"""What the commands on images have in common: options, sizes, and an image as an open node."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from stillframe.errors import InvalidRequest

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

data_file_option = click.option(
    "--data-file",
    metavar="FILE",
    help="Of an image that is written: the file that the disk's bytes lie in, beside the tables; else the one that the "
    "image names, which must lie in its directory.",
)
progress_option = click.option(
    "-p", "--progress", is_flag=True, help="Show how far it is where nobody watches, too, as percentages."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Say nothing on success.")


@contextmanager
def opened(
    filename: str,
    kind: str | None,
    *,
    writable: bool = False,
    force_share: bool = False,
    with_backing: bool = False,
    keep_still: bool = False,
    to_describe: bool = False,
    data_file: str | None = None,
) -> "Iterator[Node]":
    """The image as a node.

    :param to_describe: nothing of the disk is read, so the file that the guest's data lies in need not be there.
    :param data_file: that file, instead of the one that the image names.
    :param keep_still: nobody else may write to it meanwhile, as always where it is `writable`; but for `force_share`. Else that
        is so for formats with tables alone, as in QEMU.
    """
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
        if driver == "qcow2" and to_describe:
            children["data-file"] = None
        if data_file is not None:
            if driver != "qcow2":
                raise InvalidRequest("--data-file is for qcow2 images")
            children["data-file"] = NodeOptions("file", settings={"filename": data_file})
        node = graph.blockdev_add(
            NodeOptions(
                driver,
                node_name="image",
                read_only=not writable,
                force_share=force_share,
                children=children,
            )
        )
        if (keep_still or writable) and not force_share:
            graph.use(node, "this command", writable=writable)
        yield node
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
