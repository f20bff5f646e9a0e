"""How long to rest after so many bytes, so that they do not pass faster than they may."""

import time
from collections.abc import Callable


class Pace:
    """Bytes that have passed and whose time has not. The time before a call of `moved` is that call's; more is not saved up.

    :param clock: seconds, never going back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ahead = 0.0
        self._since = clock()
        self._speed = 0

    @property
    def limited(self) -> bool:
        """Whether there was a limit when `rest` was asked last."""
        return self._speed != 0

    def moved(self, count: int) -> None:
        """So many bytes have passed."""
        self._ahead += count

    def rest(self, speed: int) -> float:
        """Seconds to rest from now on; to be asked again after them, or when the limit changes.

        :param speed: bytes a second from now on; 0 for no limit.
        """
        now = self._clock()
        if self._speed:
            self._ahead = max(0.0, self._ahead - (now - self._since) * self._speed)
        self._since, self._speed = now, speed
        if not speed:
            self._ahead = 0.0
            return 0.0
        return self._ahead / speed
