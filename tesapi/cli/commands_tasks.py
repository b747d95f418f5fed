"""The commands on tasks that are there, and `submit`. What they need is imported when they run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tesapi.cli.exits import EPILOG, ClientProblem, Exit, UsageProblem

if TYPE_CHECKING:
    from tesapi.cli.tasks import Task

_VIEW = click.Choice(["MINIMAL", "BASIC", "FULL"], case_sensitive=False)
_STATES = "UNKNOWN QUEUED INITIALIZING RUNNING PAUSED COMPLETE EXECUTOR_ERROR SYSTEM_ERROR CANCELED PREEMPTED CANCELING"
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document per line.")


@click.command(epilog=EPILOG)
@click.argument("file", metavar="FILE|-")
@_JSON
def submit(file: str, as_json: bool) -> None:
    """Submit the TES documents in FILE, and print the tasks' ids.

    One document, a JSON list of them, or several one after the other; `-` reads standard input.
    """
    from tesapi.cli.client import Client
    from tesapi.cli.document import read_documents
    from tesapi.cli.run import send
    from tesapi.cli.show import Screen
    from tesapi.cli.signals import Signals

    documents = read_documents(_text(file), file)
    with Client(os.environ) as client, Signals() as signals:
        with signals.let_in():
            client.connect()
        for number, document in enumerate(documents, 1):
            signals.look()
            try:
                task_id = send(document, client, Screen(signals), signals)
            except ClientProblem as error:
                if len(documents) == 1:
                    raise
                raise type(error)(f"Document {number} of {len(documents)}: {error} None was sent after it.") from error
            click.echo(json.dumps({"id": task_id}) if as_json else task_id)


def _text(file: str) -> str:
    try:
        data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
        return data.decode("utf-8-sig")
    except OSError as error:
        raise UsageProblem(f"{file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageProblem(f"{file} is not UTF-8 text.") from error


@click.command(epilog=EPILOG)
@click.argument("task_id", metavar="ID")
@click.option("--view", type=_VIEW, default="FULL", show_default=True, help="How much the server is to tell.")
@_JSON
def get(task_id: str, view: str, as_json: bool) -> None:
    """Show a task: its state, and what became of it. With --json, the task as the server tells it."""
    from tesapi.cli.client import Client
    from tesapi.cli.describe import task_lines

    with Client(os.environ) as client:
        task = client.get(task_id, view.upper())
    for line in [json.dumps(task)] if as_json else task_lines(task):
        click.echo(line)


@click.command("list", epilog=EPILOG)
@click.option("--state", type=click.Choice(_STATES.split(), case_sensitive=False), help="Those in this state.")
@click.option("--name-prefix", metavar="TEXT", default="", help="Those whose name begins so.")
@click.option("--tag", "tags", metavar="K=V", multiple=True, help="Those with this tag; K alone for any value.")
@click.option("--limit", metavar="N", type=click.IntRange(1), help="The newest N; else all.")
@click.option("--view", type=_VIEW, default="BASIC", show_default=True, help="How much the server is to tell.")
@_JSON
def list_tasks(
    state: str | None, name_prefix: str, tags: tuple[str, ...], limit: int | None, view: str, as_json: bool
) -> None:
    """List tasks, newest first: id, state, creation time, name."""
    from tesapi.cli.client import Client
    from tesapi.cli.describe import row

    asked = [(key, value) for key, _, value in (tag.partition("=") for tag in tags)]
    with Client(os.environ) as client:
        found = client.find(
            view=view.upper(), state=(state or "").upper(), name_prefix=name_prefix, tags=asked, limit=limit or 0
        )
        for task in found:
            click.echo(json.dumps(task) if as_json else row(task))


@click.command(epilog=EPILOG)
@click.argument("task_ids", metavar="ID…", nargs=-1, required=True)
@_JSON
def wait(task_ids: tuple[str, ...], as_json: bool) -> None:
    """Wait until the tasks have ended, and print the state of each as it does.

    The exit code is that of the task, as for run; with several, 0 where all are COMPLETE, else 1. With --json:
    {"id": …, "state": …, "exit_code": …}, the last one null where there is none.
    """
    from tesapi.cli.client import Client
    from tesapi.cli.follow import Follower
    from tesapi.cli.show import Screen, colored, plain
    from tesapi.cli.signals import Signals
    from tesapi.cli.tasks import exit_code, exit_for, state_of

    def tell(task: Task) -> None:
        task_id, state, code = task.get("id"), state_of(task), exit_code(task)
        if as_json:
            screen.result(json.dumps({"id": task_id, "state": state, "exit_code": code}))
            return
        reason = f" exit code {code}" if state == "EXECUTOR_ERROR" and code is not None else ""
        screen.result(f"{plain(str(task_id))} {colored(state)}{reason}")

    with Client(os.environ) as client, Signals() as signals:
        screen = Screen(signals)
        with signals.let_in():
            client.connect()
        try:
            ended = Follower(client, screen, signals).wait(task_ids, tell)
        finally:
            screen.clear()
    codes = {exit_for(task) for task in ended}
    sys.exit(codes.pop() if len(ended) == 1 or codes == {Exit.DONE} else Exit.FAILED)


@click.command(epilog=EPILOG)
@click.argument("task_ids", metavar="ID…", nargs=-1, required=True)
def cancel(task_ids: tuple[str, ...]) -> None:
    """Cancel tasks, and print the state that each is in then. One that has ended stays as it is."""
    from tesapi.cli.client import Client
    from tesapi.cli.show import colored, plain
    from tesapi.cli.tasks import state_of

    worst: ClientProblem | None = None
    with Client(os.environ) as client:
        client.connect()
        for task_id in task_ids:
            try:
                client.cancel(task_id)
                state = state_of(client.get(task_id, "MINIMAL"))
            except ClientProblem as error:
                if len(task_ids) == 1:
                    raise
                click.echo(f"tesapi: {plain(task_id)}: {error}", err=True)
                worst = error
            else:
                click.echo(f"{plain(task_id)} {colored(state)}")
    if worst is not None:
        sys.exit(worst.exit_code)


@click.command(epilog=EPILOG)
@click.argument("task_id", metavar="ID")
@click.option("-f", "--follow", is_flag=True, help="Go on until the task has ended.")
def logs(task_id: str, follow: bool) -> None:
    """Print what a task printed: its standard output and standard error, each to our own.

    Servers keep the end of each only. Exit code 0 whatever became of the task.
    """
    from tesapi.cli.client import Client
    from tesapi.cli.follow import Follower
    from tesapi.cli.run import tell_end
    from tesapi.cli.show import Screen
    from tesapi.cli.signals import Signals
    from tesapi.cli.tasks import state_of

    with Client(os.environ) as client, Signals() as signals:
        screen = Screen(signals)
        follower = Follower(client, screen, signals)
        with signals.let_in():
            client.connect()
            now = client.get(task_id, "FULL")
        try:
            follower.print_news(now)
            task = follower.follow(task_id) if follow else now
        finally:
            screen.clear()
    if state_of(task) in ("SYSTEM_ERROR", "PREEMPTED"):
        tell_end(task, screen)


@click.command("service-info", epilog=EPILOG)
@_JSON
def service_info(as_json: bool) -> None:
    """Show what the server tells of itself."""
    from tesapi.cli.client import Client
    from tesapi.cli.describe import service_lines

    with Client(os.environ) as client:
        info = client.service_info()
    for line in [json.dumps(info)] if as_json else service_lines(info):
        click.echo(line)


@click.command(epilog=EPILOG)
@_JSON
def destinations(as_json: bool) -> None:
    """List the places where the server runs tasks, and how they are."""
    from tesapi.cli.client import Client
    from tesapi.cli.describe import destination_lines

    with Client(os.environ) as client:
        found = client.destinations()
    for line in map(json.dumps, found) if as_json else destination_lines(found):
        click.echo(line)
