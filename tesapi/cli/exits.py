"""The exit codes of the client commands, and the errors that lead to them.

ClientProblem
├── UsageProblem      what was typed cannot be done; nothing was sent
├── Unreachable       no TES server answers there; the request had no effect
├── ServerFailed      the server answers, and with a failure of its own, or with something that is not TES
├── Refused           the server will not do it; repeating it will not help
│   ├── NotPermitted  for want of credentials
│   └── NotFound      for want of the task
├── AnswerLost        the request was sent and its answer never came: it may or may not have been done
└── ReaderLeft        nobody reads standard output any more
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar

from tesapi.errors import TesapiError


class Exit(IntEnum):
    """How a client command ends. `docs/cli.md` and every `--help` list them."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    REFUSED = 65
    NOT_FOUND = 66
    UNREACHABLE = 69
    SYSTEM_ERROR = 70
    CANCELED = 71
    ANSWER_LOST = 74
    SERVER_FAILED = 76
    NOT_PERMITTED = 77
    INTERRUPTED = 130
    PIPE_CLOSED = 141
    TERMINATED = 143


EPILOG = """\b
Exit codes:
  0      done; for run and wait: the task is COMPLETE
  1-255  run, and wait of one task: the container's own, of an EXECUTOR_ERROR
  1      a task failed, and there is no such code
  2      the command line is wrong
  65     the server refused the request      66   no such task
  69     no server answers at TES_URL        70   SYSTEM_ERROR or PREEMPTED
  71     CANCELED                            74   sent, but the answer was lost
  76     the server failed                   77   not permitted (TES_TOKEN)
  130    interrupted (Ctrl-C)                141  the reader of the output left
  143    terminated

\b
Environment:
  TES_URL    the server, by default http://localhost:8080
  TES_TOKEN  sent as a Bearer token; user:password@ in TES_URL as HTTP Basic
  NO_COLOR   no colors
"""


class ClientProblem(TesapiError):
    """Why a client command cannot go on; its text is one sentence for a person."""

    exit_code: ClassVar[Exit] = Exit.FAILED


class UsageProblem(ClientProblem):
    """What was typed cannot be done; nothing was sent."""

    exit_code = Exit.USAGE


class Unreachable(ClientProblem):
    """No TES server answers there; the request had no effect."""

    exit_code = Exit.UNREACHABLE


class ServerFailed(ClientProblem):
    """The server answers with a failure of its own, or with something that is not TES."""

    exit_code = Exit.SERVER_FAILED


class Refused(ClientProblem):
    """The server will not do it; repeating it will not help."""

    exit_code = Exit.REFUSED


class NotPermitted(Refused):
    """The server wants other credentials."""

    exit_code = Exit.NOT_PERMITTED


class NotFound(Refused):
    """The server has no such task, or not for this caller."""

    exit_code = Exit.NOT_FOUND


class AnswerLost(ClientProblem):
    """The request was sent and its answer never came: it may or may not have been done."""

    exit_code = Exit.ANSWER_LOST


class ReaderLeft(ClientProblem):
    """Nobody reads standard output any more; nobody is to be told, either."""

    exit_code = Exit.PIPE_CLOSED
