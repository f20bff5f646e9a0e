"""`stillframe image create`, and the options of new images, which `convert` takes, too."""

from typing import Any

import click

from stillframe.cli.image_open import FORMATS, opened, quiet_option
from stillframe.cli.present import parse_size, read_size
from stillframe.errors import InvalidRequest, Unsupported
from stillframe.text import format_size, printable

IMAGE_OPTIONS = """\
OPTIONS OF THE NEW IMAGE, as -o NAME=VALUE[,NAME=VALUE]
  preallocation     off; falloc reserves space, full writes zeroes to it; for
                    qcow2 also metadata: tables alone (off)
and of qcow2 alone
  cluster_size      512 to 2M, a power of two (64k)
  compression_type  zlib or zstd, for compressed clusters (zlib)
  refcount_bits     1, 2, 4, 8, 16, 32 or 64 (16)
  compat            1.1 or 0.10 (1.1)
  lazy_refcounts    on or off (off)
  extended_l2       on or off (off): clusters of 32 parts, each written by itself
  data_file         the file that the disk's bytes lie in, beside the tables;
                    not in convert
  data_file_raw     on or off: that file is the disk as a raw image (off)"""


@click.command(
    epilog=f"""\b
{IMAGE_OPTIONS}

\b
EXAMPLES
  stillframe image create disk.qcow2 10G
  stillframe image create -o cluster_size=4k disk.qcow2 512M
  stillframe image create -o preallocation=metadata disk.qcow2 10G
  stillframe image create -b base.qcow2 -F qcow2 overlay.qcow2
  stillframe image create -f raw vars.raw 64M"""
)
@click.option(
    "-f", "--format", "kind", type=FORMATS, default="qcow2", show_default=True, help="What to make."
)
@click.option(
    "-o", "options", multiple=True, metavar="NAME=VALUE,...", help="Options of the format, see below."
)
@click.option("-b", "--backing", metavar="FILE", help="Show this image where the new one has no data yet.")
@click.option("-F", "--backing-format", type=FORMATS, help="The backing image's format; -b needs it.")
@click.option("--force", is_flag=True, help="Replace a file of that name; what it held is lost.")
@quiet_option
@click.argument("file")
@click.argument("size", callback=read_size, required=False)
def create(
    kind: str,
    options: tuple[str, ...],
    backing: str | None,
    backing_format: str | None,
    force: bool,
    quiet: bool,
    file: str,
    size: int | None,
) -> None:
    """Make an image FILE of SIZE bytes (10G, 1.5T); with -b, of the backing image's size.

    An existing file is not replaced, as qemu-img would: say --force.
    """
    from stillframe.block.create import create_qcow2, create_raw

    settings = image_settings(kind, options, backing, backing_format)
    if "backing_file" in settings:
        size = _size_over(file, size, settings["backing_file"], settings["backing_format"])
    if size is None:
        raise InvalidRequest(
            f"{file}: Image creation needs a size parameter", remedy="Give SIZE after FILE, as 10G."
        )
    if kind == "raw":
        create_raw(file, size, replace=force, **settings)
    else:
        create_qcow2(file, size, replace=force, options=settings)
    if not quiet:
        with opened(file, kind) as node:
            click.echo(f"Created '{printable(file)}': {kind}, {format_size(node.size)} ({node.size} bytes)")


def _size_over(file: str, size: int | None, backing: str, backing_format: str) -> int:
    """The new image's size, after a look at what it is to stand on."""
    from stillframe.block.file import same_file
    from stillframe.block.opening import full_backing_name

    below = full_backing_name(file, backing)
    if same_file(file, below):
        raise InvalidRequest(f"{file}: Trying to create an image with the same filename as the backing file")
    with opened(below, backing_format, with_backing=True) as node:
        return node.size if size is None else size


def image_settings(
    kind: str, options: tuple[str, ...], backing: str | None, backing_format: str | None
) -> dict[str, Any]:
    """What -o, -b and -F say of a new image, as keyword arguments of `block.create`.

    :raise InvalidRequest: an option that the format does not have, or a value that the option does not have.
    """
    said: dict[str, str] = {}
    for text in options:
        # A comma inside a value is written twice, as qemu-img has it.
        for option in text.replace(",,", "\0").split(","):
            name, _, value = option.replace("\0", ",").partition("=")
            said[name] = value
    backing = said.pop("backing_file", None) or backing
    backing_format = said.pop("backing_fmt", None) or backing_format
    settings = {name: _value_of(kind, name, value) for name, value in said.items()}
    settings = {name: value for name, value in settings.items() if value is not None}
    if backing_format is not None and backing is None:
        raise InvalidRequest("Backing format cannot be used without backing file")
    if backing is not None:
        if kind == "raw":
            raise InvalidRequest(
                "Backing file not supported for file format 'raw': a raw image has no backing file",
                remedy="Make a qcow2 image.",
            )
        if backing_format is None:
            raise InvalidRequest(
                "Backing file specified without backing format", remedy="Say -F qcow2 or -F raw."
            )
        settings |= {"backing_file": backing, "backing_format": backing_format}
    return settings


def _value_of(kind: str, name: str, value: str) -> Any:
    """None for what asks for nothing."""
    known = _OPTIONS.get(name)
    if known is None or (kind == "raw" and name not in _RAW_OPTIONS):
        raise InvalidRequest(f"Invalid parameter '{name}'", remedy="See stillframe image create --help.")
    if known == "size":
        try:
            return parse_size(value)
        except ValueError as error:
            raise InvalidRequest(f"Parameter '{name}' expects a size") from error
    if known == "on or off":
        if value not in ("on", "off"):
            raise InvalidRequest(f"Parameter '{name}' expects 'on' or 'off'")
        return value == "on"
    if isinstance(known, dict):
        if value not in known:
            raise InvalidRequest(
                f"Parameter '{name}' does not accept value '{value}'",
                remedy=f"It may be {', '.join(known)}.",
            )
        return known[value]
    if known == "nothing":
        if value not in ("", "off"):
            raise Unsupported(f"Parameter '{name}' with the value '{value}' is not supported")
        return None
    return value


_OPTIONS: dict[str, str | dict[str, str]] = {
    "cluster_size": "size",
    "refcount_bits": "size",
    "compat": {"1.1": "1.1", "0.10": "0.10", "v3": "1.1", "v2": "0.10"},
    "lazy_refcounts": "on or off",
    "preallocation": {each: each for each in ("off", "metadata", "falloc", "full")},
    "compression_type": {each: each for each in ("zlib", "zstd")},
    "extended_l2": "on or off",
    "data_file": "text",
    "data_file_raw": "on or off",
    "encryption": "nothing",
    "encrypt.format": "nothing",
}
"""What values an option takes; "nothing" is what qemu-img knows and we do not, but for asking for nothing."""

_RAW_OPTIONS = {"preallocation"}
