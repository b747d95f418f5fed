"""The command line. Each command imports what it needs, so that `--help` answers at once.

Exit codes of the server's commands: 0 done, 1 it failed while it ran, 2 the command or the settings are wrong. Those
of the client's commands are in `exits.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from tesapi.cli import commands_run, commands_tasks
from tesapi.cli.exits import EPILOG, ReaderLeft

if TYPE_CHECKING:
    from tesapi.settings import Loaded

_SETTINGS = click.option(
    "--settings",
    "path",
    type=click.Path(path_type=Path),
    help="The settings file, instead of settings.toml in the working directory.",
)


class _Group(click.Group):
    def invoke(self, context: click.Context) -> Any:
        # click would make it an exit with 1.
        try:
            return super().invoke(context)
        except BrokenPipeError as error:
            raise ReaderLeft("Nobody reads standard output any more.") from error


@click.group(cls=_Group, no_args_is_help=False, epilog=EPILOG)
@click.version_option(package_name="tesapi", message="%(prog)s %(version)s")
def cli() -> None:
    """A GA4GH TES 1.1 server, and a client for any TES server."""


@cli.command()
@_SETTINGS
def serve(path: Path | None) -> None:
    """Take tasks over HTTP, and drive them."""
    _run_as("ALL", path)


@cli.command()
@_SETTINGS
def api(path: Path | None) -> None:
    """Take tasks over HTTP, and leave it to other processes to drive them."""
    _run_as("API", path)


@cli.command()
@_SETTINGS
def dispatcher(path: Path | None) -> None:
    """Drive the tasks that other processes take."""
    _run_as("DISPATCHER", path)


@cli.command("check-settings")
@_SETTINGS
def check_settings(path: Path | None) -> None:
    """Say whether the settings are valid, what they come to, and where each comes from."""
    loaded = _load(path)
    from tesapi.settings import describe

    rows = describe(loaded)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for key, value, source in rows:
        click.echo(f"{key:<{widths[0]}}  {value:<{widths[1]}}  {source}")
    for warning in loaded.warnings:
        click.echo(f"Warning: {warning}", err=True)


@cli.command()
@_SETTINGS
@click.option(
    "--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Those that ended before so many days."
)
@click.option("--keep", type=click.IntRange(min=0), metavar="COUNT", help="All but the so many that ended last.")
@click.option("--dry-run", is_flag=True, help="Only tell how many it would be.")
def purge(path: Path | None, older_than: float | None, keep: int | None, dry_run: bool) -> None:
    """Remove tasks that are over from the store; without options, those that the settings do not keep.

    On SQLite the service has to be stopped for it.
    """
    settings = _load(path).settings
    from datetime import timedelta

    from tesapi.app import retention_of
    from tesapi.cli.purge import run
    from tesapi.dispatch.retention import Retention
    from tesapi.errors import ConfigurationProblem, TesapiError

    given = Retention(None if older_than is None else timedelta(days=older_than), keep)
    retention = retention_of(settings) if given.keeps_all else given
    if retention.keeps_all:
        raise click.UsageError("Say which with --older-than or --keep: the settings (retention) keep all tasks.")
    try:
        click.echo(run(settings, retention, dry_run=dry_run))
    except TesapiError as error:
        click.echo(f"tesapi: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigurationProblem) else 1)


for _command in (
    commands_run.run,
    commands_tasks.submit,
    commands_tasks.get,
    commands_tasks.list_tasks,
    commands_tasks.wait,
    commands_tasks.cancel,
    commands_tasks.logs,
    commands_tasks.service_info,
    commands_tasks.destinations,
):
    cli.add_command(_command)


def _run_as(role: str, path: Path | None) -> NoReturn:
    loaded = _load(path)
    from tesapi.app import Role
    from tesapi.cli.serve import run

    sys.exit(run(loaded, Role[role]))


def _load(path: Path | None) -> Loaded:
    from tesapi.errors import ConfigurationProblem
    from tesapi.settings import load

    try:
        return load(path)
    except ConfigurationProblem as error:
        click.echo(f"tesapi: {error}", err=True)
        sys.exit(2)
