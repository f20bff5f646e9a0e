"""The named differences of docs/differences.md and docs/monitor.md, as they show in a dialogue."""

import json
import re
from typing import Any

from conformance.dialogues import command_of
from conformance.replay import Explain, Mismatch, Partner, Told


def _replaced(value: Any, pairs: dict[str, str]) -> Any:
    text = json.dumps(value)
    for old, new in pairs.items():
        text = text.replace(json.dumps(old)[1:-1], json.dumps(new)[1:-1])
    return json.loads(text)


def _jobs_of(reply: Any) -> list[Any]:
    """What query-jobs told, if it is that."""
    told = reply.get("return")
    return [job for job in told if isinstance(job, dict)] if isinstance(told, list) else []


def we_speak(found: Mismatch, partner: Partner) -> bool:
    """The greeting and query-version say who speaks."""
    before = json.dumps(found.theirs.replies)
    package = re.search(r'"package": "([^"]*)"', json.dumps(found.ours.replies))
    if package is None:
        return False
    after = re.sub(r'"package": "[^"]*"', package.group(), before)
    if '"capabilities": []' in json.dumps(found.ours.replies):
        # What is offered goes with who speaks.
        after = after.replace('"capabilities": ["oob"]', '"capabilities": []')
    found.theirs.replies = json.loads(after)
    return json.dumps(found.theirs.replies) != before


def jobs_say_how(found: Mismatch, partner: Partner) -> bool:
    """`choices` beside what QEMU's query-jobs tells."""
    changed = False
    for reply in found.ours.replies:
        for job in _jobs_of(reply):
            changed |= job.pop("choices", None) is not None
    return changed


def failed_load_keeps_running(found: Mismatch, partner: Partner) -> bool:
    """No STOP for a load that is refused. From there on our guest is held as theirs is."""
    mentions = " ".join(found.step.sent)
    if "snapshot-load" in mentions or "loadvm" in mentions:
        stop = {"event": "STOP"}
        failed = "aborting" in _states(found.theirs) or "Error: " in json.dumps(found.theirs.replies)
        if failed and found.theirs.events.count(stop) > found.ours.events.count(stop):
            found.theirs.events.remove(stop)
            partner.quietly("stop")
            return True
        return False
    return _status_after_failed_load(found)


def _status_after_failed_load(found: Mismatch) -> bool:
    before = found.theirs.replies
    found.theirs.replies = _replaced(
        before, {"VM status: paused (restore-vm)": "VM status: paused", "restore-vm": "paused"}
    )
    return found.theirs.replies != before


def read_only_is_called_so(found: Mismatch, partner: Partner) -> bool:
    """The reason given is the reason."""
    before = found.theirs.replies
    named = re.findall(r"Device '(\w+)' is read-only and cannot take part", json.dumps(found.ours.replies))
    found.theirs.replies = _replaced(
        before,
        {
            f"Device '{name}' is writable but does not support snapshots": f"Device '{name}' is read-only and "
            "cannot take part in snapshots"
            for name in named
        },
    )
    return found.theirs.replies != before


def load_says_why(found: Mismatch, partner: Partner) -> bool:
    """A colon and the reason after "Error -22 while loading VM state"; nothing on standard error."""
    changed = False
    for theirs, ours in zip(found.theirs.replies, found.ours.replies, strict=False):
        pairs = zip(_jobs_of(theirs), _jobs_of(ours), strict=False)
        for left, right in pairs:
            if right.get("error", "").startswith(f"{left.get('error', chr(0))}: "):
                left["error"] = right["error"]
                changed = True
    if found.step.sent == ["(the end)"] and any("savevm section" in line for line in found.theirs.events):
        found.theirs.events = [line for line in found.theirs.events if "savevm section" not in line]
        changed = True
    return changed


_LONGEST = 255


def _arguments(found: Mismatch) -> dict[str, Any]:
    """Of the only line that was sent, if it is a request."""
    try:
        (line,) = found.step.sent
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    arguments = message.get("arguments") if isinstance(message, dict) else None
    return arguments if isinstance(arguments, dict) else {}


def _refused(words: str) -> Explain:
    """What is done there, and refused here in these words."""

    def explain(found: Mismatch, partner: Partner) -> bool:
        arguments = _arguments(found)
        if "aborting" in _states(found.ours) and "aborting" not in _states(found.theirs):
            if words not in partner.error_of(arguments.get("job-id", "")):
                return False
        elif words not in json.dumps(found.ours.replies) or words in json.dumps(found.theirs.replies):
            return False
        tag = arguments.get("tag", arguments.get("name"))
        if tag is not None:
            partner.not_saved.add(tag.encode()[:_LONGEST].decode())
        found.theirs = found.ours
        return True

    return explain


def _states(told: Told) -> list[str]:
    return [event["data"]["status"] for event in told.events if "status" in event.get("data", {})]


def snapshot_that_we_did_not_make(found: Mismatch, partner: Partner) -> bool:
    """A list without what was refused here; ids after it are lower by one."""
    absent = partner.not_saved
    if not absent:
        return False
    for told in (found.theirs, found.ours):
        told.replies = [_without(reply, absent) for reply in told.replies]
    return True


