"""New image files: made whole and durable, or not left behind."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

from stillframe.block.file import FileNode, file_beside, remove_file, same_file
from stillframe.block.node import Node
from stillframe.block.opening import probe_format, protocol_file
from stillframe.errors import AlreadyExists, InvalidRequest, Refused, StillframeError, Unsupported

Preallocation = Literal["off", "metadata", "falloc", "full"]

_ZEROES = bytes(1 << 20)

MAX_SIZE = (1 << 63) - 512
"""The largest disk, in bytes, that QEMU's tools take."""


def create_raw(
    filename: str, size: int, *, replace: bool = False, preallocation: Preallocation = "off"
) -> None:
    """A raw image of so many zeroes.

    :param size: bytes; rounded up to a multiple of 512, as qemu-img does it.
    :param replace: an existing file of that name is lost, instead of refused.
    :param preallocation: "falloc" reserves the space, "full" writes the zeroes; else the file is sparse.
    :raise AlreadyExists: see `replace`. :raise NoSpace: and other errors of storage; no new file is left.
    """
    _refuse_size(size)
    _refuse_metadata_alone(preallocation)
    with _new_file(filename, replace) as file:
        _fill_raw(file, size, preallocation)
        file.flush()


def create_file(filename: str, size: int, preallocation: Preallocation = "off") -> None:
    """A file of so many zeroes, as exact as asked for; one of that name is taken if it is empty, as managers leave it.

    :raise AlreadyExists: there is one that is not. Else as `create_raw`.
    """
    _refuse_size(size)
    _refuse_metadata_alone(preallocation)
    try:
        is_empty = os.path.isfile(filename) and os.stat(filename).st_size == 0
    except OSError:
        is_empty = False
    with _new_file(filename, replace=is_empty) as file:
        try:
            file.truncate(size)
            _take_space(file, 0, size, preallocation)
            file.flush()
        except BaseException:
            if is_empty:
                file.truncate(0)
            raise


def format_qcow2(node: Node, size: int, options: Mapping[str, Any]) -> None:
    """Make an open node an empty qcow2 image; on an error it reads as zeroes, and has the size that it had.

    :param size: of the disk, bytes. :param options: as `create_qcow2` takes them.
    :raise AlreadyExists: it holds a qcow2 image. :raise InvalidRequest: an option out of its bounds.
    """
    from stillframe.block.qcow2 import create_image

    _refuse_size(size)
    if size % 512:
        raise InvalidRequest("Image size must be a multiple of 512 bytes")
    if "backing_format" in options and "backing_file" not in options:
        raise InvalidRequest("Backing format cannot be used without backing file")
    if node.read_only:
        raise Refused(f"Node '{node.node_name}' is read-only")
    if probe_format(node) == "qcow2":
        raise AlreadyExists(
            f"Node '{node.node_name}' holds a qcow2 image", remedy="Remove its file, or take another one."
        )
    before = node.size
    try:
        create_image(node, size, **options)
        node.flush()
    except Refused:
        # Before anything was written.
        raise
    except BaseException:
        node.truncate(0)
        node.truncate(before)
        raise


def create_qcow2(
    filename: str,
    size: int,
    *,
    replace: bool = False,
    options: Mapping[str, Any] | None = None,
) -> None:
    """An empty qcow2 image.

    :param size: of the disk, bytes.
    :param options: keyword arguments of `stillframe.block.qcow2.create_image`; a data file is made, too, of the name that
        `data_file` gives, which starts at the image's own directory.
    :raise InvalidRequest: an option out of its bounds. Else as `create_raw`.
    """
    from stillframe.block.opening import full_backing_name
    from stillframe.block.qcow2 import create_image

    _refuse_size(size)
    options = dict(options or {})
    data_file = options.get("data_file")
    with ExitStack() as files:
        file = files.enter_context(_new_file(filename, replace))
        if data_file is not None:
            path = full_backing_name(filename, data_file)
            if same_file(filename, path):
                raise InvalidRequest("The data file cannot be the image itself")
            options["data"] = files.enter_context(_new_file(path, replace))
        create_image(file, size, **options)


