"""From the words of a command line to a TES document."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from tesapi.cli.exits import UsageProblem
from tesapi.cli.show import plain

INLINE_BYTES = 128 << 10
"""What every server is to take as the content of one input (TES 1.1)."""
INLINE_TOTAL_BYTES = 4 << 20
INLINE_FILES = 1000

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]*://")
_REFERENCE = re.compile(r"(?<!\\)\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_KEPT_IN_NAMES = "._-+=,@"
_MAX_NAME = 100


@dataclass(frozen=True, slots=True)
class Wish:
    """What was asked for. `inputs`, `outputs`, `env` and `tags` are pairs, as they were typed."""

    image: str
    command: tuple[str, ...]
    inputs: tuple[tuple[str, str], ...] = ()
    outputs: tuple[tuple[str, str], ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    tags: tuple[tuple[str, str], ...] = ()
    volumes: tuple[str, ...] = ()
    stdin: str = ""
    name: str = ""
    workdir: str = ""
    cpu_cores: int | None = None
    ram_gb: float | None = None
    disk_gb: float | None = None


class ServerFiles:
    """Which files of this machine the server reads and writes, by the `storage` of its service-info.

    Without such a list nothing is known, and every file may be one.
    """

    def __init__(self, service_info: Mapping[str, Any]) -> None:
        listed = service_info.get("storage")
        self._listed = [str(place) for place in listed] if isinstance(listed, list) else []
        roots = [place.removeprefix("file://") for place in self._listed if place.startswith(("file:///", "/"))]
        self._roots = [root.rstrip("/") or "/" for given in roots for root in {given, unquote(given)}]

    @property
    def are_told(self) -> bool:
        """Whether the server has said anything about what it reads and writes."""
        return bool(self._listed)

    def can_read(self, path: str) -> bool:
        """Whether the server has said that it reads `path`, which is absolute."""
        return self._hold(os.path.realpath(path))

    def can_write(self, path: str) -> bool:
        """Whether the server has said that it writes `path`, which is absolute; it need not be there."""
        return self._hold(os.path.realpath(os.path.dirname(path)))  # noqa: PTH120

    def _hold(self, place: str) -> bool:
        return any(_is_within(place, os.path.realpath(root)) for root in self._roots)

    def __str__(self) -> str:
        return ", ".join(plain(place) for place in self._listed) or "nothing that it tells"


def pair(option: str, text: str) -> tuple[str, str]:
    """`NAME=VALUE` taken apart at the first `=`. Raises UsageProblem."""
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise UsageProblem(f"{option} {plain(text)!r} is to have the form NAME=VALUE.")
    return name, value


def expand(word: str, places: Mapping[str, str]) -> str:
    """`word` with `$NAME` and `${NAME}` replaced for the names in `places`; all else, and what follows a \\, as it is.

    A name is as long as it can be, as in a shell: `$INPUTS` is not `$INPUT` and an S.
    """
    return _REFERENCE.sub(lambda found: places.get(found[1] or found[2], found[0]), word)


def has_local_files(wish: Wish) -> bool:
    """Whether the document depends on which files of this machine the server has."""
    files = [file for _, file in (*wish.inputs, *wish.outputs)] + ([wish.stdin] if wish.stdin else [])
    return not all(_URL.match(file) for file in files)


def build(wish: Wish, server_files: ServerFiles) -> dict[str, Any]:
    """The document. Files are looked at, and small ones read. Raises UsageProblem."""
    _check_names(wish)
    inputs, outputs, volumes = _Inputs(server_files), [], list(wish.volumes)
    places: dict[str, str] = {}
    for name, file in wish.inputs:
        places[name] = inputs.add(f"-i {name}", name, f"/tes/in/{name}", file)
    for name, file in wish.outputs:
        output = _output(name, file, server_files)
        places[name] = output["path"]
        outputs.append(output)
        if output["type"] == "DIRECTORY":
            volumes.append(output["path"])  # so that it is there when the command begins
    executor: dict[str, Any] = {"image": wish.image, "command": [expand(word, places) for word in wish.command]}
    if wish.workdir:
        executor["workdir"] = wish.workdir
    if wish.stdin:
        executor["stdin"] = inputs.add("--stdin", "stdin", "/tes/stdin", wish.stdin)
    if environment := {**places, **dict(wish.env)}:
        executor["env"] = environment
    resources = {"cpu_cores": wish.cpu_cores, "ram_gb": wish.ram_gb, "disk_gb": wish.disk_gb}
    resources = {key: value for key, value in resources.items() if value is not None}
    document = {
        "name": wish.name,
        "inputs": inputs.documents,
        "outputs": outputs,
        "resources": resources,
        "executors": [executor],
        "volumes": volumes,
        "tags": dict(wish.tags),
    }
    document = {key: value for key, value in document.items() if value}
    _check_text(document)
    return document


class _Inputs:
    """The inputs of a document, and how much of them goes inside of it."""

    def __init__(self, server_files: ServerFiles) -> None:
        self._server_files = server_files
        self._inline_bytes = 0
        self.documents: list[dict[str, str]] = []

    def add(self, option: str, name: str, folder: str, file: str) -> str:
        """Have `file`, a URL or a path, below `folder` of the container; where exactly."""
        if _URL.match(file):
            place = f"{folder}/{_last_name(urlsplit(file).path, name)}"
            self._append(name, place, "DIRECTORY" if file.endswith("/") else "FILE", url=file)
            return place
        path = "/dev/stdin" if file == "-" else _absolute(file)
        place = f"{folder}/{_last_name(path, name)}"
        try:
            mode = os.stat(path).st_mode  # noqa: PTH116 - a path may end with a slash, which means something
        except (OSError, ValueError) as error:
            raise UsageProblem(f"{option}: {_sentence(file, error)}.") from error
        is_folder = stat.S_ISDIR(mode)
        kind = "DIRECTORY" if is_folder else "FILE"
        # A pipe is this process's alone, and so is every name for a descriptor.
        is_shared = (is_folder or stat.S_ISREG(mode)) and not path.startswith(("/dev/", "/proc/"))
        if is_shared and self._server_files.can_read(path):
            self._append(name, place, kind, url=_url_of(path))
            return place
        sent: list[tuple[str, str]] = []
        for inner, relative in _files(option, path) if is_folder else [(path, "")]:
            content = self._content(option, inner)
            if content is None and is_shared and not self._server_files.are_told:
                self._append(name, place, kind, url=_url_of(path))
                return place
            if content is None:
                raise UsageProblem(
                    f"{option}: {plain(inner)} is not below what the server reads ({self._server_files}), and only "
                    f"UTF-8 text of at most {INLINE_BYTES >> 10} KiB can be sent within the task."
                )
            sent.append((f"{place}/{relative}" if relative else place, content))
        for target, content in sent:
            self._append(name, target, "FILE", content=content)
        return place

    def _append(self, name: str, place: str, kind: str, **source: str) -> None:
        self.documents.append({"name": name, "path": place, "type": kind, **source})

    def _content(self, option: str, path: str) -> str | None:
        """The text of a file that can be sent within the document, else None."""
        try:
            with Path(path).open("rb") as file:
                data = file.read(INLINE_BYTES + 1)
        except OSError as error:
            raise UsageProblem(f"{option}: {_sentence(path, error)}.") from error
        if len(data) > INLINE_BYTES or b"\0" in data:
            return None
        self._inline_bytes += len(data)
        if self._inline_bytes > INLINE_TOTAL_BYTES:
            raise UsageProblem(
                f"{option}: the files that the server cannot read come to more than {INLINE_TOTAL_BYTES >> 20} MiB, "
                "which is too much to be sent within the task."
            )
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return None


def _files(option: str, folder: str) -> Iterator[tuple[str, str]]:
    """The regular files in a directory, each with its path from there."""
    count = 0
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(parent, name)  # noqa: PTH118 - os.walk gives text
            if not Path(path).is_file():
                continue
            count += 1
            if count > INLINE_FILES:
                raise UsageProblem(
                    f"{option}: {plain(folder)} is not below what the server reads, and has more than {INLINE_FILES} "
                    "files, which is too much to be sent within the task."
                )
            yield path, os.path.relpath(path, folder)
    if not count:
        raise UsageProblem(f"{option}: {plain(folder)} has no files in it, and is not below what the server reads.")


def _output(name: str, file: str, server_files: ServerFiles) -> dict[str, str]:
    if _URL.match(file):
        url, is_folder = file, file.endswith("/")
        last = _last_name(urlsplit(file).path, name)
    else:
        path = _absolute(file)
        if server_files.are_told and not server_files.can_write(path):
            raise UsageProblem(
                f"-o {name}: {plain(path)} is not below what the server writes ({server_files}): name a place there, "
                "or a URL."
            )
        url, is_folder = _url_of(path), file.endswith("/") or Path(path).is_dir()
        last = _last_name(path, name)
    return {"name": name, "path": f"/tes/out/{name}/{last}", "url": url, "type": "DIRECTORY" if is_folder else "FILE"}


def _last_name(path: str, name: str) -> str:
    """The last name of a path, for use in the container: tools look at endings.

    It stands in commands, in shell scripts and in output paths: only characters that mean nothing in any of them.
    """
    last = unquote(path.rstrip("/").rpartition("/")[2])[-_MAX_NAME:]
    kept = "".join(c if (c.isalnum() or c in _KEPT_IN_NAMES) else "_" for c in last)
    return kept if kept.strip(".") else name


def _absolute(file: str) -> str:
    if not file:
        raise UsageProblem("The name of a file is empty.")
    # Not resolved: the server may see the same names, and other places behind them.
    return os.path.abspath(file)  # noqa: PTH100


def _url_of(path: str) -> str:
    """A path as a URL. Where that would have to be quoted it stays a path, which every server reads the same way."""
    quoted = quote(os.fsencode(path))
    return path if quoted != path and _is_text(path) else f"file://{quoted}"


def _is_text(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _check_names(wish: Wish) -> None:
    given: dict[str, str] = {}
    options = (("-i", wish.inputs), ("-o", wish.outputs), ("-e", wish.env))
    for option, name in ((option, name) for option, pairs in options for name, _ in pairs):
        if option != "-e" and not _IDENTIFIER.match(name):
            raise UsageProblem(f"{option} {plain(name)!r}: a name has letters, digits and _, and begins with no digit.")
        if name in given:
            raise UsageProblem(f"The name {plain(name)!r} is given twice, by {given[name]} and by {option}.")
        given[name] = option


def _check_text(document: Mapping[str, Any]) -> None:
    for text in _texts(document):
        if not _is_text(text):
            raise UsageProblem(f"{plain(text)!r} is not UTF-8 text, and a task holds nothing else.")


def _texts(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            yield from _texts([*value.keys(), *value.values()])
        case list():
            for item in value:
                yield from _texts(item)


def _sentence(file: str, error: OSError | ValueError) -> str:
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"{plain(file)}: {reason}"


def read_documents(text: str, source: str) -> list[dict[str, Any]]:
    """The documents in a JSON text: one, a list of them, or several one after the other. Raises UsageProblem."""
    decoder = json.JSONDecoder(parse_constant=_refuse_constant)
    found: list[Any] = []
    position = 0
    while text[position:].strip():
        position += len(text[position:]) - len(text[position:].lstrip())
        try:
            value, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, getattr(error, "pos", position)) + 1
            raise UsageProblem(f"{plain(source)}, line {line}: {getattr(error, 'msg', error)}.") from error
        found += value if isinstance(value, list) else [value]
    if not found:
        raise UsageProblem(f"{plain(source)} has no document in it.")
    for number, document in enumerate(found, 1):
        if not isinstance(document, dict):
            raise UsageProblem(f"{plain(source)}: document {number} is not a JSON object.")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def pairs(option: str, texts: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Several of them. Raises UsageProblem."""
    return tuple(pair(option, text) for text in texts)
