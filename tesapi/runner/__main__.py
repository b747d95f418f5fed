"""Run one job: `python3 runner.py JOB.JSON`, as often as anybody likes; its commands run once.

 1. Take the job's lock. Held by somebody: another runner lives; say what it says until it ends, or is gone.
 2. The report has an end: say it again. Started, but nobody alive and no end: remove what was left, report that.
 3. Canceled before it began: report that, and do nothing.
 4. Note durably that the job is started, and leave a watchdog behind for the case that this process is killed.
 5. Read the job; refuse every URL, image and path that cannot be served, before anything moves.
 6. Stage the inputs in.
 7. Run the executors in order; stop at the first error that is not to be ignored.
 8. Open what containers of other users left closed. Store the outputs that are there, after an error too: workflow
    engines need their logs and exit files.
 9. Report the end, and dismiss the watchdog; remove the task's files, where the job says so.

Standard output is the report. The exit code is 0 whenever the report tells the end, whatever that was.
`--sweep JOB.JSON` removes what a dead runner left, waits for the lock to do so, and reports the end.
`--roll-call CALLS.JSON` asks after many jobs, and waits for none; `--probe OPTIONS.JSON` looks for a container runtime.
Both print one line of JSON.
`--warm DESCRIPTOR DIRECTORY` waits for jobs below a directory, and forks a runner for each (`warm`).
"""

from __future__ import annotations

import json
import os
import sys
from typing import List, Optional

from . import guard, leftovers, mounts, stage
from .execute import run_step
from .job import Job, Places, Refused, read
from .report import Report, echo, plain
from .runtimes.base import Runtime, make
from .storage.base import StorageFailure, Storages


def main(arguments: List[str]) -> int:
    """What the module's docstring says; the process's exit code."""
    if arguments[:1] == ["--warm"]:
        from . import warm

        return warm.serve(int(arguments[1]), main)
    option = arguments[0] if arguments and arguments[0].startswith("--") else ""
    paths = arguments[1:] if option else arguments
    if len(paths) != 1 or option not in ("", "--sweep", "--roll-call", "--probe"):
        os.write(2, b"usage: runner.py [--sweep] JOB.JSON | --roll-call CALLS.JSON | --probe OPTIONS.JSON\n")
        return 2
    if option in ("--roll-call", "--probe"):
        return _answer(option, paths[0])
    sweeping = option == "--sweep"
    places = Places(paths[0])
    os.makedirs(places.metadata, exist_ok=True)
    _close_to_others(places.document)
    stop = guard.Stop(places.cancelled, places.lock)
    try:
        lock = guard.take_lock(places.lock, wait=sweeping)
    except Refused as error:
        Report(places.report).write("ended", outcome="system_error", reason=str(error))
        return 0
    attached = lock is None
    if lock is None:
        lock = guard.attach(places)
    if lock is None:
        return 0
    report = Report(places.report)
    if report.lines and not attached:
        _repeat(places)
    if report.ended:
        return 0
    if os.path.exists(places.started) or sweeping:
        _finish(places, report)
    elif stop.canceled:
        report.write("ended", outcome="canceled")
    else:
        _run(places, stop, lock, report)
    return 0


def _answer(option: str, path: str) -> int:
    if option == "--probe":
        from . import probe  # most runners never look for a runtime

        answer = probe.answer(path, os.path.abspath(sys.argv[0]))
    else:
        with open(path, encoding="ascii") as file:
            calls = json.load(file)
        notes: List[str] = []
        answer = {"event": "roll_call", "jobs": guard.roll_call(calls, notes.append), "notes": notes}
    echo((json.dumps(answer) + "\n").encode("ascii"))
    return 0


def _close_to_others(document: str) -> None:
    """It may hold credentials, and Pulsar writes files that everybody may read."""
    try:
        os.chmod(document, 0o600)
    except OSError:
        return  # it is somebody else's, or gone, which reading it tells


def _repeat(places: Places) -> None:
    with open(places.report, "rb") as file:
        echo(file.read())


