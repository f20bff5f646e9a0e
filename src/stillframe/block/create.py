"""New image files: made whole and durable, or not left behind."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from stillframe.block.file import FileNode, remove_file, same_file
from stillframe.errors import AlreadyExists, InvalidRequest

MAX_SIZE = (1 << 63) - 512
"""The largest disk, in bytes, that QEMU's tools take."""


def create_raw(filename: str, size: int, *, replace: bool = False) -> None:
    """A raw image of so many zeroes, sparse.

    :param size: bytes; rounded up to a multiple of 512, as qemu-img does it.
    :param replace: an existing file of that name is lost, instead of refused.
    :raise AlreadyExists: see `replace`. :raise NoSpace: and other errors of storage; no new file is left.
    """
    _refuse_size(size)
    with _new_file(filename, replace) as file:
        file.truncate(-(-size // 512) * 512)
        file.flush()


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
