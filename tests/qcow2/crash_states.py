"""Every state that a death of the machine, or of the process, can leave of recorded files.

What the storage promises, and nothing more: a flush of a file that has returned makes durable what was done to that file
before it; a durable write that has returned stands, whatever becomes of what was done before it. The other changes since the flush
are *open*:

    process death   all of them stand
    power loss      any of them stand, in any combination; of a write, a zeroing or a punch any of its sectors of 512 bytes,
                    of a truncate all or nothing

Where two that stand changed the same bytes, the later one is seen. So a state is: the durable bytes, and for each open change
which of its sectors stand.

From a log come all process deaths, one after each change, and of power losses: for each *window* (what is open just before the
end of a flush or of a durable write, or at the end of the log; earlier instants are subsets of it) first those that are most
telling, then seeded samples without end.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

from block.faults import Change, Flush, Mark, Step, Truncate, Write, apply

SECTOR = 512
ALL_SUBSETS_UP_TO = 6
"""Open changes of which every subset is tried."""

ALL_TEARS_UP_TO = 4
"""Sectors of a write of which every subset is tried."""

TIRED_AFTER = 70
"""Choices of a window in a row that brought nothing new, after which nothing new is expected; more than all subsets of a few."""

Files = tuple[bytes, ...]
Choice = dict[int, frozenset[int] | None]
"""Which open changes stand, by number; None for the whole of one, else its sectors by number."""


@dataclass(frozen=True, slots=True)
class State:
    """Files as a crash leaves them.

    :param digest: equal for equal files, and for others but once in 2**64.
    :param may_hold: the last mark before the crash (worlds.py).
    :param model: "process death" or "power loss". :param at: steps of the log before the crash.
    """

    files: Files
    digest: int
    may_hold: object
    model: str
    at: int


@dataclass(frozen=True, slots=True)
class Window:
    """An instant, and what is open then.

    :param changes: since the flush. :param standing: the numbers of those that are not open.
    """

    durable: Files
    changes: tuple[Change, ...]
    standing: frozenset[int]
    mark: object
    at: int


def states(start: Files, steps: Sequence[Step], *, power_losses: int, seed: int) -> Iterator[State]:
    """States of a log: every process death, then so many different power losses, if there are so many.

    The same files come again where what may be found in them differs.

    :param start: the files before the first step, all durable.
    """
    known: set[tuple[int, int]] = set()
    for state in process_deaths(start, steps):
        if (state.digest, id(state.may_hold)) not in known:
            known.add((state.digest, id(state.may_hold)))
            yield state
    digests = {digest for digest, _ in known}
    chance = random.Random(seed)
    turns = [_Turn(window, _choices(window.changes, chance)) for window in windows(start, steps)]
    while turns and power_losses > 0:
        # A turn each, so that a small number of states still comes from all windows.
        for turn in list(turns):
            choice = next(turn.choices, None)
            if choice is None or turn.in_vain == TIRED_AFTER or not power_losses:
                turns.remove(turn)
                continue
            state = _left(turn.window, choice)
            is_new = state.digest not in digests
            turn.in_vain = 0 if is_new else turn.in_vain + 1
            if (state.digest, id(state.may_hold)) not in known:
                known.add((state.digest, id(state.may_hold)))
                digests.add(state.digest)
                power_losses -= is_new
                yield state


@dataclass(slots=True)
class _Turn:
    window: Window
    choices: Iterator[Choice]
    in_vain: int = 0


def process_deaths(start: Files, steps: Sequence[Step]) -> Iterator[State]:
    """After each change, and after each mark, all stands that was done."""
    present = [bytearray(each) for each in start]
    files, mark = start, None
    for at, step in enumerate(steps):
        match step:
            case Flush():
                continue
            case Mark(what):
                mark = what
            case _:
                apply(present[step.file], step)
                files = tuple(map(bytes, present))
        yield _state(files, mark, "process death", at + 1)


def windows(start: Files, steps: Sequence[Step]) -> Iterator[Window]:
    """Before the end of each flush that ends something, and of each durable write, and at the end."""
    durable = [bytearray(each) for each in start]
    changes: list[Change] = []
    mark = None

    def window(at: int, returned: int) -> Window:
        standing = frozenset(n for n, each in enumerate(changes[:returned]) if _is_durable(each))
        return Window(tuple(map(bytes, durable)), tuple(changes), standing, mark, at)

    for at, step in enumerate([*steps, *map(Flush, range(len(start)))]):
        match step:
            case Mark(what):
                mark = what
            case Flush(file) if any(each.file == file for each in changes):
                yield window(at, len(changes))
                for each in changes:
                    if each.file == file:
                        apply(durable[file], each)
                changes = [each for each in changes if each.file != file]
            case Flush():
                pass
            case _:
                changes.append(step)
                if _is_durable(step):
                    yield window(at, len(changes) - 1)


def _is_durable(change: Change) -> bool:
    return isinstance(change, Write) and change.is_durable


def _choices(changes: Sequence[Change], chance: random.Random) -> Iterator[Choice]:
    """What may stand of the changes: first the telling choices, then samples until none is new."""
    numbers = range(len(changes))
    whole: Choice = dict.fromkeys(numbers)
    if len(changes) <= ALL_SUBSETS_UP_TO:
        for count in range(len(changes) + 1):
            for chosen in combinations(numbers, count):
                yield dict.fromkeys(chosen)
    else:
        yield {}
        for number in numbers:
            yield {other: None for other in numbers if other != number}
            yield {number: None}
    for number, change in enumerate(changes):
        sectors = _sectors(change)
        if 2 <= sectors <= ALL_TEARS_UP_TO:
            for stands in list(product((False, True), repeat=sectors))[1:-1]:
                torn = frozenset(sector for sector in range(sectors) if stands[sector])
                yield whole | {number: torn}
                yield {number: torn}
    tried = set()
    in_vain = 0
    while in_vain < TIRED_AFTER:
        whole_share, torn_share = chance.random(), chance.random()
        choice: Choice = {}
        for number, change in enumerate(changes):
            sectors = _sectors(change)
            if sectors > 1 and chance.random() < torn_share / 2:
                share = chance.random()
                choice[number] = frozenset(s for s in range(sectors) if chance.random() < share)
            elif chance.random() < whole_share:
                choice[number] = None
        size = len(tried)
        tried.add(frozenset(choice.items()))
        in_vain = in_vain + 1 if len(tried) == size else 0
        if not in_vain:
            yield choice


def _sectors(change: Change) -> int:
    """How many sectors a change touches; a truncate is one thing."""
    if isinstance(change, Truncate):
        return 1
    length = len(change.data) if isinstance(change, Write) else change.length
    return (change.offset + length - 1) // SECTOR - change.offset // SECTOR + 1


def _left(window: Window, choice: Choice) -> State:
    """The state in which this stands."""
    files = [bytearray(each) for each in window.durable]
    for number, change in enumerate(window.changes):
        if number in choice or number in window.standing:
            sectors = None if number in window.standing else choice[number]
            for part in [change] if sectors is None else _torn(change, sectors):
                apply(files[change.file], part)
    return _state(tuple(map(bytes, files)), window.mark, "power loss", window.at)


def _torn(change: Change, sectors: frozenset[int]) -> Iterator[Change]:
    """The parts of a change that fall into these of its sectors."""
    if isinstance(change, Truncate):
        yield change
        return
    length = len(change.data) if isinstance(change, Write) else change.length
    base = change.offset // SECTOR * SECTOR
    for sector in sorted(sectors):
        first = max(change.offset, base + sector * SECTOR)
        end = min(change.offset + length, base + (sector + 1) * SECTOR)
        if isinstance(change, Write):
            yield replace(change, offset=first, data=change.data[first - change.offset : end - change.offset])
        else:
            yield replace(change, offset=first, length=end - first)


def _state(files: Files, mark: object, model: str, at: int) -> State:
    return State(files, hash(files), mark, model, at)
