"""Containers by a Docker engine, over its API at a Unix socket.

The API rather than the program `docker`: it is quicker, shows no value of the environment on a command line, tells
how far a pull is, and says why something failed. `create` comes before `start`, so that there is never a container that
nobody can find by its label.
"""

from __future__ import annotations

import base64
import json
import os
import queue
import select
import socket
import struct
import subprocess
import threading
import time
from typing import Any, Callable, Dict, List, Optional, Tuple, TypeVar, Union

from ..job import Limits, Owner, Refused, Step
from ..progress import Progress
from . import top
from .base import Check, End, Note, Room
from .containers import bad_image, labels, out_of_memory, owner_of, with_tmp
from .engine import Answer, Engine, EngineAway, EngineRefused
from .node import alone

T = TypeVar("T")
_Said = Union[Dict[str, Any], Exception, None]

_PATIENCE_S = 60.0
_RETRY_S = 0.5
_SWEEP_S = 0.05
_SLOWEST_SWEEP_S = 5.0
_CREATION_S = 10.0
_LAST_WORDS_S = 5.0
_STALLED_PULL_S = 900.0
_BYTES_A_POLL = 4 << 20
_CHUNK = 256 << 10
_LEAST_MEMORY = 6 << 20  # Docker refuses less
_NOT_REACHED = (126, 127)
_AUTH_SERVER = "https://index.docker.io/v1/"  # how Docker's own registry stands in config.json


