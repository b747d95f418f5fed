"""A podman of a test's own: its configuration, its storage, and a busybox that goes by the name of alpine."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any

from tests.engines import IMAGES, Missing, busybox_archive

_CONF = """\
[containers]
default_ulimits=["nofile=20000:20000","nproc=32768:32768"]
[engine]
runtime="runc"
cgroup_manager="cgroupfs"
lock_type="file"
tmp_dir="{folder}/tmp"
"""
_NEEDED = {"podman": "podman", "runc": "runc", "busybox": "busybox-static"}


@contextlib.contextmanager
def podman_settings(folder: pathlib.Path) -> Iterator[dict[str, Any]]:
    """What a job's document says of a podman whose storage lies in `folder`. Raises Missing."""
    for program, package in _NEEDED.items():
        if shutil.which(program) is None:
            raise Missing(f"needs {program} (apt-get install {package})")
    if os.getuid() != 0:
        raise Missing("needs root: without it podman applies no limits on this kind of machine")
    settings = _settings(folder)
    try:
        for image in IMAGES:
            import_busybox(settings, image if ":" in image else f"{image}:latest")
        import_busybox(settings, "with-user:latest", "USER 1234:1234")
        import_busybox(settings, "with-entrypoint:latest", 'ENTRYPOINT ["/bin/echo", "entry"]', 'CMD ["cmd"]')
        yield settings
    finally:
        podman(settings, "rm", "--all", "--force", "--volumes", "--time", "0", check=False)
        subprocess.run(["umount", folder / "storage" / "overlay"], capture_output=True, check=False)


def podman(settings: dict[str, Any], *arguments: str, check: bool = True) -> str:
    """What podman prints, when it is called as the runner would."""
    argv = [settings["program"], *settings["options"], *arguments]
    run = subprocess.run(argv, env=settings["environment"], capture_output=True, text=True, check=False, timeout=60)
    assert not check or run.returncode == 0, run.stderr
    return run.stdout


def import_busybox(settings: dict[str, Any], name: str, *changes: str) -> None:
    """Make an image of busybox; `changes` are lines of a Dockerfile."""
    options = [word for change in changes for word in ("--change", change)]
    with tempfile.NamedTemporaryFile(suffix=".tar") as archive:
        archive.write(busybox_archive())
        archive.flush()
        podman(settings, "import", *options, archive.name, name)


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    conf = folder / "containers.conf"
    conf.write_text(_CONF.replace("{folder}", str(folder)), "utf-8")
    home = folder / "home"
    home.mkdir()
    return {
        "kind": "podman",
        "program": str(shutil.which("podman")),
        "options": ["--root", str(folder / "storage"), "--runroot", str(folder / "run")],
        "network": "none",
        "user": "",
        "capabilities": [],
        "pids_limit": 512,
        "pull": "missing",
        "init": shutil.which("docker-init") or "",
        "rootless": False,
        "environment": {"PATH": os.environ["PATH"], "HOME": str(home), "CONTAINERS_CONF": str(conf)},
    }
