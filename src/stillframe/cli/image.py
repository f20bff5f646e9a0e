"""`stillframe image`: images at rest, without a machine."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import click

from stillframe.block.listing import image_lines
from stillframe.cli.image_compare import compare
from stillframe.cli.image_convert import convert
from stillframe.cli.image_create import create
from stillframe.cli.image_map import map_image
from stillframe.cli.image_open import (
    force_share_option,
    format_option,
    opened,
    probed,
)
from stillframe.cli.image_recover import recover, tell_unfinished
from stillframe.cli.image_resize import resize
from stillframe.cli.image_serve import serve
from stillframe.cli.image_snapshot import snapshot
from stillframe.cli.present import print_json
from stillframe.text import format_size, printable

if TYPE_CHECKING:
    from stillframe.block.node import ImageInfo, Node
    from stillframe.block.qcow2.check import CheckResult

EXIT_FAILED = 1
EXIT_CORRUPT = 2
EXIT_LEAKS = 3
EXIT_NO_CHECK = 63


@click.group(
    epilog="""\b
EXAMPLES
  stillframe image create disk.qcow2 10G
  stillframe image info --json disk.qcow2
  stillframe image check disk.qcow2
  stillframe image convert -O qcow2 disk.raw disk.qcow2
  stillframe image resize disk.qcow2 +1G
  stillframe image snapshot create disk.qcow2 before-upgrade"""
)
def image() -> None:
    """Create, describe, check, compare, convert, resize, serve and snapshot disk images.

    The images stay ordinary: qemu-img reads them, and these commands read those of qemu-img. An image that a
    machine has open is refused: its lock says so.
    """


@image.command(
    epilog="""\b
EXAMPLES
  stillframe image info disk.qcow2
  stillframe image info --json --backing-chain overlay.qcow2"""
)
@format_option
@force_share_option
@click.option("--backing-chain", is_flag=True, help="The images below too, top first.")
@click.option(
    "--json", "as_json", is_flag=True, help="For programs, in qemu-img's shape; a list with --backing-chain."
)
@click.argument("file")
def info(kind: str | None, force_share: bool, backing_chain: bool, as_json: bool, file: str) -> None:
    """Describe an image: format, sizes, backing file, snapshots."""
    from stillframe.block.describe import image_tree_json

    found: list[ImageInfo] = []
    with opened(file, kind, force_share=force_share, with_backing=backing_chain, to_describe=True) as node:
        here: Node | None = node
        if node.snapshot_store is not None:
            tell_unfinished(file, node.snapshot_store)
        while here is not None:
            found.append(here.info())
            here = here.children.get("backing")
    if as_json:
        shown = [image_tree_json(each) for each in found]
        print_json(shown if backing_chain else shown[0])
    else:
        click.echo("\n\n".join("\n".join(_info_lines(each)) for each in found))


def _info_lines(info: "ImageInfo") -> Iterator[str]:
    from stillframe.block.describe import image_info_json, shown_size

    yield from image_lines(image_info_json(info), info.snapshots)
    for role, child in info.children:
        length = shown_size(child)
        yield f"Child node '/{role}':"
        yield f"    filename: {printable(child.filename)}"
        yield f"    protocol type: {child.format}"
        yield f"    file length: {format_size(length)} ({length} bytes)"
        if child.actual_size is not None:
            yield f"    disk size: {format_size(child.actual_size)}"


@image.command(
    epilog=f"""\b
EXAMPLES
  stillframe image check disk.qcow2
  stillframe image check --repair leaks disk.qcow2

\b
EXIT CODES
  0   clean, also after a repair
  1   could not be checked to the end
  {EXIT_CORRUPT}   corrupt
  {EXIT_LEAKS}   clusters are leaked: space is wasted, no data is in danger
  {EXIT_NO_CHECK}  the format knows no checks"""
)
@format_option
@force_share_option
@click.option(
    "-r",
    "--repair",
    type=click.Choice(["leaks", "all"]),
    help="leaks: give back what nobody uses. all: make the refcounts what the tables say, and complete the list "
    "of snapshots, too.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs, in qemu-img's shape.")
@click.argument("file")
@click.pass_context
def check(
    context: click.Context,
    kind: str | None,
    force_share: bool,
    repair: Literal["leaks", "all"] | None,
    as_json: bool,
    file: str,
) -> None:
    """Check that the tables of an image agree, and repair them if asked to."""
    from stillframe.block.file import FileNode
    from stillframe.block.qcow2.check import check as check_image
    from stillframe.block.qcow2.repair import repair as repair_image

    if repair and force_share:
        raise click.UsageError("--repair writes the image, --force-share only looks at it")
    if (kind or probed(file)) != "qcow2":
        click.echo("stillframe: This image format does not support checks", err=True)
        context.exit(EXIT_NO_CHECK)
    node = FileNode("file", file, read_only=repair is None, locking="off" if force_share else "auto")
    try:
        result = repair_image(node, repair) if repair else check_image(node)
    finally:
        node.close()
    if as_json:
        print_json(result.as_qapi() | {"filename": file, "format": "qcow2"})
    else:
        _print_check(result)
    context.exit(_check_exit_code(result))


def _check_exit_code(result: "CheckResult") -> int:
    if result.check_errors:
        return EXIT_FAILED
    if result.corruptions:
        return EXIT_CORRUPT
    return EXIT_LEAKS if result.leaks else 0


def _print_check(result: "CheckResult") -> None:
    for message in result.messages:
        click.echo(printable(message), err=True)
    if result.leaks_fixed or result.corruptions_fixed:
        click.echo(
            "The following inconsistencies were found and repaired:\n\n"
            f"    {result.leaks_fixed} leaked clusters\n    {result.corruptions_fixed} corruptions\n\n"
            "Double checking the fixed image now..."
        )
    if not (result.corruptions or result.leaks or result.check_errors):
        click.echo("No errors were found on the image.")
    if result.corruptions:
        click.echo(
            f"\n{result.corruptions} errors were found on the image.\n"
            "Data may be corrupted, or further writes to the image may corrupt it."
        )
    if result.leaks:
        click.echo(
            f"\n{result.leaks} leaked clusters were found on the image.\n"
            "This means waste of disk space, but no harm to data."
        )
    if result.check_errors:
        click.echo(f"\n{result.check_errors} internal errors have occurred during the check.")
    if result.total_clusters and result.allocated_clusters:
        allocated = 100 * result.allocated_clusters / result.total_clusters
        fragmented = 100 * result.fragmented_clusters / result.allocated_clusters
        compressed = 100 * result.compressed_clusters / result.allocated_clusters
        click.echo(
            f"{result.allocated_clusters}/{result.total_clusters} = {allocated:.2f}% allocated, "
            f"{fragmented:.2f}% fragmented, {compressed:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        click.echo(f"Image end offset: {result.image_end_offset}")


for command in (create, map_image, compare, convert, resize, snapshot, recover, serve):
    image.add_command(command)