class Docker:
    """`settings`: `socket`, `network`, `user`, `capabilities`, `pids_limit`, `pull`, `init`, `config` (config.json)."""

    foreign_users = True
    outlives = True

    def __init__(self, settings: Dict[str, Any], owner: Owner, note: Note) -> None:
        self._settings = settings
        self._owner = owner
        self._note = note
        self._engine = Engine(settings["socket"])
        self._used: Dict[str, str] = {}
        self._made: List[str] = []
        self._making = os.path.join(os.path.dirname(owner.lock), "making")

    def unsupported(self, image: str) -> Optional[str]:
        return bad_image(image)

    def unenforced(self, limits: Limits) -> List[str]:
        return (
            ["resources.disk_gb is not enforced here: Docker cannot limit a container's disk."]
            if limits.disk_gb
            else []
        )

    def pull(self, image: str, check: Check) -> None:
        policy = self._settings["pull"]
        if policy != "always" and self._find(image, check):
            return
        if policy == "never":
            raise Refused(f"The image {image} is not on this machine, and runtime.pull is never.")
        with alone(f"pulling {image}", check, self._note):
            if policy == "always" or not self._find(image, check):
                self._pull(image, check)
                if not self._find(image, check):
                    raise Refused(f"The image {image} was pulled, and is not there.")

    def container(self, step: Step, room: Room) -> _Container:
        name = f"tesapi-{self._owner.job_id}-{step.number}"
        body = self._body(step, room)
        self._made.append(name)
        with open(self._making, "w", encoding="ascii") as file:
            file.write(name)
        try:
            answer = self._patiently(lambda: self._create(name, body), room.check)
            os.unlink(self._making)
        except EngineRefused as error:
            os.unlink(self._making)
            raise Refused(f"The container of executor {step.number} cannot be made: {error}.") from error
        for warning in (answer or {}).get("Warnings") or ():
            self._note(f"Docker: {warning}")
        container = _Container(self._engine, name, step, room, self._used[step.image], self._note)
        root = [mount.source for mount in room.mounts if mount.target == "/"]
        if root:
            top.put(lambda data: self._engine.call("PUT", f"/containers/{name}/archive", data, {"path": "/"}), root[0])
            container.at_end = lambda: self._fetch_top(name, root[0], room.at_top)
        return container

    def remove(self) -> None:
        pause_s, told, deadline = _SWEEP_S, False, time.monotonic() + _CREATION_S
        while True:
            try:
                while self._made:
                    self._delete(self._made[-1])
                    self._made.pop()
                left = self._list(f"tesapi.job={self._owner.job_id}")
                for container in left:
                    self._delete(container["Id"])
                    self._is_made(container)
                if not left and (time.monotonic() > deadline or not os.path.exists(self._making)):
                    return
            except EngineAway as away:
                if not told:
                    told = True
                    self._note(f"{self._away(away)} Waiting for it, to see the job's containers gone.")
            except EngineRefused:
                pass  # asked again: a removal that is under way is refused, for instance
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, _SLOWEST_SWEEP_S)

    def _is_made(self, container: Dict[str, Any]) -> None:
        """One less to wait for: an engine makes a container also when nobody waits for its answer any more."""
        try:
            with open(self._making, encoding="ascii") as file:
                name = file.read()
            if f"/{name}" in container["Names"]:
                os.unlink(self._making)
        except FileNotFoundError:
            return

    def others(self) -> List[Owner]:
        owners = set()
        try:
            for found in self._list(f"tesapi.store={self._owner.store_id}"):
                owners.add(owner_of(found["Labels"]))
        except (EngineAway, EngineRefused):
            return []  # whoever starts a container next will tell
        return [owner for owner in sorted(owners) if owner.place == self._owner.place and owner != self._owner]

    def _list(self, label: str) -> List[Dict[str, Any]]:
        found: List[Dict[str, Any]] = self._engine.call(
            "GET", "/containers/json", None, {"all": "1", "filters": json.dumps({"label": [label]})}
        )
        return found

    def _delete(self, container: str) -> None:
        try:
            self._engine.call("DELETE", f"/containers/{container}", None, {"force": "1", "v": "1"})
        except EngineRefused as error:
            if error.status != 404:
                raise

    def _create(self, name: str, body: Dict[str, Any]) -> Any:
        try:
            return self._engine.call("POST", "/containers/create", body, {"name": name})
        except EngineRefused as error:
            if error.status == 409:  # made when this was asked before, and the answer was lost
                return None
            raise

    def _body(self, step: Step, room: Room) -> Dict[str, Any]:
        settings, limits = self._settings, room.limits
        host: Dict[str, Any] = {
            "Mounts": [
                {"Type": "bind", "Source": mount.source, "Target": mount.target, "ReadOnly": not mount.writable}
                for mount in with_tmp(room)
            ],
            "NetworkMode": settings["network"],
            "LogConfig": {"Type": "none"},
            "CapDrop": ["ALL"],
            "CapAdd": list(settings["capabilities"]),
            # SELinux would deny the mounts; their files are private copies.
            "SecurityOpt": ["no-new-privileges", "label=disable"],
            "PidsLimit": settings["pids_limit"],
            "Init": settings["init"],
        }
        if limits.cpu_cores:
            host["NanoCpus"] = min(limits.cpu_cores, os.cpu_count() or limits.cpu_cores) * 10**9
        if limits.ram_gb:
            host["Memory"] = host["MemorySwap"] = max(int(limits.ram_gb * 1e9), _LEAST_MEMORY)
        body = {
            "Image": step.image,
            "Entrypoint": step.command[:1],
            "Cmd": step.command[1:],
            "Env": [f"{name}={value}" for name, value in step.env.items()],
            "Labels": labels(self._owner),
            "AttachStdin": room.has_stdin,
            "OpenStdin": room.has_stdin,
            "StdinOnce": room.has_stdin,
            "AttachStdout": True,
            "AttachStderr": True,
            "HostConfig": host,
        }
        if step.workdir:
            body["WorkingDir"] = step.workdir
        if settings["user"]:
            body["User"] = settings["user"]
        return body

    def _fetch_top(self, name: str, root: str, patterns: Any) -> None:
        changes = self._engine.call("GET", f"/containers/{name}/changes") or []
        for path in top.wanted([change["Path"] for change in changes if change["Kind"] != 2], patterns):
            answer = self._engine.open("GET", f"/containers/{name}/archive", None, {"path": path})
            try:
                top.unpack(answer.stream(), root)
            finally:
                answer.close()

    def _find(self, image: str, check: Check) -> bool:
        try:
            found = self._patiently(lambda: self._engine.call("GET", f"/images/{image}/json"), check)
        except EngineRefused as error:
            if error.status == 404:
                return False
            raise Refused(f"The image {image} cannot be used: {error}.") from error
        digests = found.get("RepoDigests") or [found["Id"]]
        self._used[image] = f"{image} ({digests[0].rpartition('@')[2]}, docker)"
        return True

    def _pull(self, image: str, check: Check) -> None:
        try:
            self._patiently(lambda: self._pull_once(image, check), check)
        except EngineRefused as error:
            raise Refused(f"The image {image} cannot be pulled: {error}.") from error

    def _pull_once(self, image: str, check: Check) -> None:
        name, tag = _name_and_tag(image)
        headers = _credentials(image, self._settings.get("config") or "")
        said: queue.Queue[_Said] = queue.Queue()
        sockets: List[socket.socket] = []

        def listen() -> None:
            try:
                query = {"fromImage": name, "tag": tag}
                answer = self._engine.open("POST", "/images/create", b"", query, headers, sockets.append)
                answer.patient()
                for line in iter(answer.readline, b""):
                    if line.strip():
                        said.put(json.loads(line))
                answer.close()
                said.put(None)
            except (EngineAway, EngineRefused) as error:
                said.put(error)
            except ValueError as error:
                said.put(EngineAway(f"its answer is no JSON: {error}"))

        # A thread, because the engine answers when it likes, and a cancel is not to wait for that.
        threading.Thread(target=listen, daemon=True).start()
        try:
            self._watch_pull(image, said, check)
        finally:
            for sock in sockets:
                try:
                    sock.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def _watch_pull(self, image: str, said: queue.Queue[_Said], check: Check) -> None:
        layers: Dict[str, Tuple[int, int]] = {}
        progress = Progress(self._note)
        heard = time.monotonic()
        while True:
            check()
            progress.tell(lambda: _how_far(image, layers))
            try:
                line = said.get(timeout=0.1)
            except queue.Empty:
                if time.monotonic() - heard > _STALLED_PULL_S:
                    raise Refused(f"The image {image} cannot be pulled: nothing came for 15 minutes.") from None
                continue
            heard = time.monotonic()
            if line is None:
                return
            if isinstance(line, Exception):
                raise line
            if "error" in line:
                raise EngineRefused(500, " ".join(str(line["error"]).split())[:1000].rstrip("."))
            detail = line.get("progressDetail") or {}
            if line.get("status") == "Downloading" and detail.get("total"):
                layers[line["id"]] = (detail["current"], detail["total"])
            elif line.get("status") in ("Download complete", "Pull complete") and line.get("id") in layers:
                layers[line["id"]] = (layers[line["id"]][1],) * 2

    def _patiently(self, call: Callable[[], T], check: Check) -> T:
        """The answer, also of an engine that is just being restarted. Raises Refused, EngineRefused."""
        deadline, told = time.monotonic() + _PATIENCE_S, False
        while True:
            try:
                return call()
            except EngineAway as away:
                if time.monotonic() > deadline:
                    raise Refused(self._away(away)) from away
                if not told:
                    told = True
                    self._note(f"{self._away(away)} Waiting for it.")
            check()
            time.sleep(_RETRY_S)

    def _away(self, away: EngineAway) -> str:
        return f"The Docker engine at {self._engine.path} does not answer: {away}."


