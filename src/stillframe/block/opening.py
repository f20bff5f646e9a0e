"""From options to open nodes: drivers, what children inherit, and the backing chain that an image names.

An image's own words choose only what is opened read-only, and only among these drivers; see
`_backing_options`.
"""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from stillframe.block.file import FileNode, same_file
from stillframe.block.node import Node
from stillframe.block.null import NullNode
from stillframe.block.options import NodeOptions, parse_json_options, read_options
from stillframe.block.permissions import UNUSED
from stillframe.block.raw import RawNode
from stillframe.block.structure import Edge, Entry, Structure
from stillframe.errors import InvalidRequest, Refused, StillframeError, Unsupported

if TYPE_CHECKING:
    from stillframe.block.qcow2.layout import Header

MAX_CHAIN = 200
"""Images in one backing chain, at most."""

HIDDEN_WRITES_SECONDS = 2.0
"""How long to wait for what is left of a killed process before something is written over its image."""

_HIDDEN_WRITES = "The process that wrote {!r} was killed, and some of its writes are only seen once the image is opened for writing"
_log = logging.getLogger(__name__)
_QCOW2_MAGIC = b"QFI\xfb"
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")


@dataclass(frozen=True, slots=True)
class _Inherited:
    """What a node takes from its parent where its own options do not say."""

    read_only: bool
    auto_read_only: bool
    force_share: bool
    discard: bool


_ROOT = _Inherited(read_only=False, auto_read_only=False, force_share=False, discard=False)


def open_tree(structure: Structure, options: NodeOptions) -> Node:
    """Open a node and everything inside its options, all or nothing; it is the monitor's."""
    return _node_of(_open(structure, options, _ROOT, owned=True, above=()))


def probe_format(file: Node) -> str:
    """ "qcow2" by its magic number, else "raw".

    What a guest wrote to a raw disk decides here, so nobody may write to a raw image that was only found by
    this.
    """
    return "qcow2" if file.read(0, min(4, file.size)) == _QCOW2_MAGIC else "raw"


@dataclass(frozen=True, slots=True)
class Named:
    """What a qcow2 image says of the files that belong to it.

    :param backing: the name and the driver that it records of what lies below it; None where it names nothing.
    :param has_data_file: whether guest data has a file of its own. :param data_file: its name, where one is recorded.
    """

    backing: tuple[str, str | None] | None
    has_data_file: bool
    data_file: str | None


def read_names(file: Node) -> Named:
    """What an image names.

    :raise InvalidRequest: it is not qcow2. :raise Unsupported: a feature, by name. :raise ImageCorrupt: out
        of bounds.
    """
    from stillframe.block.qcow2.layout import EXTENSION_DATA_FILE, MAX_CLUSTER_BITS, parse_header

    header = parse_header(file.read(0, min(file.size, 1 << MAX_CLUSTER_BITS)))
    data_file = header.extension(EXTENSION_DATA_FILE)
    return Named(
        _backing_of(header), header.has_data_file, os.fsdecode(data_file) if data_file is not None else None
    )


def read_backing(file: Node) -> tuple[str, str | None] | None:
    """`read_names(file).backing`."""
    return read_names(file).backing


def _backing_of(header: "Header") -> tuple[str, str | None] | None:
    from stillframe.block.qcow2.layout import EXTENSION_BACKING_FORMAT

    if not header.backing_name:
        return None
    kind = header.extension(EXTENSION_BACKING_FORMAT)
    return os.fsdecode(header.backing_name), kind.decode("utf-8", "backslashreplace") if kind else None


def full_backing_name(image: str, backing: str) -> str:
    """A backing name as a path from here: relative ones start at the image's own directory."""
    if _PROTOCOL.match(backing) or os.path.isabs(backing):
        return backing
    return os.path.join(os.path.dirname(image), backing)


def protocol_file(node: Node) -> FileNode | None:
    """The file at the bottom of a node's "file" children."""
    here: Node | None = node
    while here is not None and not isinstance(here, FileNode):
        here = here.children.get("file")
    return here


