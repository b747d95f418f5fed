"""The command line as a process: one sentence for whatever goes wrong, and the exit code."""

from __future__ import annotations

import os
import sys
from typing import NoReturn, TextIO

import click

from tesapi.cli.commands import cli
from tesapi.cli.exits import ClientProblem, Exit
from tesapi.cli.show import plain
from tesapi.cli.signals import Interrupted


def main() -> NoReturn:
    """Run the command that was typed, and exit."""
    _tolerate(sys.stdout)
    _tolerate(sys.stderr)
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
    except ClientProblem as error:
        return _fail(str(error), error.exit_code)
    except click.Abort:
        return Exit.INTERRUPTED
    except Interrupted as interrupted:
        return interrupted.exit_code
    except BrokenPipeError:
        # Python would complain when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.PIPE_CLOSED
    return code if isinstance(code, int) else Exit.DONE


def _fail(sentence: str, code: int) -> int:
    click.echo(f"tesapi: {plain(sentence)}", err=True)
    return code


def _sentence(message: str) -> str:
    text = " ".join(message.split())
    return text if text.endswith((".", "?", "!")) else text + "."


def _tolerate(stream: TextIO) -> None:
    """Have characters that the terminal's encoding does not know written as escapes."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