@contextmanager
def new_image(
    filename: str,
    kind: str,
    size: int,
    *,
    replace: bool = False,
    options: Mapping[str, Any] | None = None,
    backing: Node | None = None,
) -> Iterator[Node]:
    """A new image to be filled, which takes its name when the block has ended, whole and durable.

    Before that it lies beside that name, and whatever ends the block removes it (`file_beside`).

    :param kind: "raw" or "qcow2". :param size: of the disk, bytes. :param replace: once it is whole, instead of an existing file.
    :param options: as `create_raw` and `create_qcow2` take them. :param backing: the open node that shows below it.
    """
    from stillframe.block.raw import RawNode

    _refuse_size(size)
    settings = dict(options or {})
    if kind == "raw":
        _refuse_metadata_alone(settings.get("preallocation", "off"))
    with file_beside("file", filename, replace=replace) as file:
        node: Node
        if kind == "raw":
            _fill_raw(file, size, settings.get("preallocation", "off"))
            node = RawNode("image", file)
        else:
            from stillframe.block.qcow2 import Qcow2Node, create_image

            create_image(file, size, **settings)
            node = Qcow2Node("image", file, backing=backing)
        try:
            yield node
        except BaseException:
            with suppress(StillframeError):
                node.close()
            raise
        node.close()


def _fill_raw(file: FileNode, size: int, preallocation: Preallocation) -> None:
    file.truncate(-(-size // 512) * 512)
    _take_space(file, 0, file.size, preallocation)


def _refuse_metadata_alone(preallocation: Preallocation) -> None:
    if preallocation == "metadata":
        raise Unsupported(
            f"Unsupported preallocation mode: {preallocation}",
            remedy="A raw image has no metadata: it takes falloc and full.",
        )


def grow_raw(node: Node, size: int, preallocation: Preallocation) -> None:
    """Make a raw disk larger, with space taken for what is new, durably; on an error it has the size that it had.

    :param preallocation: "falloc" reserves the space, "full" writes zeroes to it.
    :raise NoSpace: there is not so much.
    """
    file = protocol_file(node)
    if file is None:
        raise Unsupported(f"Node '{node.node_name}' has no file to take space for")
    before, new = node.size, size - node.size
    start = file.size
    try:
        _take_space(file, start, new, preallocation)
        node.flush()
    except BaseException:
        node.truncate(before)
        raise


def _take_space(file: FileNode, offset: int, length: int, preallocation: Preallocation) -> None:
    if preallocation == "falloc":
        file.reserve(offset, length)
    elif preallocation == "full":
        file.truncate(offset + length)
        for at in range(offset, offset + length, len(_ZEROES)):
            file.write(at, memoryview(_ZEROES)[: offset + length - at])


def _refuse_size(size: int) -> None:
    if not 0 <= size <= MAX_SIZE:
        raise InvalidRequest(f"Invalid image size specified. Must be between 0 and {MAX_SIZE}.")


@contextmanager
def _new_file(filename: str, replace: bool) -> Iterator[FileNode]:
    """A file to fill; if the block fails it is removed, unless it was there before."""
    if os.path.lexists(filename) and not replace:
        raise AlreadyExists(
            f"'{filename}' exists already", remedy="Choose another name, or remove that file first."
        )
    undo: Callable[[], None] = (lambda: None) if os.path.lexists(filename) else lambda: remove_file(filename)
    file = FileNode.create("file", filename, replace=replace)
    try:
        yield file
        file.close()
    except BaseException:
        _close_and(file, undo)
        raise


def _close_and(file: FileNode, undo: Callable[[], None]) -> None:
    try:
        file.close()
    finally:
        undo()
