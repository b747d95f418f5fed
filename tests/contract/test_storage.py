"""What every storage does. A new one is a `pytest.param` here, with a `Place` that has something to store in."""

from __future__ import annotations

import contextlib
import http.server
import pathlib
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tesapi.runner.storage.base import Storage, StorageFailure, Storages, below

BODY = bytes(range(256)) * 20_000


class Stop(Exception):
    """The job is to stop."""


@dataclass
class Place:
    """A storage, the URL of a folder in it, and where the files of that folder lie."""

    storages: Storages
    url: str
    folder: pathlib.Path

    def of(self, name: str) -> tuple[Storage, str]:
        url = below(self.url, name)
        return self.storages.of(url), url


def _files(folder: pathlib.Path) -> Iterator[Place]:
    yield Place(Storages({"file": {"roots": [str(folder)]}}), f"file://{folder}", folder)


def _web(folder: pathlib.Path) -> Iterator[Place]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def translate_path(self, path: str) -> str:
            return str(folder) + urllib.parse.unquote(path)

        def do_PUT(self) -> None:
            target = pathlib.Path(self.translate_path(self.path))
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(201)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield Place(Storages({"http": {"backoff_s": 0.01}}), f"http://127.0.0.1:{server.server_port}", folder)
        server.shutdown()


@pytest.fixture(params=[pytest.param(_files, id="file"), pytest.param(_web, id="http")])
def place(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Iterator[Place]:
    open_place: Callable[[pathlib.Path], Iterator[Place]] = request.param
    folder = tmp_path / "storage"
    folder.mkdir()
    with contextlib.contextmanager(open_place)(folder) as place:
        yield place


def _go_on() -> None:
    pass


def _stop() -> None:
    raise Stop


@pytest.mark.parametrize("body", [b"", b"x", BODY], ids=["empty", "a byte", "5 MB"])
def test_what_is_put_can_be_got(place: Place, tmp_path: pathlib.Path, body: bytes) -> None:
    (tmp_path / "a").write_bytes(body)
    storage, url = place.of("deep/ü %41+&.txt")
    assert place.storages.unsupported(url, "put") is None
    stored = storage.put(str(tmp_path / "a"), url, _go_on)
    assert (stored.url, stored.size_bytes) == (url, len(body))
    assert (place.folder / "deep" / "ü %41+&.txt").read_bytes() == body
    assert place.storages.unsupported(url, "get") is None
    storage.get(url, str(tmp_path / "b"), _go_on)
    assert (tmp_path / "b").read_bytes() == body


def test_what_was_there_is_replaced(place: Place, tmp_path: pathlib.Path) -> None:
    (place.folder / "f").write_bytes(b"a longer text than the new one")
    (tmp_path / "a").write_bytes(b"new")
    storage, url = place.of("f")
    storage.put(str(tmp_path / "a"), url, _go_on)
    assert (place.folder / "f").read_bytes() == b"new"


def test_a_file_below_a_folder_that_was_made_can_be_put(place: Place, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a").write_bytes(b"new")
    storage, url = place.of("made/here")
    storage.make_folder(url)
    storage.put(str(tmp_path / "a"), below(url, "f"), _go_on)
    assert (place.folder / "made" / "here" / "f").read_bytes() == b"new"


def test_what_is_not_there_is_named(place: Place, tmp_path: pathlib.Path) -> None:
    storage, url = place.of("none")
    with pytest.raises(StorageFailure) as caught:
        storage.get(url, str(tmp_path / "a"), _go_on)
    assert str(caught.value).startswith(f"{url} cannot be read: ")
    assert str(caught.value).endswith(".")


def test_it_never_writes_over_what_is_at_the_path(place: Place, tmp_path: pathlib.Path) -> None:
    (place.folder / "f").write_bytes(b"from storage")
    (tmp_path / "a").write_bytes(b"ours")
    storage, url = place.of("f")
    with pytest.raises(StorageFailure):
        storage.get(url, str(tmp_path / "a"), _go_on)
    assert (tmp_path / "a").read_bytes() == b"ours"


def test_a_link_is_not_put(place: Place, tmp_path: pathlib.Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "link").symlink_to("secret")
    storage, url = place.of("f")
    with pytest.raises(StorageFailure):
        storage.put(str(tmp_path / "link"), url, _go_on)
    assert list(place.folder.iterdir()) == []


def test_it_stops_when_it_is_told_to(place: Place, tmp_path: pathlib.Path) -> None:
    (place.folder / "f").write_bytes(BODY)
    (tmp_path / "a").write_bytes(BODY)
    storage, url = place.of("f")
    with pytest.raises(Stop):
        storage.get(url, str(tmp_path / "b"), _stop)
    with pytest.raises(Stop):
        storage.put(str(tmp_path / "a"), below(place.url, "g"), _stop)
    assert not (place.folder / "g").exists()
