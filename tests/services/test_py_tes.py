"""Real clients against a real server: py-tes as workflow engines pin it, each version in an environment of its own."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from tests.services.server import Server

ROOT = pathlib.Path(__file__).parents[2]
CLIENTS = ROOT / "tests" / "clients"


def _environment(version: str) -> pathlib.Path:
    """A Python with py-tes `version` and what it needs, from pins with hashes; made once."""
    pins = CLIENTS / f"py-tes-{version}.txt"
    digest = hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()[:12]
    place = ROOT / ".cache" / f"py-tes-{version}-{digest}"
    python = place / "bin" / "python"
    if (place / "ready").exists():
        return python
    shutil.rmtree(place, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    install = [python, "-m", "pip", "install", "--quiet", "--require-hashes", "-r", pins]
    run = subprocess.run(install, capture_output=True, text=True, check=False)
    if run.returncode:
        message = f"needs a package index to install py-tes {version} once: {run.stderr.strip()[-500:]}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    (place / "ready").touch()
    return python


@pytest.mark.parametrize("version", ["1.1.4", "0.4.2"])
def test_py_tes_creates_waits_gets_lists_and_cancels(server: Server, version: str) -> None:
    command = [_environment(version), CLIENTS / "py_tes_session.py", server.url]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {
        "state": "COMPLETE",
        "stdout": "from py-tes",
        "exit_code": 0,
        "sent": ["py-tes", {"client": "py-tes"}, "from py-tes", 0.1],
        "canceled": "CANCELED",
        "listed": True,
    }


def test_py_tes_reads_what_this_server_is(server: Server) -> None:
    """Versions before 1.0 cannot read service-info of TES 1.1, whoever gives it."""
    script = "import sys, tes; print(tes.HTTPClient(sys.argv[1]).get_service_info().storage[0])"
    command = [_environment("1.1.4"), "-c", script, server.url]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.stdout.strip() == f"file://{server.folder}/data/files", run.stderr