class _Container:
    """Started by `start`, and then followed by the two answers that the engine holds open: its streams and its end."""

    def __init__(self, engine: Engine, name: str, step: Step, room: Room, image_used: str, note: Note) -> None:
        self.image_used = image_used
        self.at_end: Optional[Callable[[], None]] = None
        self._engine = engine
        self._name = name
        self._step = step
        self._room = room
        self._note = note
        self._streams: Optional[Answer] = None
        self._socket: Optional[socket.socket] = None
        self._received = bytearray()
        self._unsent: Optional[bytes] = b"" if room.has_stdin else None
        self._exit: Optional[Answer] = None
        self._exited: Optional[float] = None
        self._ended: Optional[End] = None
        self._retry = 0.0
        self._told = False

    def start(self) -> None:
        try:
            self._attach("next-exit")
            self._engine.call("POST", f"/containers/{self._name}/start")
        except EngineAway as away:
            self._lose(away)
        except EngineRefused as error:
            self._not_started(error)

    def descriptors(self) -> Tuple[List[int], List[int]]:
        readers = [] if self._exit is None or self._exited is not None else [self._exit.fileno()]
        writers = []
        if self._socket is not None:
            readers.append(self._socket.fileno())
            if self._unsent is not None:
                writers.append(self._socket.fileno())
        return readers, writers

    def poll(self) -> Optional[End]:
        if self._ended is not None:
            return self._ended
        if self._exit is None:
            return self._find_again()
        try:
            self._send()
            self._receive()
            if self._exited is None:
                if not select.select([self._exit], [], [], 0)[0]:
                    return None
                self._exit.read()
                self._exited = time.monotonic()
            if self._socket is not None and time.monotonic() - self._exited < _LAST_WORDS_S:
                return None
            return self._end(self._engine.call("GET", f"/containers/{self._name}/json")["State"])
        except EngineAway as away:
            self._lose(away)
        except EngineRefused as error:
            return self._vanished(str(error))
        return None

    def _attach(self, until: str) -> None:
        stream = {"stream": "1", "stdout": "1", "stderr": "1", "stdin": "1" if self._unsent is not None else "0"}
        upgrade = {"Connection": "Upgrade", "Upgrade": "tcp"}
        self._streams = self._engine.open("POST", f"/containers/{self._name}/attach", b"", stream, upgrade)
        self._socket, first = self._streams.taken_over()
        self._received = bytearray(first)
        self._exit = self._engine.open("POST", f"/containers/{self._name}/wait", b"", {"condition": until})
        self._exit.patient()

    def _lose(self, away: EngineAway) -> None:
        for answer in (self._streams, self._exit):
            if answer is not None:
                answer.close()
        self._streams = self._socket = self._exit = self._exited = None
        if not self._told:
            self._told = True
            self._note(f"The Docker engine at {self._engine.path} does not answer: {away}. Waiting for it.")
        self._retry = time.monotonic() + _RETRY_S

    def _find_again(self) -> Optional[End]:
        """What became of the container while its engine was away."""
        if time.monotonic() < self._retry:
            return None
        try:
            state = self._engine.call("GET", f"/containers/{self._name}/json")["State"]
            if state["Status"] == "created":
                self.start()
            elif state["Running"]:
                self._attach("not-running")
                self._note(
                    f"The Docker engine was restarted while executor {self._step.number} ran; what it printed meanwhile"
                    " may be missing."
                )
            else:
                self._note(f"The Docker engine was restarted while executor {self._step.number} ran.")
                return self._end(state)
        except EngineAway as away:
            self._lose(away)
        except EngineRefused as error:
            return self._vanished(str(error))
        return self._ended

    def _vanished(self, why: str) -> End:
        return End(137, failure=f"The container of executor {self._step.number} is gone: {why}.")

    def _not_started(self, error: EngineRefused) -> None:
        state = self._engine.call("GET", f"/containers/{self._name}/json")["State"]
        if state["ExitCode"] in _NOT_REACHED and f'exec: "{self._step.command[0]}"' in str(error):
            os.write(self._room.stderr, (str(error) + "\n").encode("utf-8", "replace"))
            self._ended = End(state["ExitCode"])
        else:
            failure = f"The container of executor {self._step.number} cannot be started: {error}."
            self._ended = End(state["ExitCode"] or 1, failure=failure)

    def _end(self, state: Dict[str, Any]) -> End:
        if state["Status"] in ("removing", "dead"):
            return self._vanished("somebody removed it while it ran")
        if self.at_end is not None:
            self.at_end()
        code = int(state["ExitCode"])
        reason = out_of_memory(self._room.limits, code) if state.get("OOMKilled") else None
        for answer in (self._streams, self._exit):
            if answer is not None:
                answer.close()
        self._ended = End(code, reason=reason)
        return self._ended

    def _send(self) -> None:
        """Pass on what the file for standard input holds, as far as the container takes it."""
        while self._socket is not None and self._unsent is not None:
            if not self._unsent:
                self._unsent = os.read(self._room.stdin, _CHUNK)
            try:
                if self._unsent:
                    self._unsent = self._unsent[self._socket.send(self._unsent) :]
                else:
                    self._unsent = None
                    self._socket.shutdown(socket.SHUT_WR)
            except BlockingIOError:
                return
            except OSError:  # it has closed its input, or has ended
                self._unsent = None

    def _receive(self) -> None:
        """Write what the container has printed to its files; the engine sends it in frames: who, how many bytes."""
        left = _BYTES_A_POLL
        while self._socket is not None and left > 0:
            try:
                data = self._socket.recv(_CHUNK)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                self._socket = None
            left -= len(data)
            self._received += data
            self._write_frames()

    def _write_frames(self) -> None:
        position = 0
        while len(self._received) - position >= 8:
            stream, size = struct.unpack_from(">BxxxI", self._received, position)
            if len(self._received) - position - 8 < size:
                break
            with memoryview(self._received) as view:
                _write(
                    self._room.stderr if stream == 2 else self._room.stdout, view[position + 8 : position + 8 + size]
                )
            position += 8 + size
        del self._received[:position]


