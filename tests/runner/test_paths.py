"""Every rule about paths, with files and names moved around it."""

from __future__ import annotations

import os
import pathlib
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tesapi.runner.job import Refused
from tesapi.runner.mounts import Mount, Namespace, follow_links, is_within, normal
from tesapi.runner.storage.base import StorageFailure
from tesapi.runner.storage.file import FileStorage, path_of


def _never() -> None:
    return None


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "root" / "inner").mkdir(parents=True)
    (tmp_path / "rootless").mkdir()
    (tmp_path / "outside").mkdir()
    for folder in ("root", "rootless", "outside", "root/inner"):
        (tmp_path / folder / "file").write_text(folder, "ascii")
    return tmp_path / "root"


def _storage(root: pathlib.Path) -> FileStorage:
    return FileStorage({"roots": [str(root)]})


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("root/file", True),
        ("root/inner/file", True),
        ("root//inner/./file", True),
        ("root/none", True),  # judged by its place; that it is not there is told when it is to be read
        ("root", True),
        ("rootless/file", False),
        ("outside/file", False),
        ("root/../outside/file", False),
        ("root/inner/../../outside/file", False),
        ("root/inner/../file", False),  # '..' is refused wherever it would lead
    ],
)
def test_a_root_is_compared_segment_by_segment(root: pathlib.Path, path: str, allowed: bool) -> None:
    url = str(root.parent) + "/" + path
    assert (_storage(root).unsupported(url, "get") is None) == allowed
    assert (_storage(root).unsupported("file://" + url, "get") is None) == allowed


@pytest.mark.parametrize("kind", ["absolute", "relative", "of a folder above"])
def test_a_link_out_of_the_root_is_refused_when_it_is_judged_and_when_it_is_read(root: pathlib.Path, kind: str) -> None:
    outside = root.parent / "outside"
    if kind == "absolute":
        (root / "link").symlink_to(outside / "file")
        url = str(root / "link")
    elif kind == "relative":
        (root / "link").symlink_to("../outside/file")
        url = str(root / "link")
    else:
        (root / "folder").symlink_to(outside)
        url = str(root / "folder" / "file")
    storage = _storage(root)
    assert "not under the storage roots" in str(storage.unsupported(url, "get"))
    with pytest.raises(StorageFailure, match="not under the storage roots"):
        storage.get(url, str(root.parent / "copy"), _never)
    assert not (root.parent / "copy").exists()


def test_a_link_inside_of_the_root_is_followed(root: pathlib.Path) -> None:
    (root / "link").symlink_to(root / "inner" / "file")
    _storage(root).get(str(root / "link"), str(root.parent / "copy"), _never)
    assert (root.parent / "copy").read_text("ascii") == "root/inner"


def test_a_root_may_itself_be_a_link(root: pathlib.Path) -> None:
    (root.parent / "alias").symlink_to(root)
    storage = _storage(root.parent / "alias")
    assert storage.unsupported(str(root.parent / "alias" / "file"), "get") is None
    assert storage.unsupported(str(root / "file"), "get") is None


def test_a_root_that_is_not_there_is_named(tmp_path: pathlib.Path) -> None:
    storage = FileStorage({"roots": [str(tmp_path / "none")]})
    sentence = f"{tmp_path}/none/file: the storage root {tmp_path}/none is not a directory on this machine."
    assert storage.unsupported(str(tmp_path / "none" / "file"), "put") == sentence


def test_a_file_exchanged_between_judging_and_reading_does_not_get_out(root: pathlib.Path) -> None:
    storage, url = _storage(root), str(root / "file")
    assert storage.unsupported(url, "get") is None
    (root / "file").unlink()
    (root / "file").symlink_to(root.parent / "outside" / "file")
    with pytest.raises(StorageFailure, match="not under the storage roots"):
        storage.get(url, str(root.parent / "copy"), _never)


def test_a_folder_exchanged_between_judging_and_writing_does_not_get_out(root: pathlib.Path) -> None:
    storage, url = _storage(root), str(root / "inner" / "new" / "file")
    assert storage.unsupported(url, "put") is None
    shutil.rmtree(root / "inner")
    (root / "inner").symlink_to(root.parent / "outside")
    with pytest.raises(StorageFailure, match="not under the storage roots"):
        storage.put(str(root / "file"), url, _never)
    assert sorted(path.name for path in (root.parent / "outside").iterdir()) == ["file"]