def _without(value: Any, absent: set[str]) -> Any:
    if isinstance(value, list):
        return [_without(each, absent) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {name: _without(member, absent) for name, member in value.items()}
    if isinstance(kept.get("snapshots"), list):
        kept["snapshots"] = [{**each, "id": "?"} for each in kept["snapshots"] if each["name"] not in absent]
        if not kept["snapshots"]:
            del kept["snapshots"]
    return kept


def partial_lists_name_nodes(found: Mismatch, partner: Partner) -> bool:
    """QEMU names the device, which nodes do not have."""
    before = found.ours.replies
    found.ours.replies = json.loads(re.sub(r"snapshots on '[^']*'", "snapshots on ''", json.dumps(before)))
    return found.ours.replies != before


def images_are_listed_once(found: Mismatch, partner: Partner) -> bool:
    """A list for each node on an image there; here one for the image, in the place of the node on top."""
    before = json.dumps(found.theirs.replies)
    for told in (found.theirs, found.ours):
        for reply in told.replies:
            text = reply.get("return")
            if isinstance(text, str) and "List of partial" in text:
                reply["return"] = sorted(set(text.removesuffix("\r\n").split("\r\n\r\n")))
    return json.dumps(found.theirs.replies) != before


def savevm_replaces_last(found: Mismatch, partner: Partner) -> bool:
    """The new snapshot is there before the old one goes, so that ids run ahead."""
    if not partner.name.startswith("hmp"):
        return False
    if "info snapshots" in " ".join(found.step.sent):
        for told in (found.theirs, found.ours):
            told.replies = json.loads(re.sub(r"\\n\d+ +", r"\\n? ", json.dumps(told.replies)))
        return True
    if "query-named-block-nodes" in " ".join(found.step.sent):
        for told in (found.theirs, found.ours):
            told.replies = [_without(reply, set()) for reply in told.replies]
        return True
    return False


def jobs_can_be_cancelled(found: Mismatch, partner: Partner) -> bool:
    """Requests sent together: there a snapshot job is over before the next one is read."""
    if len(found.step.sent) != 1 or found.step.sent[0].count('"execute"') < 2:
        return False
    theirs, ours = found.theirs, found.ours
    if "snapshot-" not in found.step.sent[0] or len(theirs.replies) != len(ours.replies):
        return False
    found.theirs = found.ours
    return True


def own_commands(found: Mismatch, partner: Partner) -> bool:
    """Lists of all commands, and the schema, hold what there is here; what there is not is not found."""
    if not found.step.sent:
        return False
    name = command_of(found.step.sent[0])
    ours, theirs = json.dumps(found.ours.replies), json.dumps(found.theirs.replies)
    refused = f"The command {name} has not been found" in ours or "unknown command: '" in ours
    if name in ("query-commands", "query-qmp-schema") or (refused and theirs != ours):
        if refused and (job := _arguments(found).get("job-id")) is not None:
            partner.not_started.add(job)
        found.theirs = found.ours
        return True
    return _without_jobs(found, partner.not_started)


def _without_jobs(found: Mismatch, absent: set[str]) -> bool:
    """What is asked of a job that nobody could start here is not found; the list of jobs is without it."""
    if command_of(found.step.sent[0]) == "query-jobs":
        before = json.dumps(found.theirs.replies)
        for reply in found.theirs.replies:
            reply["return"] = [job for job in _jobs_of(reply) if job["id"] not in absent]
        return json.dumps(found.theirs.replies) != before
    asked = [job for job in absent if job == _arguments(found).get("id")]
    if not asked or not all("Job not found" in json.dumps(reply) for reply in found.ours.replies):
        return False
    found.theirs = found.ours
    return True


def quit_pauses_no_job(found: Mismatch, partner: Partner) -> bool:
    """A job that is paused and runs again, before it is cancelled by `quit`."""
    if [command_of(line) for line in found.step.sent] != ["quit"]:
        return False
    kept: list[Any] = []
    for event in found.theirs.events:
        job = event.get("data", {}).get("id")
        if event == _changed(job, "running") and kept and kept[-1] == _changed(job, "paused"):
            kept.pop()
        else:
            kept.append(event)
    changed = kept != found.theirs.events
    found.theirs.events = kept
    return changed


def _changed(job: str | None, status: str) -> Any:
    return {"event": "JOB_STATUS_CHANGE", "data": {"id": job, "status": status}}


def backups_have_no_block_size(found: Mismatch, partner: Partner) -> bool:
    """No warning on standard error of a target that does not say its block size."""
    if found.step.sent != ["(the end)"]:
        return False
    before = found.theirs.events
    found.theirs.events = [line for line in before if "provide information about the block size" not in line]
    return found.theirs.events != before


DIFFERENCES: dict[str, Explain] = {
    "who-speaks": we_speak,
    "jobs-say-how": jobs_say_how,
    "failed-load-keeps-running": failed_load_keeps_running,
    "read-only-is-called-so": read_only_is_called_so,
    "load-says-why": load_says_why,
    "no-cut-names": _refused("255 are allowed"),
    "tag-on-any-node": _refused("already exists in one or more devices"),
    "no-node-twice": _refused("is listed twice"),
    "partial-lists-name-nodes": partial_lists_name_nodes,
    "images-are-listed-once": images_are_listed_once,
    "savevm-replaces-last": savevm_replaces_last,
    "jobs-can-be-cancelled": jobs_can_be_cancelled,
    "quit-pauses-no-job": quit_pauses_no_job,
    "backups-have-no-block-size": backups_have_no_block_size,
    "own-commands": own_commands,
    "lists-follow": snapshot_that_we_did_not_make,
}
