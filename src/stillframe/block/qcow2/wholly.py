"""Steps that change what memory and file say together, and so are done as a whole or leave the image without further writes.

An error of the storage is awaited at every step, and leaves both as they were. Want of memory, or an interrupt, comes anywhere.
What the file holds is whole all the same, since every order of writes is (mapping.py), but memory may say something else.
"""

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from stillframe.errors import StillframeError

if TYPE_CHECKING:
    from stillframe.block.qcow2.image import Image

P = ParamSpec("P")
R = TypeVar("R")


def wholly(step: "Callable[Concatenate[Image, P], R]") -> "Callable[Concatenate[Image, P], R]":
    """Decorates a function of an image: an error that is none of ours ends the writes to it."""

    @wraps(step)
    def run(image: "Image", /, *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return step(image, *args, **kwargs)
        except StillframeError:
            raise
        except BaseException as error:
            if image.broken is None:
                image.broken = f"The image takes no more writes: a change of its tables was interrupted ({type(error).__name__})"
            raise

    return run