def _write(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _how_far(image: str, layers: Dict[str, Tuple[int, int]]) -> str:
    if not layers:
        return f"Pulling {image}."
    done, total = (sum(sizes) / 1e6 for sizes in zip(*layers.values()))
    return f"Pulling {image}: {done:.0f} of {total:.0f} MB."


def _name_and_tag(image: str) -> Tuple[str, str]:
    """As the API wants them. Without a tag it would pull all of them."""
    name, at, digest = image.partition("@")
    if at:
        return name, digest
    folder, slash, last = name.rpartition("/")
    last, colon, tag = last.partition(":")
    return folder + slash + last, tag if colon else "latest"


def _credentials(image: str, config: str) -> Dict[str, str]:
    """The header that logs in to the image's registry, as `docker login` left it."""
    first, slash, _ = image.partition("/")
    registry = first if slash and ("." in first or ":" in first or first == "localhost") else _AUTH_SERVER
    try:
        with open(config, encoding="utf-8") as file:
            known = json.load(file)
        account = _account(known, registry)
    except (OSError, ValueError, KeyError, subprocess.SubprocessError):
        return {}
    if not account:
        return {}
    account["serveraddress"] = registry
    return {"X-Registry-Auth": base64.urlsafe_b64encode(json.dumps(account).encode("utf-8")).decode("ascii")}


def _account(known: Dict[str, Any], registry: str) -> Dict[str, str]:
    helper = known.get("credHelpers", {}).get(registry) or known.get("credsStore")
    if helper and os.sep not in helper:
        said = subprocess.run(
            [f"docker-credential-{helper}", "get"], input=registry.encode(), capture_output=True, timeout=30, check=True
        )
        answer = json.loads(said.stdout)
        if answer["Username"] == "<token>":
            return {"identitytoken": answer["Secret"]}
        return {"username": answer["Username"], "password": answer["Secret"]}
    entries = known.get("auths", {})
    entry = entries.get(registry) or entries.get(f"https://{registry}") or {}
    if entry.get("identitytoken"):
        return {"identitytoken": entry["identitytoken"]}
    if not entry.get("auth"):
        return {}
    user, _, password = base64.b64decode(entry["auth"]).decode("utf-8").partition(":")
    return {"username": user, "password": password}
