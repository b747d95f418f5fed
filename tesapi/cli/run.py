"""`tesapi run`: a task from its submission to its end, as if its command ran here."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

from tesapi.cli.client import Client
from tesapi.cli.document import ServerFiles, Wish, build, has_local_files
from tesapi.cli.exits import ClientProblem, Exit, Unreachable
from tesapi.cli.follow import Follower
from tesapi.cli.show import Screen
from tesapi.cli.signals import Interrupted, Signals
from tesapi.cli.tasks import SETTLED, Task, exit_code, exit_for, last_words, state_of

CANCEL_PATIENCE_S = 60.0


def document_for(wish: Wish, client: Client, screen: Screen, *, offline: bool) -> dict[str, object]:
    """The document. Which of its files the server has is asked of it; `offline`, that may fail."""
    if not has_local_files(wish):
        return build(wish, ServerFiles({}))
    try:
        info = client.service_info()
    except Unreachable as error:
        if not offline:
            raise
        screen.say(f"{error} The document is for a server that has all the files.")
        info = {}
    return build(wish, ServerFiles(info))


def send(document: Mapping[str, object], client: Client, screen: Screen, signals: Signals) -> str:
    """Have a task made; its id. A first signal waits until the id is known. Raises Interrupted for a second one."""
    try:
        with signals.second_let_in():
            return client.create(document)
    except Interrupted:
        screen.say("Interrupted while the task was sent: it may have been made or not; see tesapi list.")
        raise


def run(wish: Wish, client: Client) -> int:
    """Submit it, print what it prints, and cancel it when interrupted; the exit code."""
    task_id = ""
    with Signals() as signals:
        screen = Screen(signals)
        follower = Follower(client, screen, signals)
        try:
            with signals.let_in():
                document = document_for(wish, client, screen, offline=False)
                client.connect()
            task_id = send(document, client, screen, signals)
            task = follower.follow(task_id)
        except Interrupted as interrupted:
            if task_id:
                return _stop(task_id, client, screen, follower, signals, interrupted)
            return interrupted.exit_code
        except BrokenPipeError:
            _discard_output()
            _stop(task_id, client, screen, follower, signals, None)
            return Exit.PIPE_CLOSED
        except ClientProblem as problem:
            if not task_id:
                raise
            screen.say(f"{problem} Task {task_id} may go on: tesapi logs -f {task_id}")
            return problem.exit_code
        finally:
            screen.clear()
    tell_end(task, screen)
    return exit_for(task)


def tell_end(task: Task, screen: Screen) -> None:
    """Say how it ended, unless that is what the exit code says."""
    state, code = state_of(task), exit_code(task)
    if state == "COMPLETE" or (state == "EXECUTOR_ERROR" and code is not None and not screen.has_terminal):
        return
    reason = f", exit code {code}" if state == "EXECUTOR_ERROR" and code is not None else ""
    words = last_words(task) if state != "EXECUTOR_ERROR" or code is None else ""
    screen.say(f"Task {task.get('id')}: {state}{reason}" + (f": {words}" if words else "."))


def _stop(
    task_id: str,
    client: Client,
    screen: Screen,
    follower: Follower,
    signals: Signals,
    interrupted: Interrupted | None,
) -> int:
    """Cancel the task, unless whoever sits at the terminal wants it to go on; the exit code of an interruption."""
    try:
        if interrupted is not None and not _is_to_end(interrupted, screen):
            screen.say(f"Task {task_id} goes on: tesapi logs -f {task_id}")
            return interrupted.exit_code
        with signals.let_in():
            client.cancel(task_id)
        task = follower.follow(task_id, patience_s=CANCEL_PATIENCE_S)
        screen.say(_sentence(task_id, state_of(task)))
    except Interrupted as again:
        screen.say(f"Left: task {task_id} was {follower.states.get(task_id, 'QUEUED')} when it was last seen.")
        return again.exit_code
    except ClientProblem as problem:
        screen.say(f"{problem} Task {task_id} may go on: tesapi cancel {task_id}")
    return Exit.PIPE_CLOSED if interrupted is None else interrupted.exit_code


def _is_to_end(interrupted: Interrupted, screen: Screen) -> bool:
    if interrupted.number != signal.SIGINT or not (screen.has_terminal and sys.stdin.isatty()):
        return True
    answer = screen.ask("Cancel the task? [Y/n]")
    return answer is not None and not answer.lower().startswith("n")


def _sentence(task_id: str, state: str) -> str:
    if state == "CANCELED":
        return f"Task {task_id} is CANCELED."
    if state in SETTLED:
        return f"Task {task_id} had come to its end: {state}."
    return f"Task {task_id} is to be canceled, and is still {state}."


def _discard_output() -> None:
    """Have whatever is still to be printed go nowhere, where the reader of standard output has left."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