def test_writing_replaces_a_link_and_not_what_it_leads_to(root: pathlib.Path) -> None:
    (root / "link").symlink_to(root.parent / "outside" / "file")
    stored = _storage(root).put(str(root / "inner" / "file"), str(root / "link"), _never)
    assert stored.size_bytes == len("root/inner")
    assert not (root / "link").is_symlink()
    assert (root.parent / "outside" / "file").read_text("ascii") == "outside"


def test_writing_replaces_a_hard_link_and_not_its_other_name(root: pathlib.Path) -> None:
    os.link(root / "file", root / "other")
    _storage(root).put(str(root / "inner" / "file"), str(root / "file"), _never)
    assert (root / "other").read_text("ascii") == "root"
    assert (root / "file").read_text("ascii") == "root/inner"


def test_what_is_written_is_there_whole_or_not_at_all(root: pathlib.Path) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    with pytest.raises(Stop):
        _storage(root).put(str(root / "inner" / "file"), str(root / "new"), stop)
    assert sorted(path.name for path in root.iterdir()) == ["file", "inner"]


def test_a_folder_is_not_replaced_by_a_file(root: pathlib.Path) -> None:
    with pytest.raises(StorageFailure, match="is a directory, and cannot be replaced by a file"):
        _storage(root).put(str(root / "file"), str(root / "inner"), _never)


def test_the_source_of_an_output_is_not_followed_if_it_is_a_link(root: pathlib.Path) -> None:
    (root / "link").symlink_to(root.parent / "outside" / "file")
    with pytest.raises(StorageFailure, match="cannot be written"):
        _storage(root).put(str(root / "link"), str(root / "new"), _never)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/a b%20c#?", "/a b%20c#?"),
        ("file:///a%20b%2520", "/a b%20"),
        ("file://localhost/a?b#c", "/a?b#c"),
        ("FILE:/a", "/a"),
        ("file:///%C3%BC%ff", "/ü\udcff"),
    ],
)
def test_a_url_is_decoded_and_a_plain_path_is_not(url: str, path: str) -> None:
    assert path_of(url) == path


def test_being_within_is_not_sharing_a_prefix() -> None:
    assert is_within("/data/a", "/data")
    assert is_within("/data", "/data")
    assert is_within("/anything", "/")
    assert not is_within("/database", "/data")
    assert not is_within("/", "/data")
    assert normal("//data/./x//") == "/data/x"


def test_a_path_leads_through_the_innermost_mount(tmp_path: pathlib.Path) -> None:
    mounts = [Mount(str(tmp_path / name), target, True) for name, target in (("a", "/v"), ("b", "/v/in"), ("c", "/vv"))]
    namespace = Namespace(mounts)
    assert namespace.resolve("/v/x") == str(tmp_path / "a" / "x")
    assert namespace.resolve("/v/in/x") == str(tmp_path / "b" / "x")
    assert namespace.resolve("/v/in") == str(tmp_path / "b")
    assert namespace.resolve("/v/../vv/x") == str(tmp_path / "c" / "x")
    with pytest.raises(Refused, match="/w is not in an input"):
        namespace.resolve("/w")


_names = st.sampled_from(["a", "b", "..", ".", "", "vol", "etc"])
_targets = st.builds(
    lambda parts, slash: slash + "/".join(parts), st.lists(_names, min_size=1, max_size=5), st.sampled_from(["", "/"])
)


@settings(max_examples=300, deadline=None)
@given(
    links=st.dictionaries(st.sampled_from(["a", "b", "vol/a", "vol/b", "sub/a"]), _targets, max_size=5), path=_targets
)
def test_no_link_leads_out_of_the_mounts(
    tmp_path_factory: pytest.TempPathFactory, links: dict[str, str], path: str
) -> None:
    base = tmp_path_factory.mktemp("mounts")
    (base / "one" / "vol").mkdir(parents=True)
    (base / "one" / "sub").mkdir()
    (base / "two").mkdir()
    for name, target in links.items():
        if target:
            (base / "one" / name).symlink_to(target)
    mounts = [Mount(str(base / "one"), "/vol", True), Mount(str(base / "two"), "/vol/sub", True)]
    try:
        where = Namespace(mounts).resolve("/" + path)
    except Refused:
        return
    assert is_within(where, str(base / "one")) or is_within(where, str(base / "two"))
    assert ".." not in where.split("/")
    assert not os.path.islink(where)  # noqa: PTH114


@given(path=st.text(alphabet="ab./", max_size=20))
def test_following_no_links_is_normalising(path: str) -> None:
    assert follow_links("/" + path, lambda _: None) == os.path.normpath("/" + path.lstrip("/"))
