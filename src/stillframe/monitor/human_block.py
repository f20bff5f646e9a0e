"""The human monitor's `info block` and `info block-jobs`, in QEMU's form."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from stillframe.block.describe import named_block_node_json
from stillframe.block.listing import image_lines
from stillframe.block.node import Node
from stillframe.monitor.drives import Front, fronts
from stillframe.monitor.host import Host
from stillframe.text import printable


def info_block(host: Host, words: Sequence[str]) -> str:
    """Every drive and device, or every node, or what has a name.

    :param words: "-n" for nodes, "-v" for their images, too; then perhaps the name of a drive or a node.
    """
    rest = list(words)
    of_nodes, in_full = (rest[:1] == [flag] and bool(rest.pop(0)) for flag in ("-n", "-v"))
    name = rest[0] if rest else None
    blocks: list[tuple[str, Iterator[str]]] = []
    if not of_nodes:
        blocks += _first_apart((each.drive, _front(host, each, in_full=in_full)) for each in fronts(host))
    if of_nodes or name is not None:
        nodes = host.graph.nodes()
        blocks += _first_apart(
            (node.node_name, _node(host, node, node.node_name, [], in_full=in_full)) for node in nodes
        )
    lines = (line for called, block in blocks if name in (None, called) for line in block)
    return "".join(f"{line}\r\n" for line in lines)


def _first_apart(blocks: Iterable[tuple[str, Iterator[str]]]) -> list[tuple[str, Iterator[str]]]:
    """An empty line before all but the first of a list, also where that one is not shown."""
    return [
        (called, chain([""], block) if number else block) for number, (called, block) in enumerate(blocks)
    ]


def _front(host: Host, front: Front, *, in_full: bool) -> Iterator[str]:
    held = []
    if front.disk is not None:
        held.append(f"    Attached to:      {printable(front.disk.device_id)}")
        if front.disk.io_status() != "ok":
            held.append(f"    I/O status:       {front.disk.io_status()}")
    else:
        held.append("    Removable device: not locked, tray closed")
    if front.node is None:
        yield f"{front.drive}: [not inserted]"
        yield from held
    else:
        name = front.node.node_name
        yield from _node(
            host, front.node, f"{front.drive} ({name})" if front.drive else name, held, in_full=in_full
        )


def _node(host: Host, node: Node, title: str, held: Sequence[str], *, in_full: bool) -> Iterator[str]:
    shown = named_block_node_json(node, host.graph)
    yield f"{title}: {printable(shown['file'])} ({node.driver}{', read-only' if node.read_only else ''})"
    yield from held
    yield "    Cache mode:       writeback"
    if "backing_file" in shown:
        depth = shown["backing_file_depth"]
        yield f"    Backing file:     {printable(shown['backing_file'])} (chain depth: {depth})"
    if in_full:
        yield from ("", "Images:")
        image, here = shown["image"], node
        yield from image_lines(image, here.info().snapshots)
        while "backing-image" in image:
            image, here = image["backing-image"], here.children["backing"]
            yield from image_lines(image, here.info().snapshots)


def info_block_jobs(host: Host, words: Sequence[str]) -> str:
    """Every block job, and how far it is."""
    jobs = host.jobs.query_block()
    if not jobs:
        return "No active jobs\r\n"
    return "".join(
        f"Type {job.info.type}, device {job.info.id}: Completed {job.info.current_progress} of "
        f"{job.info.total_progress} bytes, speed limit {job.speed} bytes/s\r\n"
        for job in jobs
    )
