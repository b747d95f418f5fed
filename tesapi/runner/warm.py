"""A runner that waits with everything loaded, and forks a process for each job that it is told of.

Starting Python and importing the runner is most of what a short job takes; a fork takes a thousandth of a second. Such
a process is a runner like any other: the leader of a session of its own that obeys signals and outlives whoever asked.

It is asked over a Unix socket that keeps messages apart. The first names the modules of this package that jobs are
going to need. Each other one is the path of a job's document, and is answered with the number of the process and the
time of its start (`processes.start_time`). The end of the socket is its own end.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import socket
import sys
import traceback
from typing import Callable, List

from .job import Places
from .processes import show_as, start_time

LONGEST = 8192
"""Bytes of a message at most."""


def serve(descriptor: int, main: Callable[[List[str]], int]) -> int:
    """Answer until the socket at `descriptor` ends; the exit code. `main` runs a job, in the forked process."""
    show_as([argument.rstrip(" ") for argument in sys.orig_argv])  # what is blank only makes room
    asked = socket.socket(fileno=descriptor)
    for module in asked.recv(LONGEST).decode("ascii").split():
        importlib.import_module("." + module, __package__)
    gc.collect()
    gc.freeze()  # so that the forked processes go on sharing the memory of all this
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel is to bury the children
    while True:
        document = os.fsdecode(asked.recv(LONGEST))
        if not document:
            return 0
        pid = os.fork()
        if pid == 0:
            _become(document, asked, main)
        # Nothing is known of a process that has ended already, and nothing needs to be.
        asked.send(f"{pid} {start_time(pid) or 0}".encode("ascii"))


def _become(document: str, asked: socket.socket, main: Callable[[List[str]], int]) -> None:
    """Go on as the runner of a job, and never return."""
    code = 1
    try:
        os.setsid()
        asked.close()
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        places = Places(document)
        _connect(places)
        # As whoever looks for the runner of a job knows it.
        python = sys.orig_argv[: sys.orig_argv.index(sys.argv[0])]
        show_as([*python, f"{places.directory}/inputs/runner.py", document])
        code = main([document])
    except BaseException:  # noqa: BLE001 - what would end any other process ends this one, and does not go on above
        traceback.print_exc()
    finally:
        os._exit(code)


def _connect(places: Places) -> None:
    os.makedirs(places.metadata, exist_ok=True)
    null = os.open(os.devnull, os.O_RDWR)
    complaints = os.open(places.complaints, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor, source in enumerate((null, null, complaints)):
        os.dup2(source, descriptor)
    for source in (null, complaints):
        if source > 2:  # beyond standard error
            os.close(source)
