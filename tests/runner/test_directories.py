"""Directories and wildcards, in and out."""

from __future__ import annotations

import os
import pathlib

import pytest

from tesapi.runner import wildcards
from tesapi.runner.storage.base import below
from tests.jobs import Place, only, outcome, script, step


def _tree(folder: pathlib.Path) -> dict[str, str]:
    """Every file below `folder`, with its text; a directory without entries ends with a slash."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file():
            found[name] = path.read_text("utf-8")
        elif not any(path.iterdir()):
            found[name + "/"] = ""
    return found


@pytest.mark.parametrize("kind", ["DIRECTORY", "FILE"])
def test_a_directory_comes_in_with_all_that_is_in_it(place: Place, kind: str) -> None:
    source = place.storage / "ref"
    (source / "deep" / "empty").mkdir(parents=True)
    (source / "a").write_text("a", "ascii")
    (source / "deep" / "ü %41").write_text("b", "ascii")
    (source / "tool").write_text("#!/bin/sh\necho ran\n", "ascii")
    (source / "tool").chmod(0o755)
    (source / ".hidden").write_text("h", "ascii")
    events = place.run(
        script("cd /data/ref; find . | sort; ./tool; touch a 2>/dev/null || echo read-only"),
        inputs=[{"path": "/data/ref/", "url": place.url("ref/"), "type": kind}],
    )
    assert outcome(events) == ("complete", None)
    names = [".", "./.hidden", "./a", "./deep", "./deep/empty", "./deep/ü %41", "./tool"]
    assert only(events, "executor_ended")[0]["stdout"].splitlines() == [*names, "ran", "read-only"]


def test_links_in_a_directory_never_lead_out_of_the_roots(place: Place) -> None:
    secret = place.storage.parent / "secret"
    secret.write_text("secret", "ascii")
    source = place.storage / "ref"
    source.mkdir()
    (place.storage / "other").mkdir()
    (place.storage / "other" / "file").write_text("inside", "ascii")
    (source / "inside").symlink_to("../other/file")
    (source / "folder").symlink_to(place.storage / "other")
    (source / "outside").symlink_to(secret)
    (source / "above").symlink_to("..")
    (source / "self").symlink_to(".")
    (source / "nowhere").symlink_to("nothing")
    events = place.run(
        script(
            "cd /ref; cat inside folder/file; for l in outside above self nowhere; do readlink $l; done; cat outside"
        ),
        inputs=[{"path": "/ref", "url": place.url("ref"), "type": "DIRECTORY"}],
    )
    ended = only(events, "executor_ended")[0]
    assert "secret" not in ended["stdout"].replace(str(secret), "")
    assert ended["stdout"].startswith("insideinside")
    assert ended["exit_code"] == 1  # there is no such file in the container


def test_a_file_where_a_directory_was_meant_is_refused(place: Place) -> None:
    (place.storage / "file").write_text("x", "ascii")
    events = place.run(step("true"), inputs=[{"path": "/d", "url": place.url("file"), "type": "DIRECTORY"}])
    sentence = f"{place.url('file')} is a file, and the input /d is to be a directory."
    assert outcome(events) == ("system_error", sentence)


def test_an_input_may_lie_inside_of_an_input_directory(place: Place) -> None:
    (place.storage / "ref").mkdir()
    (place.storage / "ref" / "a").write_text("a", "ascii")
    events = place.run(
        script("cat /ref/a /ref/sub/b"),
        inputs=[
            {"path": "/ref/sub/b", "content": "b"},
            {"path": "/ref", "url": place.url("ref"), "type": "DIRECTORY"},
        ],
    )
    assert only(events, "executor_ended")[0]["stdout"] == "ab"
    assert _tree(place.storage / "ref") == {"a": "a"}


def test_an_output_may_go_into_an_input_directory_which_is_a_copy_then(place: Place) -> None:
    (place.storage / "ref").mkdir()
    (place.storage / "ref" / "a").write_text("a", "ascii")
    events = place.run(
        script("cat /ref/a > /ref/out; echo changed > /ref/a"),
        inputs=[{"path": "/ref", "url": place.url("ref"), "type": "DIRECTORY"}],
        outputs=[{"path": "/ref/out", "url": place.url("out")}],
    )
    assert outcome(events) == ("complete", None)
    assert (place.stored("out"), place.stored("ref/a")) == ("a", "a")


@pytest.mark.parametrize("kind", ["DIRECTORY", "FILE"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_a_directory_goes_out_and_each_file_is_reported(place: Place, kind: str, slash: str) -> None:
    events = place.run(
        script("mkdir -p /work/dir/deep/empty; cd /work/dir; echo a > a; echo b > 'deep/b %#ü'; echo h > .h"),
        outputs=[{"path": "/work/dir" + slash, "url": place.url("results/d") + slash, "type": kind}],
    )
    assert outcome(events) == ("complete", None)
    assert _tree(place.storage / "results" / "d") == {".h": "h\n", "a": "a\n", "deep/b %#ü": "b\n", "deep/empty/": ""}
    assert {event["path"]: event["url"] for event in only(events, "output")} == {
        "/work/dir/.h": place.url("results/d/.h"),
        "/work/dir/a": place.url("results/d/a"),
        "/work/dir/deep/b %#ü": place.url("results/d/deep/b%20%25%23%C3%BC"),
    }


def test_a_working_directory_at_the_top_goes_out_whole(place: Place) -> None:
    events = place.run(
        script("wc -l < /in/a; echo made > made", workdir="/zEjWbQ", stdout="/zEjWbQ/count.txt"),
        inputs=[{"path": "/in/a", "content": "1\n2\n"}],
        outputs=[
            {"path": "/zEjWbQ/count.txt", "url": place.url("tmp/count.txt")},
            {"path": "/zEjWbQ", "url": place.url("tmp/"), "type": "DIRECTORY"},
        ],
    )
    assert outcome(events) == ("complete", None)
    assert _tree(place.storage / "tmp") == {"count.txt": "2\n", "made": "made\n"}


def test_a_directory_is_stored_as_the_container_sees_it(place: Place) -> None:
    events = place.run(
        script("cd /work/d; ln -s /etc/passwd passwd; ln -s a link; ln -s . ring; mkfifo fifo; echo b > b"),
        volumes=["/work/d"],
        inputs=[{"path": "/work/d/a", "content": "input"}],
        outputs=[{"path": "/work/d", "url": place.url("d"), "type": "DIRECTORY"}],
    )
    assert outcome(events) == ("complete", None)
    assert _tree(place.storage / "d") == {"a": "input", "b": "b\n", "link": "input"}
    notes = [event["text"] for event in only(events, "note")]
    outside = "which is not in an input, an output folder or a volume of the task."
    assert notes == [
        "Not stored: The output /work/d/fifo is not a regular file.",
        f"Not stored: /work/d/passwd leads to /etc/passwd, {outside}",
        "/work/d/ring leads to a folder around it, and was not stored.",
    ]


def test_a_directory_that_was_not_made_is_a_system_error(place: Place) -> None:
    events = place.run(step("true"), outputs=[{"path": "/work/d", "url": place.url("d"), "type": "DIRECTORY"}])
    sentence = "The output /work/d was not written by the task (No such file or directory)."
    assert outcome(events) == ("system_error", sentence)


def test_a_file_that_was_to_be_a_directory_is_a_system_error(place: Place) -> None:
    events = place.run(
        step("touch", "/work/d"), outputs=[{"path": "/work/d", "url": place.url("d"), "type": "DIRECTORY"}]
    )
    assert outcome(events) == ("system_error", "The output /work/d is a file, and was to be a directory.")


def test_wildcards_select_files_whose_place_below_the_prefix_is_kept(place: Place) -> None:
    events = place.run(
        script(
            "mkdir -p sub/x other; touch a1.txt a2.txt a10.txt .a3.txt sub/x/1.dat other/2.dat sub/no.txt",
            workdir="/work",
        ),
        outputs=[
            {"path": "/work/a?.txt", "path_prefix": "/work", "url": place.url("out")},
            {"path": "/work/*/x/*.dat", "path_prefix": "/work/", "url": place.url("out/")},
        ],
    )
    assert outcome(events) == ("complete", None)
    assert set(_tree(place.storage / "out")) == {"a1.txt", "a2.txt", "sub/x/1.dat"}


def test_wildcards_without_a_prefix_are_taken_off_the_end_of_the_url(place: Place) -> None:
    events = place.run(
        script("touch m.tsv n.tsv o.tsv part_1.log part_2.log", workdir="/work"),
        outputs=[
            {"path": "/work/[mn].tsv", "url": place.url("out/[mn].tsv")},
            {"path": "/work/part_*.log", "url": str(place.storage / "out" / "part_*.log")},
            {"path": "/work/o.*", "url": place.url("elsewhere")},
        ],
    )
    assert outcome(events) == ("complete", None)
    assert set(_tree(place.storage / "out")) == {"m.tsv", "n.tsv", "part_1.log", "part_2.log"}
    assert set(_tree(place.storage / "elsewhere")) == {"o.tsv"}


def test_wildcards_match_directories_with_all_that_is_in_them(place: Place) -> None:
    events = place.run(
        script("mkdir dir_1; echo x > dir_1/x", workdir="/work"),
        outputs=[{"path": "/work/dir_*", "path_prefix": "/work", "url": place.url("out")}],
    )
    assert outcome(events) == ("complete", None)
    assert _tree(place.storage / "out") == {"dir_1/x": "x\n"}


def test_a_file_whose_name_is_the_pattern_is_that_file(place: Place) -> None:
    events = place.run(
        script("echo literal > '/work/[mn].tsv'; echo m > /work/m.tsv"),
        outputs=[{"path": "/work/[mn].tsv", "url": place.url("[mn].tsv")}],
    )
    assert outcome(events) == ("complete", None)
    assert _tree(place.storage) == {"[mn].tsv": "literal\n"}


def test_wildcards_that_match_nothing_are_noted_and_no_error(place: Place) -> None:
    events = place.run(step("true"), outputs=[{"path": "/work/*.x", "path_prefix": "/work", "url": place.url("out")}])
    assert outcome(events) == ("complete", None)
    assert only(events, "note")[0]["text"] == "Nothing matches the output /work/*.x."


def test_wildcards_do_not_follow_a_link_out_of_the_task(place: Place) -> None:
    events = place.run(
        step("ln", "-s", "/etc", "/work/etc"),
        outputs=[{"path": "/work/*/passwd", "path_prefix": "/work", "url": place.url("out")}],
    )
    assert outcome(events) == ("complete", None)
    assert not (place.storage / "out").exists()


@pytest.mark.parametrize(
    ("path", "prefix", "url", "expected"),
    [
        ("/w/*.x", "/w", "s3://b/k", ("/w", "s3://b/k")),
        ("/w/*.x", "", "s3://b/k/*.x", ("/w", "s3://b/k")),
        ("/w/*.x", "", "s3://b/k", ("/w", "s3://b/k")),
        ("/w/a*/b/c?", "", "/k/a*/b/c?", ("/w", "/k")),
        ("/*.x", "", "/k/*.x", ("/", "/k")),
    ],
)
def test_what_is_taken_off_a_matching_path(path: str, prefix: str, url: str, expected: tuple[str, str]) -> None:
    assert wildcards.base(path, prefix, url) == expected


def test_a_name_is_quoted_in_a_url_and_not_in_a_path() -> None:
    name = os.fsdecode(b"a b%#\xff")
    assert below("file:///d/", name) == "file:///d/a%20b%25%23%FF"
    assert below("/d", name) == f"/d/{name}"
    assert below("s3://b/k", "") == "s3://b/k"
