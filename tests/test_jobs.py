"""What a job promises whoever started it: its states, what may be asked of it in each, how it ends, and that
it always does.
"""

import itertools
import json
import queue
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stillframe.errors import AlreadyExists, Cancelled, InvalidRequest, IOFailed, NotFound, Refused
from stillframe.events import Event, EventBus
from stillframe.jobs import (
    TRANSITIONS,
    VERBS,
    JobContext,
    JobGroup,
    JobHooks,
    JobQueue,
    Jobs,
    JobStatus,
    JobVerb,
)
from stillframe.jobs.pace import Pace

PATIENCE = 20.0
TRANSCRIPTS = Path(__file__).parent / "data" / "transcripts"


class Steps:
    """A job's body that does what it is told, one step at a time; `done` counts the steps it has come
    through.
    """

    def __init__(self) -> None:
        self._steps: queue.Queue[Callable[[JobContext], None] | None] = queue.Queue()
        self._came_through = threading.Semaphore(0)

    def body(self, context: JobContext) -> None:
        while (step := self._steps.get(timeout=PATIENCE)) is not None:
            step(context)
            self._came_through.release()

    def begin(self, step: Callable[[JobContext], None] | None) -> None:
        """Have a step begun; None returns from the body."""
        self._steps.put(step)

    def do(self, step: Callable[[JobContext], None]) -> None:
        """Have a step done."""
        self.begin(step)
        assert self._came_through.acquire(timeout=PATIENCE)


def checkpoint(context: JobContext) -> None:
    context.checkpoint()


def fail(context: JobContext) -> None:
    raise IOFailed("Could not write to 'disk': Input/output error", errno=5)


def ready(context: JobContext) -> None:
    context.ready()


def complete(context: JobContext) -> None:
    context.wait_for_completion()


class Watched:
    """Jobs, and all that they told."""

    def __init__(self) -> None:
        self.events = EventBus()
        self.told: list[tuple[str, str]] = []
        self._changed = threading.Condition()
        self.events.subscribe(self._hear)
        self.jobs = Jobs(self.events)

    def _hear(self, event: Event) -> None:
        with self._changed:
            self.told.append((event.data["id"], event.data["status"]))
            self._changed.notify_all()

    def statuses(self, id: str) -> list[str]:
        return [status for each, status in self.told if each == id]

    def wait_for(self, id: str, status: str, times: int = 1) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self.statuses(id).count(status) >= times, PATIENCE), (
                self.told
            )

    def status(self, id: str) -> JobStatus:
        return next(job.status for job in self.jobs.query() if job.id == id)

    def error(self, id: str) -> str | None:
        info = self.jobs.wait_concluded(id, PATIENCE)
        assert info is not None, self.told
        return info.error


@pytest.fixture
def watched() -> Watched:
    return Watched()


# The course of a life


def test_a_job_that_succeeds_tells_every_state_in_order_and_stays_until_it_is_dismissed(
    watched: Watched,
) -> None:
    watched.jobs.create("j", "snapshot-save", lambda context: context.progress(3, 3))
    assert watched.told[:2] == [("j", "created"), ("j", "running")]
    assert watched.error("j") is None
    assert watched.statuses("j") == ["created", "running", "waiting", "pending", "concluded"]
    (info,) = watched.jobs.query()
    assert (info.current_progress, info.total_progress) == (3, 3)
    watched.jobs.dismiss("j")
    assert watched.statuses("j")[-1] == "null"
    assert watched.jobs.query() == []
    with pytest.raises(NotFound, match=r"^Job not found$"):
        watched.jobs.dismiss("j")


