"""Images of other houses for a Docker engine that reaches no registry: made here of Debian's packages, under the names
that they have there, and as far as docker-compose.yaml needs them."""

from __future__ import annotations

import io
import pathlib
import shutil
import subprocess
import tarfile
from collections.abc import Mapping

from tests.engines import DockerEngine, Missing

_CERTIFICATES = pathlib.Path("/etc/ssl/certs/ca-certificates.crt")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_BASE = ("base-files", "base-passwd", "bash", "coreutils", "dash", "grep", "login", "passwd", "sed")


def import_python(engine: DockerEngine, folder: pathlib.Path) -> None:
    """Python, which trusts whom this machine trusts. Raises Missing."""
    files = {}
    if _CERTIFICATES.exists():
        files[str(_CERTIFICATES)] = _CERTIFICATES.read_bytes()
        files["/etc/pip.conf"] = b"[global]\ncert = %s\n" % str(_CERTIFICATES).encode()
    packages = ("ca-certificates", "python3", "python3-venv")
    _import(engine, folder, "python:3.11-slim-bookworm", packages, files, [f"ENV PATH={_PATH}", 'CMD ["python3"]'])


_START_RABBITMQ = b"""\
#!/bin/sh
set -e
export RABBITMQ_CONF_ENV_FILE=/dev/null RABBITMQ_CONFIG_FILE=/etc/rabbitmq/rabbitmq RABBITMQ_LOGS=-
mkdir -p "$HOME" /etc/rabbitmq
printf 'default_user = %s\\ndefault_pass = %s\\n' "$RABBITMQ_DEFAULT_USER" "$RABBITMQ_DEFAULT_PASS" \
  > /etc/rabbitmq/rabbitmq.conf
exec rabbitmq-server
"""


def import_mongo(engine: DockerEngine, folder: pathlib.Path, program: pathlib.Path) -> None:
    """MongoDB, with `program` for its server. Raises Missing."""
    files = {"/usr/local/bin/mongod": program.read_bytes(), "/data/db/.keep": b""}
    changes = [f"ENV PATH={_PATH}", 'CMD ["mongod", "--bind_ip_all", "--wiredTigerCacheSizeGB", "0.5"]']
    _import(engine, folder, "mongo:7.0", ("libcurl4", "libssl3", "liblzma5"), files, changes)


def import_rabbitmq(engine: DockerEngine, folder: pathlib.Path) -> None:
    """RABBITMQ_DEFAULT_USER and RABBITMQ_DEFAULT_PASS name its user. Raises Missing."""
    packages = ("gawk", "hostname", "procps", "rabbitmq-server", "util-linux")
    home = f"ENV HOME=/var/lib/rabbitmq PATH=/usr/lib/rabbitmq/bin:{_PATH}"
    changes = [home, 'CMD ["/start"]']
    _import(engine, folder, "rabbitmq:3.13", packages, {"/start": _START_RABBITMQ}, changes)


def _import(
    engine: DockerEngine,
    folder: pathlib.Path,
    name: str,
    packages: tuple[str, ...],
    files: Mapping[str, bytes],
    changes: list[str],
) -> None:
    """An image of Debian's `packages`, with `files`; `changes` are lines of a Dockerfile."""
    if shutil.which("mmdebstrap") is None:
        raise Missing("needs mmdebstrap (apt-get install mmdebstrap)")
    archive = folder / "image.tar"
    wanted = ",".join((*_BASE, *packages))
    command = ["mmdebstrap", "--quiet", "--variant=extract", f"--include={wanted}", "bookworm", str(archive)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise Missing(f"needs Debian's packages: {run.stderr.strip()[-500:]}")
    with tarfile.open(archive) as unpacked:
        # The packages are unpacked and not configured: this their scripts would have written.
        users = {f"/etc/{which}": _file(unpacked, f"./usr/share/base-passwd/{which}.master") for which in _USERS}
    with tarfile.open(archive, "a") as packed:
        for path, content in (users | dict(files)).items():
            entry = tarfile.TarInfo(f".{path}")
            entry.size = len(content)
            entry.mode = 0o755 if content.startswith((b"#!", b"\x7fELF")) else 0o644
            packed.addfile(entry, io.BytesIO(content))
    repository, _, tag = name.partition(":")
    query = [("fromSrc", "-"), ("repo", repository), ("tag", tag), *(("changes", change) for change in changes)]
    engine.engine.call("POST", "/images/create", archive.read_bytes(), query)
    archive.unlink()


_USERS = ("passwd", "group")


def _file(archive: tarfile.TarFile, name: str) -> bytes:
    found = archive.extractfile(name)
    assert found is not None
    return found.read()
