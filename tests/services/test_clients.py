"""Tasks that real clients sent, run to their end: as they were sent, but for where their files lie."""

from __future__ import annotations

import json
import pathlib
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.services.server import Server

_BODIES = pathlib.Path(__file__).parents[1] / "clients"
_RUN = ["cromwell.derived", "cwl-tes-1", "cwl-tes-2", "pulsar-tes-coexecution", "py-tes-1.1.4"]
_RUN += sorted(path.stem for path in _BODIES.glob("nextflow-*.json"))
# The others need images of their own (Snakemake, Toil, Galaxy), which are not to be had here.
_IMAGES = {"alpine": "host", "debian": "host", "ubuntu": "host"}
_DIRECTORIES = {"ref"}  # which old Nextflow sends as FILE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, bubblewrap: Mapping[str, object]) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    images = "{" + ", ".join(f"{json.dumps(name)} = {json.dumps(root)}" for name, root in _IMAGES.items()) + "}"
    with Server(folder, LOCAL__CPU_CORES=8, LOCAL__MAX_JOBS=8, RUNTIME__BUBBLEWRAP__IMAGES=images) as server:
        yield server


@pytest.mark.parametrize("name", _RUN)
def test_what_a_client_sent_runs_and_its_files_are_where_it_looks_for_them(server: Server, name: str) -> None:
    body = json.loads((_BODIES / f"{name}.json").read_text("utf-8"))
    root = server.folder / "data" / "files" / name
    for item in (body.get("inputs") or []) + (body.get("outputs") or []):
        if item.get("url"):
            item["url"] = _moved(item["url"], root)
    for item in body.get("inputs") or []:
        if item.get("url"):
            _make_input(_local(item["url"]), body)
    task_id = server.post(body)
    state = server.wait_for(task_id)
    task = server.get(task_id)
    assert state == "COMPLETE", task["logs"]
    assert [log["exit_code"] for log in task["logs"][0]["logs"]] == [0] * len(body["executors"])
    for output in body.get("outputs") or []:
        if not _is_pattern(output["path"]):
            assert _local(output["url"]).exists(), output
        else:
            below = output["path"].removeprefix(output.get("path_prefix") or "").lstrip("/")
            folder = _local(output["url"])
            found = folder / _fitting(below) if output.get("path_prefix") else folder.parent / _fitting(folder.name)
            assert found.read_text("ascii") == "made by the task\n"


def _moved(url: str, root: pathlib.Path) -> str:
    scheme, separator, path = url.rpartition("://")
    if scheme == "s3":
        path = f"/s3/{path}"
    return f"file://{root}{path}" if separator else f"{root}{path}"


def _local(url: str) -> pathlib.Path:
    return pathlib.Path(url.removeprefix("file://").rstrip("/"))


def _make_input(path: pathlib.Path, body: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name in _DIRECTORIES:
        path.mkdir(exist_ok=True)
        (path / "part").write_text("of a directory\n", "ascii")
    elif path.name in {".command.run", "script"}:
        path.write_text(_script(body), "utf-8")
    else:
        path.write_text("an input\n", "ascii")
        path.chmod(0o755)


def _script(body: Mapping[str, Any]) -> str:
    """Does what the client's own script would: look at the inputs, and leave every output."""
    lines = ["set -e"]
    lines += [f"test -e {shlex.quote(item['path'])}" for item in body.get("inputs") or []]
    for output in body["outputs"]:
        path = _fitting(output["path"]) if _is_pattern(output["path"]) else output["path"]
        quoted = shlex.quote(path.rstrip("/"))
        lines.append(f"mkdir -p $(dirname {quoted})")
        if output.get("type") == "DIRECTORY" or path.endswith("/"):
            lines.append(f"mkdir -p {quoted}; echo 'made by the task' > {quoted}/in-it")
        elif not path.endswith(".command.log"):
            lines.append(f"test -e {quoted} || echo 'made by the task' > {quoted}")
    return "\n".join(lines) + "\n"


def _is_pattern(path: str) -> bool:
    return any(character in path for character in "*?[")


def _fitting(pattern: str) -> str:
    """A path that matches."""
    return pattern.replace("**", "x").replace("*", "x").replace("?", "y").replace("[mn]", "m")
