"""What was said between a test and a machine, in a form that two machines can be compared by."""

import difflib
import json
from dataclasses import dataclass, field
from typing import Any

from stillframe.testing.matching import plain


@dataclass(slots=True)
class Transcript:
    """Commands with their replies and the events, each in its order.

    Where a reply stands among events is a race, so the two are kept apart; times, sizes and progress are not kept at all.

    :ivar replies: command and reply, by turns. :ivar events: of those that were captured.
    """

    replies: list[Any] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)

    def command(self, request: Any, reply: Any) -> None:
        """Add a command and what came of it."""
        self.replies += [request, plain(reply)]

    def event(self, event: Any) -> None:
        """Add an event."""
        self.events.append(plain(event))

    def difference(self, other: "Transcript") -> str:
        """What differs, as lines of a unified diff; "" if nothing does."""
        left, right = (
            [json.dumps(each, sort_keys=True) for each in (*told.replies, *told.events)]
            for told in (self, other)
        )
        return "\n".join(difflib.unified_diff(left, right, lineterm="", n=2))