def test_a_job_that_fails_says_why_in_the_words_of_the_error(watched: Watched) -> None:
    watched.jobs.create("j", "snapshot-save", fail)
    assert watched.error("j") == "Could not write to 'disk': Input/output error"
    assert watched.statuses("j") == ["created", "running", "aborting", "concluded"]


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("1/0"), KeyboardInterrupt(), SystemExit(3), AssertionError()]
)
def test_an_error_that_nobody_foresaw_ends_the_job_and_is_logged(
    watched: Watched, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def body(context: JobContext) -> None:
        raise error

    watched.jobs.create("j", "snapshot-save", body)
    told = watched.error("j")
    assert told is not None
    assert type(error).__name__ in told
    assert any(record.exc_info and record.exc_info[1] is error for record in caplog.records)


def test_auto_dismissed_jobs_vanish(watched: Watched) -> None:
    watched.jobs.create("j", "snapshot-save", checkpoint, auto_dismiss=True)
    watched.wait_for("j", "null")
    assert watched.jobs.query() == []


def test_jobs_are_listed_newest_first(watched: Watched) -> None:
    for id in ("a", "b", "c"):
        watched.jobs.create(id, "snapshot-save", checkpoint)
    assert [job.id for job in watched.jobs.query()] == ["c", "b", "a"]


# Ids


@pytest.mark.parametrize(
    "id", ["", "1", "1a", "a b", "a/b", "a:b", "_x", ".x", "-x", "#b", "ü", "a#b", "a%b", "a\n"]
)
def test_ids_that_are_not_well_formed_are_refused(watched: Watched, id: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        watched.jobs.create(id, "snapshot-save", checkpoint)
    assert str(caught.value) == f"Invalid job ID '{id}'"
    assert not watched.told


@pytest.mark.parametrize("id", ["x" * 200, "a", "A-._9"])
def test_well_formed_ids_of_any_length_are_accepted(watched: Watched, id: str) -> None:
    watched.jobs.create(id, "snapshot-save", checkpoint)
    assert watched.error(id) is None


def test_an_id_is_taken_until_its_job_is_dismissed(watched: Watched) -> None:
    watched.jobs.create("j", "snapshot-save", checkpoint)
    watched.error("j")
    with pytest.raises(AlreadyExists, match=r"^Job ID 'j' already in use$"):
        watched.jobs.create("j", "snapshot-save", checkpoint)
    watched.jobs.dismiss("j")
    watched.jobs.create("j", "snapshot-save", checkpoint)
    assert watched.error("j") is None


# Pause, cancel


def test_a_paused_job_stands_still_until_it_is_resumed(watched: Watched) -> None:
    steps = Steps()
    watched.jobs.create("j", "snapshot-save", steps.body)
    watched.jobs.pause("j")
    assert watched.status("j") is JobStatus.RUNNING
    with pytest.raises(Refused, match=r"^Job is already paused$"):
        watched.jobs.pause("j")
    steps.begin(checkpoint)
    watched.wait_for("j", "paused")
    watched.jobs.resume("j")
    assert watched.status("j") is JobStatus.RUNNING
    with pytest.raises(Refused, match=r"^Can't resume a job that was not paused$"):
        watched.jobs.resume("j")
    steps.begin(None)
    assert watched.error("j") is None


def test_a_cancelled_job_undoes_its_work_and_says_so(watched: Watched) -> None:
    undone = []

    def body(context: JobContext) -> None:
        try:
            context.wait(PATIENCE)
        except Cancelled:
            undone.append(True)
            raise

    watched.jobs.create("j", "snapshot-save", body)
    watched.jobs.cancel("j")
    assert watched.error("j") == "Operation canceled"
    assert undone
    assert watched.statuses("j") == ["created", "running", "aborting", "concluded"]


def test_cancelling_a_paused_job_resumes_it_first(watched: Watched) -> None:
    steps = Steps()
    watched.jobs.create("j", "snapshot-save", steps.body, hooks=JobHooks(completable=True))
    steps.do(ready)
    steps.begin(complete)
    watched.jobs.pause("j")
    watched.wait_for("j", "standby")
    watched.jobs.cancel("j")
    assert watched.error("j") == "Operation canceled"
    assert watched.statuses("j") == [
        "created",
        "running",
        "ready",
        "standby",
        "ready",
        "aborting",
        "concluded",
    ]


def test_past_the_point_of_no_return_a_cancel_is_refused_and_the_work_is_done(watched: Watched) -> None:
    steps = Steps()
    watched.jobs.create("j", "snapshot-save", steps.body)
    steps.do(lambda context: context.point_of_no_return())
    with pytest.raises(Refused, match=r"^Job 'j' in state 'running' cannot accept command verb 'cancel'$"):
        watched.jobs.cancel("j")
    steps.do(checkpoint)
    steps.begin(None)
    assert watched.error("j") is None


def test_a_cancel_before_the_point_of_no_return_is_obeyed_there(watched: Watched) -> None:
    steps = Steps()
    watched.jobs.create("j", "snapshot-save", steps.body)
    watched.jobs.cancel("j")
    steps.begin(lambda context: context.point_of_no_return())
    assert watched.error("j") == "Operation canceled"


def test_a_job_whose_work_was_done_before_it_saw_the_cancel_does_not_claim_to_be_undone(
    watched: Watched,
) -> None:
    steps = Steps()
    watched.jobs.create("j", "snapshot-save", steps.body)
    watched.jobs.cancel("j")
    steps.begin(None)
    assert watched.error("j") is None


# Completion, finalisation


def test_a_ready_job_comes_to_its_end_when_it_is_told_to(watched: Watched) -> None:
    steps = Steps()
    watched.jobs.create("j", "snapshot-save", steps.body, hooks=JobHooks(completable=True))
    with pytest.raises(Refused, match="'running' cannot accept command verb 'complete'"):
        watched.jobs.complete("j")
    steps.do(ready)
    steps.begin(complete)
    watched.jobs.complete("j")
    steps.begin(None)
    assert watched.error("j") is None
    assert watched.statuses("j") == ["created", "running", "ready", "waiting", "pending", "concluded"]


def test_a_job_without_completion_says_so(watched: Watched) -> None:
    steps = Steps()
    watched.jobs.create("j", "snapshot-save", steps.body)
    steps.do(ready)
    with pytest.raises(Refused, match=r"^The active block job 'j' cannot be completed$"):
        watched.jobs.complete("j")
    steps.begin(None)
    watched.error("j")


def test_a_pending_job_waits_for_its_finalisation_and_commits_then(watched: Watched) -> None:
    done: list[str] = []
    hooks = JobHooks(commit=lambda: done.append("commit"), abort=lambda: done.append("abort"))
    watched.jobs.create("j", "snapshot-save", checkpoint, hooks=hooks, auto_finalize=False)
    watched.wait_for("j", "pending")
    assert done == []
    watched.jobs.finalize("j")
    assert watched.status("j") is JobStatus.CONCLUDED
    assert done == ["commit"]


def test_a_pending_job_that_is_cancelled_is_taken_back(watched: Watched) -> None:
    done: list[str] = []
    hooks = JobHooks(commit=lambda: done.append("commit"), abort=lambda: done.append("abort"))
    watched.jobs.create("j", "snapshot-save", checkpoint, hooks=hooks, auto_finalize=False)
    watched.wait_for("j", "pending")
    watched.jobs.cancel("j")
    assert watched.error("j") == "Operation canceled"
    assert done == ["abort"]
    assert watched.statuses("j")[-3:] == ["pending", "aborting", "concluded"]


def test_a_pending_job_that_cannot_be_taken_back_refuses_to_be_cancelled(watched: Watched) -> None:
    watched.jobs.create("j", "snapshot-save", checkpoint, auto_finalize=False)
    watched.wait_for("j", "pending")
    with pytest.raises(Refused, match="'pending' cannot accept command verb 'cancel'"):
        watched.jobs.cancel("j")
    watched.jobs.finalize("j")
    assert watched.error("j") is None


def test_a_commit_that_fails_fails_the_job_and_takes_it_back(watched: Watched) -> None:
    done: list[str] = []

    def commit() -> None:
        raise IOFailed("no", errno=5)

    hooks = JobHooks(commit=commit, abort=lambda: done.append("abort"))
    watched.jobs.create("j", "snapshot-save", checkpoint, hooks=hooks)
    assert watched.error("j") == "no"
    assert done == ["abort"]


# Queues


def test_jobs_of_one_queue_run_one_at_a_time_in_the_order_of_their_creation(watched: Watched) -> None:
    turns, steps = JobQueue(), Steps()
    watched.jobs.create("first", "snapshot-save", steps.body, queue=turns)
    for id in ("second", "third"):
        watched.jobs.create(id, "snapshot-save", checkpoint, queue=turns)
    watched.jobs.create("other", "snapshot-save", checkpoint)
    watched.error("other")
    assert watched.statuses("second") == ["created"]
    steps.begin(None)
    assert watched.error("third") is None
    order = [entry for entry in watched.told if entry[0] != "other" and entry[1] in ("running", "concluded")]
    assert order == [
        (id, status) for id in ("first", "second", "third") for status in ("running", "concluded")
    ]


def test_a_waiting_job_can_be_cancelled_and_never_begins(watched: Watched) -> None:
    turns, steps = JobQueue(), Steps()
    began: list[bool] = []
    watched.jobs.create("first", "snapshot-save", steps.body, queue=turns)
    watched.jobs.create("second", "snapshot-save", lambda context: began.append(True), queue=turns)
    watched.jobs.cancel("second")
    assert watched.error("second") == "Operation canceled"
    assert watched.statuses("second") == ["created", "aborting", "concluded"]
    steps.begin(None)
    assert watched.error("first") is None
    assert not began


def test_a_job_that_was_paused_while_it_waited_stands_still_before_it_begins(watched: Watched) -> None:
    turns, steps = JobQueue(), Steps()
    began: list[bool] = []
    watched.jobs.create("first", "snapshot-save", steps.body, queue=turns)
    watched.jobs.create("second", "snapshot-save", lambda context: began.append(True), queue=turns)
    watched.jobs.pause("second")
    steps.begin(None)
    watched.wait_for("second", "paused")
    assert not began
    watched.jobs.resume("second")
    assert watched.error("second") is None
    assert began


def test_internal_work_takes_its_turn_unseen_and_gives_its_own_error(watched: Watched) -> None:
    turns, steps = JobQueue(), Steps()
    watched.jobs.create("first", "snapshot-save", steps.body, queue=turns)
    raised: list[BaseException] = []

    def internal() -> None:
        try:
            watched.jobs.run_internal("savevm", fail, queue=turns)
        except IOFailed as error:
            raised.append(error)

    thread = threading.Thread(target=internal)
    thread.start()
    steps.begin(None)
    thread.join(PATIENCE)
    assert [error.errno for error in raised if isinstance(error, IOFailed)] == [5]
    assert {id for id, _ in watched.told} == {"first"}
    assert [job.id for job in watched.jobs.query()] == ["first"]


# The end of all


def test_at_the_end_all_jobs_are_cancelled_and_dismissed_newest_first(watched: Watched) -> None:
    turns, begun = JobQueue(), Steps()
    watched.jobs.create("done", "snapshot-save", checkpoint)
    watched.error("done")
    watched.jobs.create("running", "snapshot-save", lambda context: context.wait(PATIENCE), queue=turns)
    watched.jobs.create("waiting", "snapshot-save", checkpoint, queue=turns)
    watched.jobs.create("paused", "snapshot-save", begun.body)
    begun.do(lambda context: context.point_of_no_return())
    watched.jobs.pause("paused")
    begun.begin(checkpoint)
    begun.begin(None)
    watched.jobs.create("pending", "snapshot-save", checkpoint, auto_finalize=False)
    watched.wait_for("pending", "pending")
    assert watched.jobs.cancel_all_and_wait(PATIENCE)
    assert [id for id, status in watched.told if status == "null"] == [
        "pending",
        "paused",
        "waiting",
        "running",
        "done",
    ]
    assert "aborting" not in watched.statuses("paused") + watched.statuses("pending")
    assert "aborting" in watched.statuses("running")
    with pytest.raises(Refused, match="shut down"):
        watched.jobs.create("late", "snapshot-save", checkpoint)


def test_a_body_that_never_looks_up_does_not_keep_the_end_from_being_told(watched: Watched) -> None:
    stuck = threading.Event()
    watched.jobs.create("j", "snapshot-save", lambda context: stuck.wait(PATIENCE) and None)
    assert not watched.jobs.cancel_all_and_wait(0.01)
    stuck.set()
    assert watched.jobs.cancel_all_and_wait(PATIENCE)


# As QEMU


def recorded_refusals() -> list[tuple[str, str]]:
    """(state, verb) of every refusal that a real QEMU was recorded to make, and its words."""
    found = set()
    for path in TRANSCRIPTS.glob("jobs*.jsonl"):
        for record in map(json.loads, path.read_text().splitlines()):
            if record.get("dir") == "out" and "cannot accept command verb" in record["line"]:
                desc = json.loads(record["line"])["error"]["desc"]
                parts = desc.split("'")
                assert (
                    desc == f"Job '{parts[1]}' in state '{parts[3]}' cannot accept command verb '{parts[5]}'"
                )
                found.add((parts[3], parts[5]))
    return sorted(found)


@pytest.mark.parametrize(("state", "verb"), recorded_refusals())
def test_what_qemu_refuses_is_refused_in_its_words(watched: Watched, state: str, verb: str) -> None:
    steps = Steps()
    hooks = JobHooks(completable=True, abort=lambda: None)
    watched.jobs.create("j", "snapshot-save", steps.body, hooks=hooks, auto_finalize=False)
    course = {"running": [], "ready": [ready], "pending": [None], "concluded": [fail]}
    for step in course[state]:
        steps.begin(step)
    watched.wait_for("j", state)
    with pytest.raises(Refused) as caught:
        getattr(watched.jobs, verb)("j")
    assert str(caught.value) == f"Job 'j' in state '{state}' cannot accept command verb '{verb}'"
    steps.begin(None)


class JobLife(RuleBasedStateMachine):
    """One job, its body and its user in any order, against the table of transitions and the table of verbs."""

    def __init__(self) -> None:
        super().__init__()
        self.watched = Watched()
        self.steps = Steps()
        # A step that the body has begun and not come through: it stands in a pause, or in `ready`.
        self.waiting = False
        self.gone = False

    @initialize(auto_finalize=st.booleans(), auto_dismiss=st.booleans(), completable=st.booleans())
    def begin(self, auto_finalize: bool, auto_dismiss: bool, completable: bool) -> None:
        self.completable = completable
        self.watched.jobs.create(
            "j",
            "snapshot-save",
            self.steps.body,
            hooks=JobHooks(abort=lambda: None, completable=completable),
            auto_finalize=auto_finalize,
            auto_dismiss=auto_dismiss,
        )

    @property
    def status(self) -> JobStatus:
        for job in self.watched.jobs.query():
            return job.status
        return JobStatus.NULL

    def settle(self, step: Callable[[JobContext], None] | None) -> None:
        """Have the body take a step, and wait until it is through, or stands, or has ended."""
        reached = threading.Event()

        def then(context: JobContext) -> None:
            assert step is not None
            step(context)
            reached.set()

        told = len(self.watched.told)
        self.steps.begin(None if step is None else then)
        for _ in range(int(PATIENCE * 1000)):
            if reached.wait(0.001) or (
                len(self.watched.told) > told
                and self.status
                not in (
                    JobStatus.RUNNING,
                    JobStatus.READY,
                    JobStatus.WAITING,
                    JobStatus.ABORTING,
                )
            ):
                break
        self.waiting = not reached.is_set() and self.status in (JobStatus.PAUSED, JobStatus.STANDBY)

    def working(self) -> bool:
        return not self.waiting and self.status in (JobStatus.RUNNING, JobStatus.READY)

    @precondition(working)
    @rule(step=st.sampled_from([checkpoint, ready, fail, None]))
    def body(self, step: Callable[[JobContext], None] | None) -> None:
        self.settle(step)

    @rule(verb=st.sampled_from(list(JobVerb)))
    def user(self, verb: JobVerb) -> None:
        before = self.status
        arguments = (100,) if verb is JobVerb.SET_SPEED else ()
        try:
            getattr(self.watched.jobs, verb.value.replace("-", "_"))("j", *arguments)
        except NotFound:
            assert before is JobStatus.NULL
        except Refused as error:
            if "cannot accept command verb" in str(error):
                assert before not in VERBS[verb]
            else:
                assert verb in (JobVerb.PAUSE, JobVerb.RESUME, JobVerb.COMPLETE)
        else:
            assert before in VERBS[verb]
            if verb in (JobVerb.CANCEL, JobVerb.RESUME):
                self.waiting = False
            if verb is JobVerb.CANCEL:
                self.steps.begin(checkpoint)
                assert before is JobStatus.NULL or self.ended()

    def ended(self) -> bool:
        try:
            info = self.watched.jobs.wait_concluded("j", PATIENCE)
        except NotFound:
            return True
        return info is not None

    @invariant()
    def every_step_was_one_of_the_table(self) -> None:
        course = [JobStatus.UNDEFINED, *(JobStatus(status) for status in self.watched.statuses("j"))]
        for before, after in itertools.pairwise(course):
            assert after in TRANSITIONS[before]
            assert after is not before

    def teardown(self) -> None:
        self.steps.begin(None)
        assert self.watched.jobs.cancel_all_and_wait(PATIENCE)
        assert self.watched.jobs.query() == []
        assert self.watched.statuses("j")[-1] == "null"


TestJobLife = JobLife.TestCase
TestJobLife.settings = settings(max_examples=60, stateful_step_count=15, deadline=None)


# Speed


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_bytes_pass_no_faster_than_they_may_and_no_slower() -> None:
    clock = Clock()
    pace = Pace(clock)
    began, passed = clock.now, 0
    for count in (40, 1000, 30, 500) * 20:
        # The work itself takes time, too, which counts.
        clock.now += 0.25
        pace.moved(count)
        passed += count
        clock.now += pace.rest(100)
    assert clock.now - began == pytest.approx(passed / 100 + 0.25)


def test_an_idle_time_is_not_saved_up_for_a_burst() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.moved(100)
    assert pace.rest(100) == 1.0
    clock.now += 60
    pace.moved(200)
    assert pace.rest(100) == 0.0
    pace.moved(200)
    assert pace.rest(100) == 2.0


def test_another_limit_counts_from_when_it_is_set() -> None:
    clock = Clock()
    pace = Pace(clock)
    pace.moved(1000)
    assert pace.rest(100) == 10.0
    clock.now += 4
    assert pace.rest(200) == 3.0
    clock.now += 1
    assert pace.rest(0) == 0.0
    pace.moved(1 << 40)
    assert (pace.rest(0), pace.limited) == (0.0, False)


CENTURY = 1000
"""Bytes that take longer than any test, at one a second."""


def move(context: JobContext) -> None:
    context.moved(CENTURY)


def test_a_job_at_rest_goes_on_when_its_limit_is_lifted(watched: Watched) -> None:
    steps = Steps()
    watched.jobs.create("j", "snapshot-save", steps.body, speed=1)
    steps.begin(move)
    watched.jobs.set_speed("j", 0)
    steps.begin(None)
    assert watched.error("j") is None


def test_a_job_at_rest_is_paused_and_cancelled_at_once(watched: Watched) -> None:
    steps = Steps()
    watched.jobs.create("j", "snapshot-save", steps.body, speed=1)
    steps.begin(move)
    watched.jobs.pause("j")
    watched.wait_for("j", "paused")
    watched.jobs.resume("j")
    watched.jobs.cancel("j")
    assert watched.error("j") == "Operation canceled"


def test_the_end_of_all_jobs_lifts_the_limit_of_one_that_cannot_be_undone(watched: Watched) -> None:
    steps = Steps()
    watched.jobs.create("j", "snapshot-load", steps.body, speed=1)
    steps.do(JobContext.point_of_no_return)
    steps.begin(move)
    steps.begin(None)
    assert watched.jobs.cancel_all_and_wait(PATIENCE)
    assert watched.statuses("j")[-2:] == ["concluded", "null"]
    with pytest.raises(NotFound):
        watched.jobs.set_speed("j", 1)


@pytest.mark.parametrize("at", ["creation", "work"])
def test_a_negative_speed_is_refused(watched: Watched, at: str) -> None:
    steps = Steps()
    refused = pytest.raises(InvalidRequest, match="expects a non-negative value")
    if at == "creation":
        with refused:
            watched.jobs.create("j", "snapshot-save", steps.body, speed=-1)
        assert watched.jobs.query() == []
        return
    watched.jobs.create("j", "snapshot-save", steps.body)
    with refused:
        watched.jobs.set_speed("j", -1)
    steps.begin(None)
    assert watched.error("j") is None


# Groups

ENDS = ("returns", "fails", "is cancelled", "cannot commit")


@pytest.mark.parametrize("auto_finalize", [True, False])
@pytest.mark.parametrize(
    "ends", [*itertools.product(ENDS, repeat=2), ("returns", "returns", "fails")], ids=str
)
def test_jobs_of_a_group_become_final_together_or_none_does(
    ends: tuple[str, ...], auto_finalize: bool
) -> None:
    events = EventBus()
    jobs = Jobs(events)
    told: list[tuple[str, str]] = []
    events.subscribe(lambda event: told.append((str(event.data.get("id")), str(event.data.get("status")))))
    taken_back: list[str] = []
    released: list[str] = []
    group, steps, prepared = JobGroup(), [Steps() for _ in ends], []

    def refuse() -> None:
        raise IOFailed("Could not write to 'disk': Input/output error", errno=5)

    for number, end in enumerate(ends):
        id = f"j{number}"
        hooks = JobHooks(
            commit=refuse if end == "cannot commit" else None,
            abort=lambda id=id: taken_back.append(id),
            release=lambda id=id: released.append(id),
            is_block=True,
        )
        prepared.append(
            jobs.prepare(
                id,
                "backup",
                steps[number].body,
                hooks,
                auto_finalize=auto_finalize,
                auto_dismiss=False,
                speed=0,
                total=1,
                group=group,
            )
        )
    jobs.start(prepared)
    for number, (end, step) in enumerate(zip(ends, steps, strict=True)):
        if end == "is cancelled":
            # Another's failure may have been quicker.
            with suppress(Refused):
                jobs.cancel(f"j{number}")
            step.begin(checkpoint)
        elif end == "fails":
            step.begin(fail)
        step.begin(None)
    succeeds = all(end in ("returns", "cannot commit") for end in ends)
    if succeeds and not auto_finalize:
        deadline = threading.Event()
        while {job.status for job in jobs.query()} != {JobStatus.PENDING}:
            assert not deadline.wait(0.001)
        jobs.finalize("j0")
    infos = [jobs.wait_concluded(f"j{number}", PATIENCE) for number in range(len(ends))]
    assert all(info is not None for info in infos)
    errors = [info.error for info in infos if info is not None]
    if set(ends) == {"returns"}:
        assert errors == [None] * len(ends)
        assert taken_back == []
    else:
        assert None not in errors
    assert sorted(released) == [f"j{number}" for number in range(len(ends))]
    # Nobody was final before all were done.
    concluded = [index for index, (_, status) in enumerate(told) if status == "concluded"]
    if succeeds:
        assert min(concluded) > max(index for index, (_, status) in enumerate(told) if status == "pending")


def test_jobs_that_were_prepared_and_withdrawn_vanish_and_give_back_what_they_held() -> None:
    jobs = Jobs(EventBus())
    released: list[str] = []
    prepared = [
        jobs.prepare(
            id,
            "backup",
            checkpoint,
            JobHooks(release=lambda id=id: released.append(id)),
            auto_finalize=True,
            auto_dismiss=False,
            speed=0,
            total=1,
        )
        for id in ("a", "b")
    ]
    jobs.cancel("a")
    jobs.withdraw(prepared)
    assert released == ["a", "b"]
    assert [job.id for job in jobs.query()] == ["a"]
    jobs.check_new_id("b")
