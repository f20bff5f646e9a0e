"""What happened, told to whoever asked: the machine, the block layer and jobs emit; monitors listen."""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Listener = Callable[["Event"], None]


@dataclass(frozen=True, slots=True)
class Event:
    """One event, in the words of QMP.

    :param name: as "JOB_STATUS_CHANGE".
    :param data: its members; empty where QMP prints none.
    :param time_ns: wall clock at the emission, nanoseconds since the epoch.
    """

    name: str
    data: Mapping[str, Any] = field(default_factory=dict)
    time_ns: int = field(default_factory=time.time_ns)


class EventBus:
    """Delivers each event to every listener, in one order for all of them.

    Any thread may emit. Listeners run on the emitting thread, under a lock that keeps the order: they hand the event on
    (`loop.call_soon_threadsafe`, a queue) and return; one that blocks stops the emitter, and one that emits deadlocks.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: list[Listener] = []

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Have `listener` called for every event from now on; the returned function ends it."""
        with self._lock:
            self._listeners.append(listener)

        def unsubscribe() -> None:
            with self._lock:
                self._listeners.remove(listener)

        return unsubscribe

    def emit(self, name: str, **data: Any) -> None:
        """Tell everybody. Keyword names with `_` stand for QMP's `-`, as `node_name` for `node-name`."""
        with self._lock:
            # Made in its turn, so that no event is older than the one told before it.
            self._tell(Event(name, {key.replace("_", "-"): value for key, value in data.items()}))

    def pass_on(self, event: Event) -> None:
        """Tell everybody of an event that was made elsewhere."""
        with self._lock:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        for listener in self._listeners:
            listener(event)