def _open(
    structure: Structure,
    options: NodeOptions,
    inherited: _Inherited,
    *,
    owned: bool,
    above: tuple[str, ...],
) -> Entry:
    """:param above: the files of the images that this one is to back, the top of the chain first."""
    settled = _settle(options, inherited)
    entry = structure.new_entry(options, read_only=settled.read_only, owned=owned)
    try:
        if options.driver in ("file", "host_device"):
            structure.list_entry(entry)
            entry.node = _open_file(entry, settled, above)
            entry.read_only = entry.node.read_only
        elif options.driver == "null-co":
            structure.list_entry(entry)
            entry.node = _open_null(entry)
        else:
            _open_format(structure, entry, settled, above)
    except BaseException:
        # Nothing has been written through it, so a failing close has nothing to add.
        structure.drop(entry)
        raise
    return entry


def _settle(options: NodeOptions, inherited: _Inherited) -> _Inherited:
    def choose(own: bool | None, other: bool) -> bool:
        return other if own is None else own

    settled = _Inherited(
        read_only=choose(options.read_only, inherited.read_only),
        auto_read_only=choose(options.auto_read_only, inherited.auto_read_only),
        force_share=choose(options.force_share, inherited.force_share),
        discard=choose(options.discard, inherited.discard),
    )
    if settled.force_share and not settled.read_only:
        raise InvalidRequest("force-share=on can only be used with read-only images")
    return settled


def _open_file(entry: Entry, settled: _Inherited, above: tuple[str, ...]) -> FileNode:
    filename = entry.options.settings["filename"]
    if not filename:
        raise InvalidRequest("The 'file' block driver requires a file name")
    if any(same_file(filename, other) for other in above):
        raise InvalidRequest(
            f"The backing chain of '{above[0]}' leads back to '{filename}'",
            remedy="Give the image a backing file that is not above it, as by backing.filename.",
        )
    return FileNode(
        entry.name,
        filename,
        read_only=settled.read_only,
        auto_read_only=settled.auto_read_only,
        locking="off" if settled.force_share else entry.options.settings.get("locking", "auto"),
        discard=settled.discard,
        permissions=UNUSED,
    )


def _open_null(entry: Entry) -> NullNode:
    words = {name.replace("-", "_"): value for name, value in entry.options.settings.items()}
    return NullNode(entry.name, read_only=entry.read_only, **words)


def _open_format(structure: Structure, entry: Entry, settled: _Inherited, above: tuple[str, ...]) -> None:
    # The driver takes care of what its file is asked for, so the file itself passes every discard on.
    file = _child(structure, entry, "file", replace(settled, discard=True), above)
    if file is None:
        raise InvalidRequest("Parameter 'file' is missing")
    try:
        structure.list_entry(entry)
    except BaseException:
        if not isinstance(entry.options.children["file"], str):
            structure.drop(file)
        raise
    structure.connect(Edge(file, "file", parent=entry))
    bytes_below = _node_of(file)
    if entry.options.driver == "raw":
        settings = entry.options.settings
        entry.node = RawNode(
            entry.name,
            bytes_below,
            read_only=entry.read_only,
            offset=settings.get("offset", 0),
            size=settings.get("size"),
            discard=settled.discard,
        )
        return
    from stillframe.block.qcow2 import Qcow2Node

    named = read_names(bytes_below)
    tables_alone = entry.read_only and entry.options.children.get("data-file", "") is None
    data = None if tables_alone else _open_data_file(structure, entry, settled, bytes_below, named, above)
    backing = _open_backing(structure, entry, settled, bytes_below, named.backing, above)
    entry.node = Qcow2Node(
        entry.name,
        bytes_below,
        backing=backing,
        data=data,
        read_only=entry.read_only,
        discard=settled.discard,
        tables_alone=tables_alone,
    )
    if entry.node.hides_writes():
        _log.warning("%s", _HIDDEN_WRITES.format(bottom_name(bytes_below)))


def _child(
    structure: Structure, entry: Entry, role: str, inherited: _Inherited, above: tuple[str, ...]
) -> Entry | None:
    asked = entry.options.children.get(role)
    if asked is None:
        return None
    if isinstance(asked, str):
        return structure.existing(asked)
    return _open(structure, asked, inherited, owned=False, above=above)


