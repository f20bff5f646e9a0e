"""`stillframe image snapshot`: the snapshots inside an image, without a machine."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from stillframe.block.listing import snapshot_table
from stillframe.cli.image_open import force_share_option, format_option, opened, probed
from stillframe.cli.image_recover import tell_unfinished
from stillframe.cli.present import print_json
from stillframe.errors import AlreadyExists, InvalidRequest, NotFound, Unsupported

if TYPE_CHECKING:
    from stillframe.block.node import Change, Node, SnapshotInfo
    from stillframe.snapshots.selection import SnapshotNode


@click.group(
    epilog="""\b
EXAMPLES
  stillframe image snapshot create disk.qcow2 before-upgrade
  stillframe image snapshot list disk.qcow2
  stillframe image snapshot apply disk.qcow2 before-upgrade
  stillframe image snapshot delete --id disk.qcow2 3"""
)
def snapshot() -> None:
    """The snapshots inside an image: of the disk alone, no machine needed.

    TAG is a snapshot's name, never its id: where an id is meant, say --id.
    """


_id_option = click.option("--id", "by_id", is_flag=True, help="TAG is an id, as the list shows it.")


@snapshot.command("list")
@format_option
@force_share_option
@click.option("--json", "as_json", is_flag=True, help="For programs: a list in QEMU's shape.")
@click.argument("image_file", metavar="IMAGE")
def list_snapshots(kind: str | None, force_share: bool, as_json: bool, image_file: str) -> None:
    """List the snapshots of IMAGE."""
    from stillframe.block.describe import snapshot_info_json

    with opened(image_file, kind, force_share=force_share, to_describe=True) as node:
        found = node.info().snapshots
        if node.snapshot_store is not None:
            tell_unfinished(image_file, node.snapshot_store)
    if as_json:
        print_json([snapshot_info_json(each) for each in found])
    elif found:
        click.echo("\n".join(["Snapshot list:", *snapshot_table(found)]))


@snapshot.command("create")
@format_option
@click.argument("image_file", metavar="IMAGE")
@click.argument("tag")
def create_snapshot(kind: str | None, image_file: str, tag: str) -> None:
    """Keep the present content of IMAGE under TAG, which must be new."""
    from uuid import uuid4

    from stillframe.block.node import GroupMember, Lineage, SnapshotRecord
    from stillframe.snapshots.group import all_or_none, frozen_nodes
    from stillframe.snapshots.selection import check_tag

    if not tag:
        raise InvalidRequest("Name is empty", remedy="Give the snapshot a name.")
    check_tag(tag)
    _refuse_data_file(image_file, kind)
    with opened(image_file, kind, writable=True) as node:
        of_image = _snapshot_node(node, image_file)
        if of_image.named(tag) is not None:
            raise AlreadyExists(
                f"Snapshot '{tag}' already exists in '{image_file}'",
                remedy="Choose another tag, or delete that snapshot first.",
            )
        date_sec, date_nsec = divmod(time.time_ns(), 1_000_000_000)
        identity = uuid4()
        lineage = Lineage(identity, None, uuid4(), (GroupMember(node.node_name, identity),))
        record = SnapshotRecord(tag, date_sec, date_nsec, lineage=lineage)
        with frozen_nodes() as frozen:
            frozen.freeze([of_image])
            step = frozen.step(of_image, record)
            with all_or_none([replace(step, failing=f"Could not create snapshot '{tag}'")]):
                pass


@snapshot.command("apply")
@format_option
@_id_option
@click.argument("image_file", metavar="IMAGE")
@click.argument("tag")
def apply_snapshot(kind: str | None, by_id: bool, image_file: str, tag: str) -> None:
    """Make the content of IMAGE what it was at TAG; what it is now is lost."""
    _refuse_data_file(image_file, kind)
    with opened(image_file, kind, writable=True) as node:
        of_image = _snapshot_node(node, image_file)
        found = _chosen(of_image, image_file, tag, by_id=by_id)
        _carry_out(
            of_image, lambda: of_image.store.prepare_revert(found), f"Could not apply snapshot '{tag}'"
        )


@snapshot.command("delete")
@format_option
@_id_option
@click.argument("image_file", metavar="IMAGE")
@click.argument("tag")
def delete_snapshot(kind: str | None, by_id: bool, image_file: str, tag: str) -> None:
    """Take the snapshot TAG off IMAGE, and give back what only it used."""
    _refuse_data_file(image_file, kind)
    with opened(image_file, kind, writable=True) as node:
        of_image = _snapshot_node(node, image_file)
        found = _chosen(of_image, image_file, tag, by_id=by_id)
        _carry_out(
            of_image, lambda: of_image.store.prepare_delete(found), f"Could not delete snapshot '{tag}'"
        )


def _carry_out(of_image: "SnapshotNode", prepare: "Callable[[], Change]", failing: str) -> None:
    from stillframe.snapshots.group import Step, all_or_none

    with all_or_none([Step(of_image.name, prepare, failing)]):
        pass


def _refuse_data_file(file: str, kind: str | None) -> None:
    """Before the image is opened for writing, which asks for that file first."""
    from stillframe.block.file import FileNode
    from stillframe.block.opening import read_names

    if (kind or probed(file)) != "qcow2":
        return
    node = FileNode("file", file, read_only=True, locking="off")
    try:
        has_data_file = read_names(node).has_data_file
    finally:
        node.close()
    if has_data_file:
        raise Unsupported(f"'{file}' has a data file of its own, and such an image cannot keep snapshots")


def _snapshot_node(node: "Node", file: str) -> "SnapshotNode":
    from stillframe.snapshots.selection import SnapshotNode

    store = node.snapshot_store
    if store is None:
        raise Unsupported(
            f"'{file}' is a {node.driver} image, which cannot keep snapshots",
            remedy="Only qcow2 images can; -f says which format to take a file for.",
        )
    tell_unfinished(file, store)
    return SnapshotNode(node, store)


def _chosen(of_image: "SnapshotNode", file: str, tag: str, *, by_id: bool) -> "SnapshotInfo":
    found = [each for each in of_image.store.snapshots() if (each.id if by_id else each.name) == tag]
    what = "id" if by_id else "tag"
    if not found:
        raise NotFound(
            f"Snapshot with {what} '{tag}' does not exist in '{file}'",
            remedy=f"See stillframe image snapshot list {file}",
        )
    if len(found) > 1:
        numbers = ", ".join(each.id for each in found)
        raise InvalidRequest(
            f"'{file}' has {len(found)} snapshots with {what} '{tag}': ids {numbers}",
            remedy="Name one by its id, with --id.",
        )
    return found[0]
