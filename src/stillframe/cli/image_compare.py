"""`stillframe image compare`: whether two disks read alike."""

from contextlib import ExitStack
from typing import TYPE_CHECKING

import click

from stillframe.cli.image_open import FORMATS, force_share_option, opened, progress_option, quiet_option
from stillframe.cli.present import print_error, print_json
from stillframe.cli.progress import work_progress
from stillframe.errors import StillframeError
from stillframe.text import printable

if TYPE_CHECKING:
    from stillframe.block.compare import Comparison

EXIT_DIFFERENT = 1
EXIT_NOT_OPENED = 2
EXIT_NOT_READ = 4


@click.command(
    epilog=f"""\b
EXAMPLES
  stillframe image compare disk.qcow2 copy.raw
  stillframe image compare --strict one.qcow2 two.qcow2

\b
EXIT CODES
  0   they read alike
  {EXIT_DIFFERENT}   they differ
  {EXIT_NOT_OPENED}   one could not be opened
  {EXIT_NOT_READ}   one could not be read to the end"""
)
@click.option("-f", "--a-format", "first_kind", type=FORMATS, help="The format of FIRST.")
@click.option("-F", "--b-format", "second_kind", type=FORMATS, help="The format of SECOND.")
@click.option("-s", "--strict", is_flag=True, help="Sizes, and what is allocated, must agree, too.")
@force_share_option
@progress_option
@quiet_option
@click.option("--json", "as_json", is_flag=True, help="For programs: what differs, and where.")
@click.argument("first")
@click.argument("second")
@click.pass_context
def compare(
    context: click.Context,
    first_kind: str | None,
    second_kind: str | None,
    strict: bool,
    force_share: bool,
    progress: bool,
    quiet: bool,
    as_json: bool,
    first: str,
    second: str,
) -> None:
    """Tell whether the disks in two images read alike, to the first difference.

    Backing files are looked through. A disk that is longer than the other by zeroes alone reads alike, with a warning.
    """
    from stillframe.block.compare import compare as compare_disks

    with ExitStack() as stack:
        try:
            one, other = (
                stack.enter_context(
                    opened(file, kind, force_share=force_share, with_backing=True, keep_still=True)
                )
                for file, kind in ((first, first_kind), (second, second_kind))
            )
        except StillframeError as error:
            print_error(error)
            context.exit(EXIT_NOT_OPENED)
        try:
            with work_progress(
                f"Comparing {printable(first)}", asked=progress, quiet=quiet or as_json
            ) as listener:
                found = compare_disks(one, other, strict=strict, progress=listener)
        except StillframeError as error:
            print_error(error)
            context.exit(EXIT_NOT_READ)
    if as_json:
        print_json({"identical": found.difference is None} | _as_json(found))
    elif not quiet:
        for line in _lines(found):
            click.echo(line)
    context.exit(0 if found.difference is None else EXIT_DIFFERENT)


def _as_json(found: "Comparison") -> dict[str, object]:
    shown: dict[str, object] = {"same-size": not found.is_longer and found.difference != "size"}
    if found.difference is not None:
        shown["difference"] = found.difference
    if found.difference in ("status", "content"):
        shown["offset"] = found.offset
    return shown


def _lines(found: "Comparison") -> list[str]:
    if found.difference == "size":
        return ["Strict mode: Image size mismatch!"]
    if found.difference == "status":
        return [f"Strict mode: Offset {found.offset} block status mismatch!"]
    warning = ["Warning: Image size mismatch!"] if found.is_longer else []
    if found.difference == "content":
        return [*warning, f"Content mismatch at offset {found.offset}!"]
    return [*warning, "Images are identical."]