def _open_data_file(
    structure: Structure,
    entry: Entry,
    settled: _Inherited,
    file: Node,
    named: Named,
    above: tuple[str, ...],
) -> Node | None:
    """The file with the guest's bytes: the one that was asked for, else the one that the image names."""
    if not named.has_data_file and "data-file" in entry.options.children:
        raise InvalidRequest("'data-file' can only be set for images with an external data file")
    if not named.has_data_file:
        return None
    below = replace(settled, discard=True)
    bottom = protocol_file(file)
    above = (*above, bottom.filename) if bottom else above
    data = _child(structure, entry, "data-file", below, above)
    if data is None:
        if named.data_file is None:
            raise InvalidRequest(
                "'data-file' is required for this image",
                remedy="Name it by the option data-file (--data-file on the command line).",
            )
        options = data_file_options(bottom.filename if bottom else "", named.data_file, settled.read_only)
        data = _open(structure, options, below, owned=False, above=above)
        if not settled.read_only and probe_format(_node_of(data)) == "qcow2":
            structure.drop(data)
            raise Refused(
                f"The image names '{named.data_file}' as its data file, which is a disk image of its own",
                remedy="If it is the right one all the same, name it by the option data-file (--data-file on the command line).",
            )
    structure.connect(Edge(data, "data-file", parent=entry))
    return _node_of(data)


def data_file_options(image: str, name: str, read_only: bool) -> NodeOptions:
    """An image's word for the file with its guest's bytes: a plain file, and to be written only beside the image.

    A guest can write any bytes there, so that the image of a stranger must not choose whose file that is.

    :raise Unsupported: anything but the path of a file. :raise Refused: to be written, and elsewhere.
    """
    if name.startswith("json:") or _PROTOCOL.match(name.removeprefix("file:")):
        raise Unsupported(
            f"The image names '{name}' as its data file, which is not a file's path",
            remedy="Name the data file by the option data-file (--data-file on the command line).",
        )
    path = full_backing_name(image, name.removeprefix("file:"))
    if "\0" in path:
        raise InvalidRequest(f"The image names {path!r} as its data file, which no file can be called")
    if not read_only:
        home = os.path.realpath(os.path.dirname(image) or ".")
        real = os.path.realpath(path)
        is_elsewhere = os.path.commonpath((home, real)) != home
        is_hidden = any(part.startswith(".") for part in os.path.relpath(real, home).split(os.sep))
        if is_elsewhere or is_hidden or (os.path.exists(real) and not os.path.isfile(real)):
            raise Refused(
                f"The image names '{path}' as its data file, which is no file in the image's own directory, or hidden there",
                remedy="If it is the right one, name it by the option data-file (--data-file on the command line).",
            )
    return NodeOptions("file", settings={"filename": path})


def _open_backing(
    structure: Structure,
    entry: Entry,
    settled: _Inherited,
    file: Node,
    named: tuple[str, str | None] | None,
    above: tuple[str, ...],
) -> Node | None:
    overridden = "backing" in entry.options.children
    if overridden and entry.options.children["backing"] in (None, ""):
        return None
    if not overridden and named is None:
        return None
    bottom = protocol_file(file)
    image = bottom.filename if bottom else ""
    above = (*above, image)
    below = replace(settled, read_only=True, auto_read_only=False)
    try:
        if len(above) > MAX_CHAIN:
            raise InvalidRequest(f"The backing chain of '{above[0]}' has more than {MAX_CHAIN} images")
        if overridden:
            backing = _child(structure, entry, "backing", below, above)
        else:
            backing = _open_named(structure, image, named, below, above)
        if backing is None:
            return None
    except StillframeError as error:
        # The same refusal, said of the backing file.
        error.message = f"Could not open backing file: {error.message}"
        error.args = (error.message,)
        raise
    structure.connect(Edge(backing, "backing", parent=entry))
    if not settled.read_only:
        _refuse_hidden_writes(_node_of(backing))
    return _node_of(backing)


