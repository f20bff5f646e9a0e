"""The states of a job, where each may lead, and what may be asked of a job in each."""

from dataclasses import dataclass
from enum import Enum
from typing import Final


class JobStatus(Enum):
    """Where a job is in its life."""

    UNDEFINED = "undefined"
    CREATED = "created"
    RUNNING = "running"
    PAUSED = "paused"
    READY = "ready"
    STANDBY = "standby"
    WAITING = "waiting"
    PENDING = "pending"
    ABORTING = "aborting"
    CONCLUDED = "concluded"
    NULL = "null"


class JobVerb(Enum):
    """What a client can ask of a job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    SET_SPEED = "set-speed"
    COMPLETE = "complete"
    FINALIZE = "finalize"
    DISMISS = "dismiss"


_S = JobStatus
TRANSITIONS: Final = {
    _S.UNDEFINED: frozenset({_S.CREATED}),
    _S.CREATED: frozenset({_S.RUNNING, _S.ABORTING, _S.NULL}),
    _S.RUNNING: frozenset({_S.PAUSED, _S.READY, _S.WAITING, _S.ABORTING}),
    _S.PAUSED: frozenset({_S.RUNNING}),
    _S.READY: frozenset({_S.STANDBY, _S.WAITING, _S.ABORTING}),
    _S.STANDBY: frozenset({_S.READY}),
    _S.WAITING: frozenset({_S.PENDING, _S.ABORTING}),
    _S.PENDING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.ABORTING: frozenset({_S.ABORTING, _S.CONCLUDED}),
    _S.CONCLUDED: frozenset({_S.NULL}),
    _S.NULL: frozenset(),
}
"""Where a job may go from each state."""

_ACTIVE = frozenset({_S.CREATED, _S.RUNNING, _S.PAUSED, _S.READY, _S.STANDBY})
VERBS: Final = {
    JobVerb.CANCEL: _ACTIVE | {_S.WAITING, _S.PENDING},
    JobVerb.PAUSE: _ACTIVE,
    JobVerb.RESUME: _ACTIVE,
    JobVerb.SET_SPEED: _ACTIVE,
    JobVerb.COMPLETE: frozenset({_S.READY, _S.STANDBY}),
    JobVerb.FINALIZE: frozenset({_S.PENDING}),
    JobVerb.DISMISS: frozenset({_S.CONCLUDED}),
}
"""In which states each verb is accepted."""


@dataclass(frozen=True, slots=True)
class JobChoice:
    """One of several ways in which a job could do its work, and the one that it took.

    :param what: it is about, as "memory". :param chosen: a word for the way. :param why: not another one; may be empty.
    """

    what: str
    chosen: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class JobInfo:
    """A job as `query-jobs` tells it.

    :param current_progress: in the body's own unit, usually bytes. :param total_progress: where it is done;
        may grow.
    :param error: why it failed or that it was cancelled; None if it did not, or has not yet.
    :param choices: in the order in which they were made.
    """

    id: str
    type: str
    status: JobStatus
    current_progress: int
    total_progress: int
    error: str | None = None
    choices: tuple[JobChoice, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockJobInfo:
    """A block job as `query-block-jobs` tells it.

    :param speed: its limit, bytes a second; 0 for none. :param busy: something is being done at this moment.
    """

    info: JobInfo
    speed: int
    busy: bool
    paused: bool
    auto_finalize: bool
    auto_dismiss: bool
