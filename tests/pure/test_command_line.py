"""From what is typed to the document that is sent."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tesapi.cli.client import Client
from tesapi.cli.document import INLINE_BYTES, ServerFiles, Wish, build, expand, read_documents
from tesapi.cli.exits import UsageProblem
from tesapi.cli.show import plain
from tesapi.errors import TesapiError
from tesapi.tes.models import parse_document

_NAMES = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,4}", fullmatch=True)
_PLACES = st.dictionaries(_NAMES, st.from_regex(r"/[a-z0-9/._]{1,8}", fullmatch=True), max_size=4)
UNKNOWN = ServerFiles({})


def wish(*command: str, **fields: object) -> Wish:
    return Wish(image="alpine", command=command or ("true",), **fields)  # type: ignore[arg-type]


# $NAME in the command.


@given(_PLACES, st.lists(st.one_of(st.sampled_from(["$", "${", "}", "x", " ", "'"]), _NAMES), max_size=8))
def test_only_declared_names_are_replaced(places: dict[str, str], parts: list[str]) -> None:
    word = "".join(parts)
    tokens = re.findall(r"\$\{[A-Za-z_]\w*\}|\$[A-Za-z_]\w*|[^$]+|\$", word, re.ASCII)
    assert "".join(tokens) == word
    expected = "".join(
        places.get(token.strip("${}"), token) if re.match(r"\$(\{[A-Za-z_]|[A-Za-z_])", token) else token
        for token in tokens
    )
    assert expand(word, places) == expected


@given(_PLACES.filter(bool), st.data())
def test_it_is_replaced_as_a_shell_would_do_it(places: dict[str, str], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(places)))
    before, after = data.draw(st.sampled_from(["", "--in=", "a:"])), data.draw(st.sampled_from(["", ".txt", "/x", "-"]))
    assert expand(f"{before}${name}{after}", places) == f"{before}{places[name]}{after}"
    assert expand(f"{before}${{{name}}}{after}Z", places) == f"{before}{places[name]}{after}Z"


@pytest.mark.parametrize("word", ["$other", "${in", "$", "$$", "$INPUT", "in", r"\$in", "${in:-x}", "$1"])
def test_everything_else_stays_as_it_is(word: str) -> None:
    assert expand(word, {"in": "/a", "INPUT_": "/b"}) == word


def test_the_longest_name_counts() -> None:
    assert expand("$in $input ${in}put", {"in": "/a", "input": "/b"}) == "/a /b /aput"


@given(st.text(min_size=1, max_size=30).filter(lambda name: "\0" not in name))
def test_a_place_means_the_same_to_a_shell_a_command_and_a_wildcard(name: str) -> None:
    document = (
        build(wish("$x"), UNKNOWN) if not name else build(wish("$x", outputs=(("x", "s3://b/" + name),)), UNKNOWN)
    )
    (place,) = document["executors"][0]["command"]
    assert place.startswith("/tes/out/x/")
    last = place.removeprefix("/tes/out/x/")
    assert last.strip(".")
    assert not set(last) & set("/*?[]{}$'\"\\;&|<>() \t\n`!#~")


def test_a_shell_reads_a_place_as_one_word(tmp_path: Path) -> None:
    file = tmp_path / "it's; $(touch oops) *.txt"
    file.write_text("x")
    document = build(wish("$f", inputs=(("f", str(file)),)), UNKNOWN)
    place = document["executors"][0]["command"][0]
    run = subprocess.run(["sh", "-c", f"printf %s {place}"], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout == place
    assert place.endswith(".txt")


# Files.


def test_a_file_that_the_server_has_is_named_and_another_one_is_sent(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("bé")
    files = ServerFiles({"storage": [f"file://{tmp_path}/shared"]})
    inputs = (("a", f"{tmp_path}/shared/a.txt"), ("b", f"{tmp_path}/b.txt"), ("c", "s3://bucket/c%20c.bam"))
    document = build(wish("x", "$a", "$b", "$c", inputs=inputs), files)
    assert document["inputs"] == [
        {"name": "a", "path": "/tes/in/a/a.txt", "type": "FILE", "url": f"file://{tmp_path}/shared/a.txt"},
        {"name": "b", "path": "/tes/in/b/b.txt", "type": "FILE", "content": "bé"},
        {"name": "c", "path": "/tes/in/c/c_c.bam", "type": "FILE", "url": "s3://bucket/c%20c.bam"},
    ]
    (executor,) = document["executors"]
    places = {"a": "/tes/in/a/a.txt", "b": "/tes/in/b/b.txt", "c": "/tes/in/c/c_c.bam"}
    assert executor["command"] == ["x", *places.values()]
    assert executor["env"] == places


def test_a_file_behind_a_link_is_where_it_really_is(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "elsewhere").write_text("x")
    (tmp_path / "shared" / "link").symlink_to(tmp_path / "elsewhere")
    files = ServerFiles({"storage": [f"file://{tmp_path}/shared"]})
    (item,) = build(wish(inputs=(("f", f"{tmp_path}/shared/link"),)), files)["inputs"]
    assert item["content"] == "x"


def test_a_root_is_not_the_beginning_of_another_folders_name(tmp_path: Path) -> None:
    files = ServerFiles({"storage": [f"file://{tmp_path}/data"]})
    assert files.can_read(f"{tmp_path}/data")
    assert files.can_read(f"{tmp_path}/data/x")
    assert not files.can_read(f"{tmp_path}/data2/x")
    assert files.can_write(f"{tmp_path}/data/new/folder/x")
    assert not files.can_write(f"{tmp_path}/data")
    assert not UNKNOWN.can_read("/")


def test_a_directory_that_the_server_does_not_have_is_sent_file_by_file(tmp_path: Path) -> None:
    (tmp_path / "d" / "sub").mkdir(parents=True)
    (tmp_path / "d" / "sub" / "b").write_text("B")
    (tmp_path / "d" / "a").write_text("")
    os.mkfifo(tmp_path / "d" / "pipe")
    document = build(wish("$d", inputs=(("d", f"{tmp_path}/d/"),)), ServerFiles({"storage": ["file:///srv"]}))
    assert [(i["path"], i["content"]) for i in document["inputs"]] == [
        ("/tes/in/d/d/a", ""),
        ("/tes/in/d/d/sub/b", "B"),
    ]
    assert document["executors"][0]["command"] == ["/tes/in/d/d"]


def test_a_pipe_is_sent_even_where_the_server_reads_everything(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"piped")
    os.close(writer)
    asked = wish(inputs=(("x", f"/dev/fd/{reader}"),))
    try:
        (item,) = build(asked, ServerFiles({"storage": ["file:///"]}))["inputs"]
    finally:
        os.close(reader)
    assert item["content"] == "piped"
    with (tmp_path / "f").open("wb") as file:
        file.truncate(INLINE_BYTES + 1)
        asked = wish(inputs=(("x", f"/proc/self/fd/{file.fileno()}"),))
        with pytest.raises(UsageProblem, match="nothing that it tells"):
            build(asked, UNKNOWN)


@pytest.mark.parametrize("content", [b"x" * (INLINE_BYTES + 1), b"\xff\xfe", b"a\0b"])
def test_what_cannot_be_sent_is_refused_unless_the_server_may_have_it(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "f"
    file.write_bytes(content)
    asked = wish(inputs=(("f", str(file)),))
    with pytest.raises(UsageProblem, match=r"-i f: .* is not below what the server reads \(s3://bucket\)"):
        build(asked, ServerFiles({"storage": ["s3://bucket"]}))
    assert build(asked, UNKNOWN)["inputs"][0]["url"] == f"file://{file}"


def test_an_output_that_the_server_cannot_write_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match=r"-o x: /elsewhere/x is not below what the server writes"):
        build(wish(outputs=(("x", "/elsewhere/x"),)), ServerFiles({"storage": [f"file://{tmp_path}"]}))


def test_a_directory_output_is_there_when_the_command_begins() -> None:
    document = build(wish("$a", "$b", outputs=(("a", "/srv/results/"), ("b", "s3://bucket/b/"))), UNKNOWN)
    assert [(o["path"], o["url"], o["type"]) for o in document["outputs"]] == [
        ("/tes/out/a/results", "file:///srv/results", "DIRECTORY"),
        ("/tes/out/b/b", "s3://bucket/b/", "DIRECTORY"),
    ]
    assert document["volumes"] == ["/tes/out/a/results", "/tes/out/b/b"]


def test_a_path_that_a_url_would_have_to_quote_is_sent_as_a_path(tmp_path: Path) -> None:
    (item,) = build(wish(outputs=(("x", f"{tmp_path}/my #1%.txt"),)), UNKNOWN)["outputs"]
    assert item["url"] == f"{tmp_path}/my #1%.txt"


def test_a_relative_name_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (item,) = build(wish(outputs=(("x", "sub/../x.txt"),)), UNKNOWN)["outputs"]
    assert item["url"] == f"file://{tmp_path}/x.txt"


def test_nothing_is_said_that_was_not_asked_for() -> None:
    assert build(wish("a", ""), UNKNOWN) == {"executors": [{"image": "alpine", "command": ["a", ""]}]}


def test_everything_that_can_be_asked_for_is_in_the_document() -> None:
    document = build(
        wish(
            "c",
            env=(("A", "1=2"), ("B", "")),
            tags=(("k", "v"),),
            volumes=("/v",),
            stdin="s3://b/in.txt",
            name="n",
            workdir="/w",
            cpu_cores=2,
            ram_gb=0.5,
            disk_gb=1.0,
        ),
        UNKNOWN,
    )
    assert document == {
        "name": "n",
        "inputs": [{"name": "stdin", "path": "/tes/stdin/in.txt", "type": "FILE", "url": "s3://b/in.txt"}],
        "resources": {"cpu_cores": 2, "ram_gb": 0.5, "disk_gb": 1.0},
        "executors": [
            {
                "image": "alpine",
                "command": ["c"],
                "workdir": "/w",
                "stdin": "/tes/stdin/in.txt",
                "env": {"A": "1=2", "B": ""},
            }
        ],
        "volumes": ["/v"],
        "tags": {"k": "v"},
    }
    import json

    parse_document(json.dumps(document).encode())


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"inputs": (("1x", "s3://a/b"),)}, "begins with no digit"),
        ({"inputs": (("x-y", "s3://a/b"),)}, "letters, digits and _"),
        ({"inputs": (("x", "s3://a/b"),), "outputs": (("x", "s3://a/c"),)}, "given twice, by -i and by -o"),
        ({"inputs": (("x", "s3://a/b"),), "env": (("x", "1"),)}, "given twice, by -i and by -e"),
        ({"inputs": (("x", ""),)}, "name of a file is empty"),
        ({"inputs": (("x", "/no/such\x1bfile"),)}, "No such file or directory"),
        ({"env": (("x", "\udcff"),)}, "not UTF-8"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(fields: dict[str, object], sentence: str) -> None:
    with pytest.raises(UsageProblem) as caught:
        build(wish(**fields), UNKNOWN)
    assert sentence in str(caught.value)
    assert str(caught.value).isprintable()


# Documents in a file.


@pytest.mark.parametrize("text", ['{"a": 1}{"b": 2}', '[{"a": 1}, {"b": 2}]', '{"a": 1}\n\n{"b": 2}\n'])
def test_a_file_holds_one_document_or_several(text: str) -> None:
    assert read_documents(text, "f") == [{"a": 1}, {"b": 2}]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "f has no document in it."),
        ("[]", "f has no document in it."),
        ('{"a": 1}\n{"b": ', "f, line 2"),
        ("{'a': 1}", "f, line 1"),
        ('[{"a": 1}, 2]', "f: document 2 is not a JSON object."),
        ('{"a": NaN}', "NaN is not JSON"),
        ("[" * 100_000, "f, line 1"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UsageProblem) as caught:
        read_documents(text, "f")
    assert sentence in str(caught.value)


# Addresses, and what terminals are shown.


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://[::1", "http://h:port", "http://h/?key=hush", "http://h/#hush", "http://h\n/"]
)
def test_a_tes_url_that_is_none_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(TesapiError, match="TES_URL is to be") as caught:
        Client({"TES_URL": url})
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://user:hu%24h@host:1/", "user:hush@host:1"])
def test_credentials_in_tes_url_are_not_shown(url: str) -> None:
    with Client({"TES_URL": url}) as client:
        assert client.shown == "http://host:1"


def test_a_token_that_no_header_can_hold_is_refused_and_not_shown() -> None:
    with pytest.raises(TesapiError) as caught:
        Client({"TES_TOKEN": "secret\r\nX: y"})
    assert "secret" not in str(caught.value)


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = plain(text)
    assert shown.isprintable()
    assert len(shown) == len(text)
