"""`stillframe image convert`: a disk copied into another image, of another format or with other options."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import click

from stillframe.cli.image_create import IMAGE_OPTIONS, image_settings
from stillframe.cli.image_open import (
    FORMATS,
    data_file_option,
    force_share_option,
    opened,
    progress_option,
    quiet_option,
)
from stillframe.cli.present import read_size
from stillframe.cli.progress import work_progress
from stillframe.errors import Failed, InvalidRequest, NotFound, Unsupported
from stillframe.text import printable

if TYPE_CHECKING:
    from stillframe.block.node import Node


@click.command(
    epilog=f"""\b
{IMAGE_OPTIONS}

\b
EXAMPLES
  stillframe image convert -O qcow2 disk.raw disk.qcow2
  stillframe image convert -c -O qcow2 -o compression_type=zstd disk.qcow2 small.qcow2
  stillframe image convert -O raw -l snapshot.name=before-upgrade disk.qcow2 before.raw
  stillframe image convert -O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 copy.qcow2"""
)
@click.option("-f", "--source-format", "source_kind", type=FORMATS, help="The format of SOURCE.")
@click.option(
    "-O",
    "--target-format",
    "kind",
    type=FORMATS,
    help="What to make: raw, if nothing is said. With -n, what is there.",
)
@click.option("-o", "--options", "options", multiple=True, metavar="NAME=VALUE,...", help="See below.")
@click.option("-c", "--compress", is_flag=True, help="Compress clusters; for qcow2.")
@click.option(
    "-l",
    "--snapshot",
    "snapshot",
    metavar="TAG",
    help="Copy this snapshot of SOURCE: a tag, snapshot.name=TAG or snapshot.id=ID.",
)
@click.option(
    "-B", "--backing", metavar="FILE", help="Copy only what differs from this image, and name it below."
)
@click.option("-F", "--backing-format", type=FORMATS, help="The backing image's format; -B needs it.")
@click.option(
    "-S",
    "--sparse-size",
    metavar="SIZE",
    callback=read_size,
    default="4k",
    show_default=True,
    help="Leave out zeroes in runs of so many bytes; 0 writes them all.",
)
@click.option(
    "-n", "--no-create", is_flag=True, help="Write into TARGET as it is; if that fails, it is neither."
)
@data_file_option
@click.option("--force", is_flag=True, help="Replace a file of that name, once the copy is whole.")
@force_share_option
@progress_option
@quiet_option
@click.argument("source")
@click.argument("target")
def convert(
    source_kind: str | None,
    kind: str | None,
    options: tuple[str, ...],
    compress: bool,
    snapshot: str | None,
    backing: str | None,
    backing_format: str | None,
    sparse_size: int,
    no_create: bool,
    data_file: str | None,
    force: bool,
    force_share: bool,
    progress: bool,
    quiet: bool,
    source: str,
    target: str,
) -> None:
    """Copy the disk in SOURCE, backing files and all, into a new image TARGET.

    The copy is written beside TARGET, as TARGET.unfinished-..., and takes that name when it is whole and on stable
    storage: whatever happens before, Ctrl-C too, a file that was there stays as it was.
    """
    from stillframe.block.copy import CopyOptions, copy

    if no_create and (options or backing or backing_format or force):
        raise click.UsageError("-n takes the target as it is: it goes without -o, -B, -F and --force")
    if data_file is not None and not no_create:
        raise click.UsageError("--data-file is of the target as it is: it goes with -n")
    settings = image_settings(kind or "raw", options, backing, backing_format)
    if "data_file" in settings:
        raise Unsupported(
            "A copy with a data file of its own is not supported",
            remedy="Create the image with its data file first, then copy into it with -n.",
        )
    if compress and settings.get("preallocation", "off") != "off":
        raise InvalidRequest("Compression and preallocation not supported at the same time")
    if compress and not no_create and (kind or "raw") == "raw":
        raise Unsupported(
            "Compression not supported for this file format", remedy="Make a qcow2 image: -O qcow2."
        )
    with opened(source, source_kind, force_share=force_share, with_backing=True, keep_still=True) as node:
        disk = node if snapshot is None else _at_snapshot(node, source, snapshot)
        making = (
            _existing(target, kind, data_file)
            if no_create
            else _new(disk, target, kind or "raw", settings, replace=force)
        )
        with making as (made, common_depth):
            how = CopyOptions(
                sparse_size=sparse_size,
                is_blank=not no_create,
                common_depth=common_depth,
                compress=compress,
            )
            with work_progress(f"Converting {printable(source)}", asked=progress, quiet=quiet) as listener:
                copy(disk, made, how, progress=listener)


@contextmanager
def _existing(target: str, kind: str | None, data_file: str | None) -> "Iterator[tuple[Node, int | None]]":
    """An image to be written into as it is."""
    with opened(target, kind, writable=True, with_backing=True, data_file=data_file) as node:
        try:
            yield node, None
        except Failed as error:
            error.left = error.left or f"'{target}' holds a part of the copy."
            raise


@contextmanager
def _new(
    source: "Node", target: str, kind: str, settings: dict[str, Any], *, replace: bool
) -> "Iterator[tuple[Node, int | None]]":
    """A new image, and the depth from which on the source's chain is the new image's, too."""
    from stillframe.block.create import new_image
    from stillframe.block.opening import full_backing_name

    with ExitStack() as stack:
        below = common = None
        if "backing_file" in settings:
            name = full_backing_name(target, settings["backing_file"])
            below = stack.enter_context(
                opened(name, settings["backing_format"], with_backing=True, keep_still=True)
            )
            common = _common_depth(source, below)
        yield (
            stack.enter_context(
                new_image(target, kind, source.size, replace=replace, options=settings, backing=below)
            ),
            common,
        )


def _common_depth(source: "Node", below: "Node") -> int | None:
    from stillframe.block.file import same_file
    from stillframe.block.opening import protocol_file
    from stillframe.block.status import chain

    file = protocol_file(below)
    for depth, layer in enumerate(chain(source)):
        its = protocol_file(layer)
        if (
            depth
            and file is not None
            and its is not None
            and (layer.driver, layer.size) == (below.driver, below.size)
            and same_file(its.filename, file.filename)
        ):
            return depth
    return None


def _at_snapshot(node: "Node", file: str, words: str) -> "Node":
    """The disk as it was at a snapshot: by its tag, or as qemu-img's options say it."""
    wanted: dict[str, str] = {}
    if words.startswith("snapshot."):
        for option in words.split(","):
            name, is_given, value = option.partition("=")
            if name not in ("snapshot.id", "snapshot.name") or not is_given:
                raise InvalidRequest(
                    f"Invalid parameter '{name}'", remedy="Say snapshot.name=TAG, or snapshot.id=ID."
                )
            wanted[name.removeprefix("snapshot.")] = value
    else:
        wanted["name"] = words
    found = [
        each
        for each in node.info().snapshots
        if all(getattr(each, name) == value for name, value in wanted.items())
    ]
    if not found:
        raise NotFound(
            f"Failed to load snapshot: Can't find snapshot '{words}' in '{file}'",
            remedy=f"See stillframe image snapshot list {file}; an id is said as snapshot.id=ID.",
        )
    if len(found) > 1:
        numbers = ", ".join(each.id for each in found)
        raise InvalidRequest(
            f"'{file}' has {len(found)} snapshots '{words}': ids {numbers}", remedy="Say snapshot.id=ID."
        )
    from stillframe.block.qcow2 import Qcow2Node

    if not isinstance(node, Qcow2Node):
        raise Unsupported(f"'{file}' is a {node.driver} image, which cannot keep snapshots")
    return node.at_snapshot(found[0])
