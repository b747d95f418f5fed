"""`tesapi run`, as it is typed. What it needs is imported when it runs, so that `--help` answers at once."""

from __future__ import annotations

import json
import math
import os
import sys

import click

from tesapi.cli.exits import EPILOG, UsageProblem


def _gigabytes(context: click.Context, parameter: click.Parameter, value: str | None) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise click.BadParameter(f"{value!r} is not a number of gigabytes.")
    return number


class _Run(click.Command):
    """Tells whoever forgot the `--` before the command."""

    def parse_args(self, context: click.Context, words: list[str]) -> list[str]:
        try:
            return super().parse_args(context, words)
        except click.NoSuchOption as error:
            if "--" in words:
                raise
            raise click.UsageError(f"{error.format_message()} Options of COMMAND go behind --.", context) from error


@click.command(cls=_Run, epilog=EPILOG)
@click.argument("image")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "-i", "--input", "inputs", metavar="NAME=FILE", multiple=True, help="A file or directory, or a URL, to read."
)
@click.option(
    "-o", "--output", "outputs", metavar="NAME=FILE", multiple=True, help="Where to store; DIR/ for a directory."
)
@click.option("-e", "--env", metavar="NAME=VALUE", multiple=True, help="A variable of the environment.")
@click.option("--cpu", metavar="N", type=click.IntRange(1), help="CPU cores.")
@click.option("--ram", metavar="GB", callback=_gigabytes, help="Memory.")
@click.option("--disk", metavar="GB", callback=_gigabytes, help="Disk space.")
@click.option("--name", default="", help="The task's name.")
@click.option("--workdir", metavar="PATH", default="", help="The working directory in the container.")
@click.option("--volume", "volumes", metavar="PATH", multiple=True, help="An empty directory in the container.")
@click.option("--tag", "tags", metavar="K=V", multiple=True, help="A tag.")
@click.option("--stdin", metavar="FILE", default="", help="A file or URL for standard input; - for this one.")
@click.option("--detach", is_flag=True, help="Print the task's id, and do not wait.")
@click.option("--json", "as_json", is_flag=True, help='With --detach: {"id": …}.')
@click.option("--print", "show_only", is_flag=True, help="Print the document instead of sending it.")
def run(
    image: str,
    command: tuple[str, ...],
    inputs: tuple[str, ...],
    outputs: tuple[str, ...],
    env: tuple[str, ...],
    cpu: int | None,
    ram: float | None,
    disk: float | None,
    name: str,
    workdir: str,
    volumes: tuple[str, ...],
    tags: tuple[str, ...],
    stdin: str,
    detach: bool,
    as_json: bool,
    show_only: bool,
) -> None:
    """Run a command in a container, as if it ran here.

    \b
      tesapi run alpine -- echo hello
      tesapi run -i in=a.txt -o out=b.txt alpine -- cp '$in' '$out'

    The places of inputs and outputs in the container stand in the command as $NAME, and are variables of its
    environment. What the task prints is printed here, and its exit code is this command's. Ctrl-C cancels it.
    """
    from tesapi.cli.client import Client
    from tesapi.cli.document import Wish, pairs
    from tesapi.cli.run import document_for, send
    from tesapi.cli.run import run as run_to_its_end
    from tesapi.cli.show import Screen
    from tesapi.cli.signals import Signals

    if not command:
        raise UsageProblem("Which command? tesapi run IMAGE -- COMMAND…")
    if as_json and not detach:
        raise UsageProblem("--json goes with --detach.")
    wish = Wish(
        image=image,
        command=command,
        inputs=pairs("-i", inputs),
        outputs=pairs("-o", outputs),
        env=pairs("-e", env),
        tags=pairs("--tag", tags),
        volumes=volumes,
        stdin=stdin,
        name=name,
        workdir=workdir,
        cpu_cores=cpu,
        ram_gb=ram,
        disk_gb=disk,
    )
    with Client(os.environ) as client:
        if show_only:
            document = document_for(wish, client, Screen(Signals()), offline=True)
            click.echo(json.dumps(document, indent=2))
        elif detach:
            with Signals() as signals:
                screen = Screen(signals)
                with signals.let_in():
                    client.connect()
                    document = document_for(wish, client, screen, offline=False)
                task_id = send(document, client, screen, signals)
                click.echo(json.dumps({"id": task_id}) if as_json else task_id)
        else:
            sys.exit(run_to_its_end(wish, client))
