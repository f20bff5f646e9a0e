"""Images and nodes in the shape of QEMU's schema: ImageInfo, SnapshotInfo, BlockDeviceInfo."""

import json
from typing import Any

from stillframe.block.graph import BlockGraph
from stillframe.block.node import ImageInfo, Node, SnapshotInfo
from stillframe.block.opening import full_backing_name
from stillframe.block.options import NodeOptions

_NANOSECONDS = 1_000_000_000
_SECTOR = 512


def snapshot_info_json(snapshot: SnapshotInfo) -> dict[str, Any]:
    """SnapshotInfo."""
    seconds, nanoseconds = divmod(snapshot.vm_clock_ns, _NANOSECONDS)
    shown: dict[str, Any] = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.state_size,
        "date-sec": snapshot.date_sec,
        "date-nsec": snapshot.date_nsec,
        "vm-clock-sec": seconds,
        "vm-clock-nsec": nanoseconds,
    }
    if snapshot.icount is not None:
        shown["icount"] = snapshot.icount
    return shown


def shown_size(info: ImageInfo) -> int:
    """An image's size as QEMU tells it: in whole sectors of 512 bytes."""
    return -(-info.virtual_size // _SECTOR) * _SECTOR


def image_info_json(info: ImageInfo) -> dict[str, Any]:
    """ImageInfo, without the images below."""
    shown: dict[str, Any] = {
        "virtual-size": shown_size(info),
        "filename": info.filename,
        "format": info.format,
    }
    if info.dirty is not None:
        shown["dirty-flag"] = info.dirty
    if info.actual_size is not None:
        shown["actual-size"] = info.actual_size
    if info.cluster_size is not None:
        shown["cluster-size"] = info.cluster_size
    if info.encrypted:
        shown["encrypted"] = True
    if info.backing_filename is not None:
        shown["backing-filename"] = info.backing_filename
        shown["full-backing-filename"] = full_backing_name(info.filename, info.backing_filename)
    if info.backing_format is not None:
        shown["backing-filename-format"] = info.backing_format
    if info.snapshots:
        shown["snapshots"] = [snapshot_info_json(snapshot) for snapshot in info.snapshots]
    if info.format_specific is not None:
        shown["format-specific"] = dict(info.format_specific)
    return shown


def image_tree_json(info: ImageInfo) -> dict[str, Any]:
    """BlockGraphInfo, as `qemu-img info` prints it since 8.0: the image, and its children under "children"."""
    below = [{"name": role, "info": image_tree_json(child)} for role, child in info.children]
    return {"children": below, **image_info_json(info)}


def node_filename(node: Node, graph: BlockGraph) -> str:
    """A node's file in one string: a plain name where that says all, else "json:" and its options."""
    file = node.children.get("file")
    options = graph.options(node)
    if node.driver == "null-co":
        return "null-co://" if set(options.settings) <= {"latency-ns"} else _json_name(node, graph)
    if file is None:
        return node.info().filename
    below = node_filename(file, graph)
    if options.settings or file.children or below.startswith("json:") or _is_backing_overridden(node, graph):
        return _json_name(node, graph)
    return below


def named_block_node_json(node: Node, graph: BlockGraph) -> dict[str, Any]:
    """BlockDeviceInfo with its backing images inside, as `query-named-block-nodes`.

    Take "backing-image" out of "image" for `flat: true`.
    """
    filename = node_filename(node, graph)
    backing = node.children.get("backing")
    shown = {
        "node-name": node.node_name,
        "drv": node.driver,
        "ro": node.read_only,
        "file": filename,
        "image": _image_json(node, graph),
        "backing_file_depth": _backing_depth(node),
        "encrypted": node.info().encrypted,
        "detect_zeroes": "off",
        "cache": {"writeback": True, "direct": False, "no-flush": False},
        "write_threshold": 0,
        "active": True,
    }
    for limit in ("iops", "bps"):
        for kind in ("", "_rd", "_wr"):
            shown[limit + kind] = 0
    if backing is not None:
        shown["backing_file"] = node_filename(backing, graph)
    return shown


def _image_json(node: Node, graph: BlockGraph) -> dict[str, Any]:
    shown = image_info_json(node.info())
    bottom = shown["filename"]
    shown["filename"] = node_filename(node, graph)
    if "backing-filename" in shown:
        shown["full-backing-filename"] = full_backing_name(bottom, shown["backing-filename"])
    backing = node.children.get("backing")
    if backing is not None:
        shown["backing-image"] = _image_json(backing, graph)
    return shown


def _backing_depth(node: Node) -> int:
    depth = 0
    below = node.children.get("backing")
    while below is not None:
        depth += 1
        below = below.children.get("backing")
    return depth


def _is_backing_overridden(node: Node, graph: BlockGraph) -> bool:
    if "backing" not in graph.options(node).children:
        return False
    info = node.info()
    backing = node.children.get("backing")
    if backing is None or info.backing_filename is None:
        return (backing is None) != (info.backing_filename is None)
    return node_filename(backing, graph) != full_backing_name(info.filename, info.backing_filename)


def _json_name(node: Node, graph: BlockGraph) -> str:
    return "json:" + json.dumps(_options_json(node, graph))


def _options_json(node: Node, graph: BlockGraph) -> dict[str, Any]:
    options: NodeOptions = graph.options(node)
    shown: dict[str, Any] = {"driver": node.driver, **options.settings}
    # These say how a node is used, not what it is.
    shown.pop("latency-ns", None)
    shown.pop("locking", None)
    for role in ("file", "data-file"):
        if role in node.children:
            shown[role] = _options_json(node.children[role], graph)
    if _is_backing_overridden(node, graph):
        backing = node.children.get("backing")
        shown["backing"] = _options_json(backing, graph) if backing else None
    return shown