def _refuse_hidden_writes(node: Node) -> None:
    """Before anything is written over a backing file: what comes to light below it later would not fit to that.

    :raise Refused: an image of the chain was left by a killed process, and not opened for writing since.
    """
    from stillframe.block.qcow2 import Qcow2Node

    here: Node | None = node
    while here is not None:
        if isinstance(here, Qcow2Node) and here.hides_writes(seconds=HIDDEN_WRITES_SECONDS):
            name = bottom_name(here)
            raise Refused(
                f"Could not open backing file: {_HIDDEN_WRITES.format(name)}",
                remedy=f"Run `stillframe image check --repair leaks {name}`, which brings them into the file.",
            )
        here = here.children.get("backing")


def bottom_name(node: Node) -> str:
    """The name of the file at the bottom of a node, or that of the node."""
    file = protocol_file(node)
    return file.filename if file else node.node_name


def _open_named(
    structure: Structure,
    image: str,
    named: tuple[str, str | None] | None,
    below: _Inherited,
    above: tuple[str, ...],
) -> Entry | None:
    if named is None:
        return None
    name, kind = named
    options = backing_options(image, name, kind)
    if options.driver not in ("file", "host_device") or kind == "file":
        return _open(structure, options, below, owned=False, above=above)
    # A bare file: the header did not say what is in it.
    probe = _open(structure, options, below, owned=False, above=above)
    driver = probe_format(_node_of(probe))
    structure.drop(probe)
    return _open(structure, NodeOptions(driver, children={"file": options}), below, owned=False, above=above)


def backing_options(image: str, name: str, kind: str | None) -> NodeOptions:
    """An image's words for what lies below it: read-only, no names of nodes, no locks of its own choosing.

    :param image: the file with the words. :param kind: the driver, where the header names one; else the
        answer may be a bare file, to be probed.
    :raise Unsupported: a driver or protocol that we do not do. :raise InvalidRequest: options that are none.
    """
    if name.startswith("json:"):
        options = read_options(parse_json_options(name.removeprefix("json:")))
        _refuse_what_only_users_may_ask(options)
        options = _read_only(options)
    else:
        path = name.removeprefix("file:")
        protocol = _PROTOCOL.match(path)
        if protocol:
            raise Unsupported(f"Unknown protocol '{protocol[1]}'")
        options = NodeOptions("file", settings={"filename": full_backing_name(image, path)})
    if kind is None or kind == options.driver or options.driver != "file":
        return options
    if kind not in ("qcow2", "raw"):
        raise Unsupported(f"Unknown driver '{kind}'")
    return NodeOptions(kind, children={"file": options})


def _refuse_what_only_users_may_ask(options: NodeOptions) -> None:
    for each in _tree(options):
        if any(isinstance(child, str) for child in each.children.values()):
            raise Unsupported("An image may not name a node of the machine as its backing file")
        if each.settings.get("latency-ns"):
            raise Unsupported("An image may not slow its backing file down (latency-ns)")
        file = each.children.get("file")
        inside = _tree(file) if each.driver == "qcow2" and isinstance(file, NodeOptions) else ()
        # Each of two would name a backing file: branches double with every image of a chain.
        if any(below.driver == "qcow2" for below in inside):
            raise Unsupported("An image may not name a qcow2 image inside another as its backing file")


def _tree(options: NodeOptions) -> Iterator[NodeOptions]:
    yield options
    for child in options.children.values():
        if isinstance(child, NodeOptions):
            yield from _tree(child)


def _read_only(options: NodeOptions) -> NodeOptions:
    children: dict[str, Any] = {
        role: _read_only(child) if isinstance(child, NodeOptions) else child
        for role, child in options.children.items()
    }
    settings = {name: value for name, value in options.settings.items() if name != "locking"}
    return replace(
        options, node_name=None, read_only=True, force_share=None, settings=settings, children=children
    )


def _node_of(entry: Entry) -> Node:
    if entry.node is None:
        raise InvalidRequest(f"Node '{entry.name}' has not been opened")
    return entry.node
