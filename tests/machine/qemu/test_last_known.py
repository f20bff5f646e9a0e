"""What a QEMU's events say of its guest, which is what clients are told while it does not answer. No QEMU runs."""

from typing import Any

import pytest

from stillframe.errors import PeerError
from stillframe.events import Event
from stillframe.machine.engines.qemu.last_known import LastKnown
from stillframe.machine.engines.qemu.monitor import QemuMonitor


class Answering(QemuMonitor):
    """A monitor with an answer to `query-status`; what is heard before it is told first."""

    def __init__(self, known: LastKnown, answer: str | None, *heard: str) -> None:
        self._known, self._answer_is, self._heard = known, answer, heard

    def execute(self, command: str, *_: object, **__: object) -> Any:
        hear(self._known, *self._heard)
        if self._answer_is is None:
            raise PeerError("QEMU has not answered")
        return {"status": self._answer_is}


def hear(known: LastKnown, *events: str) -> list[str]:
    """Events, with an action behind a slash; those that clients are to hear."""
    told = []
    for each in events:
        name, _, action = each.partition("/")
        if known.hear(Event(name, {"action": action} if action else {}, 0)):
            told.append(each)
    return told


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ("", "prelaunch"),
        ("RESUME", "running"),
        ("RESUME STOP", "paused"),
        ("RESUME STOP RESUME", "running"),
        ("RESUME SHUTDOWN STOP", "shutdown"),
        ("RESUME SHUTDOWN STOP RESET", "prelaunch"),
        ("RESUME RESET", "running"),
        ("RESUME STOP RESET", "prelaunch"),
        ("RESUME BLOCK_IO_ERROR/stop STOP", "io-error"),
        ("RESUME BLOCK_IO_ERROR/stop STOP RESUME STOP", "paused"),
        ("RESUME BLOCK_IO_ERROR/report STOP", "paused"),
        ("RESUME GUEST_PANICKED/pause STOP", "guest-panicked"),
        ("RESUME GUEST_PANICKED/run", "running"),
        ("RESUME WATCHDOG/pause STOP", "watchdog"),
        ("RESUME SUSPEND", "suspended"),
        ("RESUME SUSPEND STOP", "paused"),
        ("RESUME SUSPEND STOP RESUME", "suspended"),
        ("RESUME SUSPEND WAKEUP", "running"),
        ("RESUME SUSPEND RESET", "prelaunch"),
    ],
)
def test_state_is_right_by_what_qemu_says_unasked(events: str, state: str) -> None:
    known = LastKnown()
    assert hear(known, *events.split()) == events.split()
    assert known.state == state


def test_guest_that_we_hold_for_a_save_is_shown_as_it_was_and_nobody_hears_of_it() -> None:
    known = LastKnown()
    hear(known, "RESUME")
    with known.pause():
        assert hear(known, "STOP") == []
        with known.pause():
            assert known.ask(Answering(known, "paused"), 1) == "paused"
            assert known.state == "running"
        assert (known.state, known.in_pause) == ("running", True)
        assert hear(known, "RESUME", "BLOCK_IO_ERROR/report") == ["BLOCK_IO_ERROR/report"]
    assert (known.state, known.in_pause) == ("running", False)


def test_guest_that_did_not_go_on_after_a_pause_of_ours_is_not_called_running() -> None:
    known = LastKnown()
    hear(known, "RESUME")
    with known.pause():
        hear(known, "STOP")
    assert known.state == "paused"


def test_guest_that_qemu_stops_for_the_last_pages_is_shown_running_unless_a_client_stops_it() -> None:
    known = LastKnown()
    hear(known, "RESUME")
    known.stops_itself = True
    assert hear(known, "STOP") == []
    assert known.ask(Answering(known, "finish-migrate"), 1) == "save-vm"
    assert known.state == "running"
    known.stop_asked = True
    # QEMU has nothing to say: the guest stands still.
    known.stopped()
    assert known.state == "paused"


def test_what_was_heard_since_qemu_was_asked_is_not_forgotten_for_its_answer() -> None:
    known = LastKnown()
    known.ask(Answering(known, "running"), 1)
    assert known.state == "running"
    known.ask(Answering(known, "running", "STOP"), 1)
    assert known.state == "paused"
    with pytest.raises(PeerError):
        known.ask(Answering(known, None), 1)
    known.ask(Answering(known, "debug"), 1)
    assert known.state == "debug"


def test_guest_of_another_qemu_stands_still_until_that_is_heard_of() -> None:
    known = LastKnown()
    hear(known, "RESUME", "SUSPEND")
    with known.pause():
        known.another()
        assert known.state == "suspended"
        hear(known, "RESUME")
    assert known.state == "running"


def test_end_is_shown_in_a_pause_too() -> None:
    known = LastKnown()
    hear(known, "RESUME")
    with known.pause():
        known.end(known.ask(Answering(known, "internal-error"), 1))
        assert known.state == "internal-error"
