"""The command line as a process: one sentence for whatever goes wrong, and the exit code."""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import NoReturn, TextIO

import click

from tesapi.cli.commands import cli
from tesapi.cli.exits import ClientProblem, Exit, ReaderLeft
from tesapi.cli.show import plain
from tesapi.cli.signals import Interrupted


def main() -> NoReturn:
    """Run the command that was typed, and exit."""
    sys.stdout, sys.stderr = _usable(sys.stdout), _usable(sys.stderr)
    sys.exit(_run())


def _run() -> int:
    try:
        code = cli.main(prog_name="tesapi", standalone_mode=False)
        sys.stdout.flush()
    except click.UsageError as error:
        path = error.ctx.command_path if error.ctx is not None else "tesapi"
        return _fail(f"{_sentence(error.format_message())} Try {path} --help.", Exit.USAGE)
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (ReaderLeft, BrokenPipeError):
        # Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.PIPE_CLOSED
    except ClientProblem as error:
        return _fail(str(error), error.exit_code)
    except click.Abort:
        return Exit.INTERRUPTED
    except Interrupted as interrupted:
        return interrupted.exit_code
    return code if isinstance(code, int) else Exit.DONE


def _fail(sentence: str, code: int) -> int:
    click.echo(f"tesapi: {plain(sentence)}", err=True)
    return code


def _sentence(message: str) -> str:
    text = " ".join(message.split())
    return text if text.endswith((".", "?", "!")) else text + "."


def _usable(stream: TextIO | None) -> TextIO:
    """A stream that takes everything: one that was closed (`>&-`) discards it, and what its encoding does not know is
    written as escapes."""
    if stream is None:
        return open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123 - for as long as the process lives
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return stream
