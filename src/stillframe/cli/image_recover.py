"""`stillframe image recover`: images that a crash left in the middle of an operation over several of them."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from stillframe.cli.image_open import probed
from stillframe.cli.main import EXIT_FAILED
from stillframe.cli.present import print_json
from stillframe.errors import Unsupported
from stillframe.text import printable

if TYPE_CHECKING:
    from stillframe.block.node import SnapshotStore
    from stillframe.snapshots.recovery import Recovered
    from stillframe.snapshots.selection import SnapshotNode


@click.command(
    epilog="""\b
EXAMPLES
  stillframe image recover root.qcow2 data.qcow2
  stillframe image recover --forget data.qcow2

\b
EXIT CODES
  0   nothing is unfinished any more in these images
  1   something is: the image that decides is not among them, or the storage failed"""
)
@click.option(
    "--forget",
    is_flag=True,
    help="Give up what cannot be resolved, as when the image that decides is gone for good.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="For programs: a list with an object for each operation."
)
@click.argument("files", metavar="IMAGE...", nargs=-1, required=True)
@click.pass_context
def recover(context: click.Context, forget: bool, as_json: bool, files: tuple[str, ...]) -> None:
    """Complete or undo what a crash interrupted.

    A save, load or delete over several images ends on all of them, or on none. A machine does this by
    itself when all its images are there, so no command is needed after an ordinary crash. Name all
    images of the machine: the one with the machine state decides, and the others become what it says.

    With --forget nothing is lost: a load is undone, and its snapshot is still there to be applied; the
    snapshot of a save or delete that may be half done stays on the list, to be deleted by hand.
    """
    from stillframe.snapshots.recovery import forget as give_up
    from stillframe.snapshots.recovery import recover as bring_to_an_end

    forgotten: list[tuple[str, str]] = []
    with _opened_together(files) as nodes:
        found = bring_to_an_end(nodes)
        if forget:
            for file, node in zip(files, nodes, strict=True):
                done = give_up(node)
                if done is not None:
                    forgotten.append((file, done))
            found = [each for each in found if each.problem is None and not each.missing]
    names = {node.name: file for node, file in zip(nodes, files, strict=True)}
    if as_json:
        print_json([_as_json(each, names) for each in found])
    else:
        for each in found:
            click.echo(_line(each, names))
        for file, done in forgotten:
            click.echo(f"{printable(file)}: {done}")
        if not found and not forgotten:
            click.echo("Nothing is unfinished in these images.")
    if any(each.problem is not None for each in found):
        context.exit(EXIT_FAILED)


@contextmanager
def _opened_together(files: "Sequence[str]") -> "Iterator[list[SnapshotNode]]":
    from stillframe.block.graph import BlockGraph
    from stillframe.block.options import NodeOptions
    from stillframe.snapshots.selection import SnapshotNode

    graph = BlockGraph()
    try:
        nodes: list[SnapshotNode] = []
        for number, file in enumerate(files):
            driver = probed(file)
            if driver != "qcow2":
                raise Unsupported(
                    f"'{file}' is a {driver} image, which cannot keep snapshots", remedy="Leave it out."
                )
            below = NodeOptions("file", settings={"filename": file})
            node = graph.blockdev_add(
                NodeOptions(driver, node_name=f"image{number}", children={"file": below, "backing": None})
            )
            if node.snapshot_store is not None:
                nodes.append(SnapshotNode(node, node.snapshot_store))
        yield nodes
    finally:
        graph.close()


def tell_unfinished(file: str, store: "SnapshotStore") -> None:
    """Say on standard error that an image is part of an operation that was interrupted."""
    from stillframe.block.node import GroupStage

    mark = store.unfinished
    if mark is None or mark.stage is GroupStage.SETTLED:
        return
    click.echo(
        f"stillframe: '{printable(file)}' is part of an interrupted {mark.kind.value} of {mark.images} images, which "
        f"'{printable(mark.decider)}' decides; `stillframe image recover` brings it to an end",
        err=True,
    )


def _line(found: "Recovered", names: dict[str, str]) -> str:
    what = f"{found.mark.kind.value} of {found.mark.images} images"
    here = ", ".join(printable(names[name]) for name in found.nodes)
    if found.problem is not None:
        remedy = f"\n  {found.problem.remedy}" if found.problem.remedy else ""
        why = str(found.problem)
        for name, file in names.items():
            why = why.replace(f"Node '{name}'", f"'{file}'")
        return f"{here}: the {what} is not resolved: {printable(why)}{remedy}"
    rest = f"; {found.missing} more of its images may wait for this" if found.missing else ""
    return f"{here}: the {what} was {'completed' if found.committed else 'undone'}{rest}"


def _as_json(found: "Recovered", names: dict[str, str]) -> dict[str, object]:
    shown: dict[str, object] = {
        "operation": str(found.mark.operation),
        "kind": found.mark.kind.value,
        "images": found.mark.images,
        "files": [names[name] for name in found.nodes],
        "committed": found.committed,
        "missing": found.missing,
    }
    if found.problem is not None:
        shown["error"] = str(found.problem)
    return shown
