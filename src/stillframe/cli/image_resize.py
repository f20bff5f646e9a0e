"""`stillframe image resize`: a disk made larger or smaller."""

from typing import TYPE_CHECKING

import click

from stillframe.cli.image_open import data_file_option, format_option, opened, quiet_option
from stillframe.cli.present import parse_size
from stillframe.errors import InvalidRequest, Refused, Unsupported

if TYPE_CHECKING:
    from stillframe.block.create import Preallocation
    from stillframe.block.node import Node


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="""\b
EXAMPLES
  stillframe image resize disk.qcow2 20G
  stillframe image resize disk.qcow2 +512M
  stillframe image resize --shrink disk.qcow2 -1G
  stillframe image resize -f raw --preallocation full disk.raw 8G""",
)
@format_option
@click.option("--shrink", is_flag=True, help="Make it smaller: what lies behind the new end is lost.")
@click.option(
    "--preallocation",
    type=click.Choice(["off", "metadata", "falloc", "full"]),
    default="off",
    show_default=True,
    help="Take space for what is new: falloc reserves it, full writes zeroes; for raw images.",
)
@data_file_option
@quiet_option
@click.argument("file")
@click.argument("size")
def resize(
    kind: str | None,
    shrink: bool,
    preallocation: "Preallocation",
    data_file: str | None,
    quiet: bool,
    file: str,
    size: str,
) -> None:
    """Make the disk in FILE so large: SIZE, or +SIZE more, or -SIZE less.

    New bytes read as zeroes. Before a disk shrinks, its guest must have made its file systems smaller: what lies behind
    the new end is gone, though not from snapshots, which keep the size they have.
    """
    sign, amount = _read_change(size)
    with opened(file, kind, writable=True, with_backing=True, data_file=data_file) as node:
        new = {"": amount, "+": node.size + amount, "-": node.size - amount}[sign]
        if new <= 0:
            raise InvalidRequest("New image size must be positive")
        if new < node.size and not shrink:
            raise Refused(
                "Use the --shrink option to perform a shrink operation.",
                remedy="Shrinking an image will delete all data beyond the shrunken image's end. Before performing "
                "such an operation, make sure there is no important data there.",
            )
        if preallocation != "off" and new <= node.size:
            raise InvalidRequest("Preallocation can only be used for growing images")
        _resize(node, new, preallocation)
    if not quiet:
        click.echo("Image resized.")


def _read_change(text: str) -> tuple[str, int]:
    """The sign, if there is one, and the number behind it."""
    sign = text[:1] if text[:1] in ("+", "-") else ""
    try:
        return sign, parse_size(text[len(sign) :])
    except ValueError:
        raise click.BadParameter(
            f"'{text}' is not a size: give bytes, or a number with k, M, G, T, P or E, as 10G, +512M or -1G.",
            param_hint="SIZE",
        ) from None


def _resize(node: "Node", size: int, preallocation: "Preallocation") -> None:
    if preallocation == "off":
        node.truncate(size)
        node.flush()
        return
    if node.driver != "raw" or preallocation == "metadata":
        raise Unsupported(
            f"Unsupported preallocation mode: {preallocation}",
            remedy="A raw image takes falloc and full; grow others with --preallocation off.",
        )
    from stillframe.block.create import grow_raw

    grow_raw(node, size, preallocation)