def _finish(places: Places, report: Report) -> None:
    guard.finish_for_the_dead(places, guard.runtime_of(places, report.note), report)


def _run(places: Places, stop: guard.Stop, lock: int, report: Report) -> None:
    """Steps 4 to 9. Whatever goes wrong here becomes the job's end, in a sentence."""
    watchdog = None
    tidy = False
    try:
        job = read(places.document)
        tidy = job.tidy
        runtime = make(job.runtime, job.owner, report.note)
        guard.mark_started(places.started)
        watchdog = guard.Watchdog(places, runtime, lock)
        report.reserve()
        report.write("started", host=_host())
        guard.sweep_others(job.runtime, runtime, report.note)
        outcome, reason = _story(job, places, runtime, stop, report)
    except guard.Stopped:
        outcome, reason = ("canceled", None) if stop.canceled else ("system_error", stop.reason)
    except (Refused, StorageFailure) as error:
        outcome, reason = "system_error", str(error)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        outcome, reason = "system_error", f"The runner could not go on: {error.strerror}{where}."
    except Exception as error:  # noqa: BLE001 - a bug of ours is to end the job with its name, not to leave it open
        outcome, reason = "system_error", f"The runner failed: {type(error).__name__}: {error}."
    report.free()
    report.write("ended", outcome=outcome, reason=None if reason is None else plain(reason))
    report.sync()
    if watchdog is not None:
        watchdog.dismiss()
    if tidy:
        _remove(places.work)


def _remove(folder: str) -> None:
    """Remove the task's files, also where it has closed its own folders, or nested them very deep."""
    import subprocess

    for command in (["chmod", "-R", "u+rwX"], ["rm", "-rf"]):
        subprocess.run([*command, "--", folder], stdin=subprocess.DEVNULL, capture_output=True, check=False)


def _story(job: Job, places: Places, runtime: Runtime, stop: guard.Stop, report: Report) -> tuple[str, Optional[str]]:
    """Steps 5 to 8: the outcome, and a sentence where it is not success."""
    storages = Storages(job.storage)
    images = sorted({step.image for step in job.steps})
    refused = stage.refusal(job, storages)
    for image in images:
        refused = refused or runtime.unsupported(image)
    if refused is not None:
        raise Refused(refused)
    for sentence in runtime.unenforced(job.limits):
        report.note(sentence)
    for image in images:
        runtime.pull(image, stop.check)
    layout = mounts.plan(job, places.work)
    mounts.make_folders(job, layout)
    stage.stage_in(job, layout, storages, report, stop.check)
    mounts.make_mount_points(layout)  # before the folders around them are opened to all
    if runtime.foreign_users:
        mounts.open_to_all(layout)
    try:
        failed = _run_steps(job, places, runtime, layout, stop, report)
        if runtime.foreign_users:
            leftovers.open_up(job, layout, places.work, report.note, stop.check)
    except BaseException:
        if runtime.foreign_users:
            leftovers.open_up(job, layout, places.work, report.note)
        raise
    problems = stage.stage_out(job, layout, storages, report, stop.check)
    if failed is not None:
        for problem in problems:
            report.note(problem)
        return "executor_error", failed
    return ("system_error", " ".join(problems)) if problems else ("complete", None)


def _run_steps(
    job: Job, places: Places, runtime: Runtime, layout: mounts.Layout, stop: guard.Stop, report: Report
) -> Optional[str]:
    """Step 7: a sentence on the error that it stopped at."""
    for step in job.steps:
        end = run_step(step, job, places, runtime, layout, stop, report)
        if end.exit_code != 0 and stop.canceled:
            raise guard.Stopped  # whoever cancels may have told the container before us
        if end.exit_code != 0 and not step.ignore_error:
            because = f": {end.reason}" if end.reason else "."
            return f"Executor {step.number} ended with exit code {end.exit_code}{because}"
        if end.reason:
            report.note(f"Executor {step.number}: {end.reason}")
    return None


def _host() -> str:
    return os.uname().nodename


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
