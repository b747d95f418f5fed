"""http and https: what is downloaded and uploaded, and what servers may do to us meanwhile."""

from __future__ import annotations

import base64
import gzip
import http.server
import itertools
import os
import pathlib
import re
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from tesapi.runner.storage import web_url
from tesapi.runner.storage.addresses import Policy
from tesapi.runner.storage.base import below, shown
from tesapi.runner.storage.http import HttpStorage, Limits
from tesapi.settings import Settings
from tests.jobs import Event, JobPlace, only, outcome, pythons, script, step, until
from tests.web import Deaf, Request, Web, answer

BODY = bytes(range(256)) * 4096
QUICK = {"stall_s": 0.6, "backoff_s": 0.01, "tries": 2}
SLACK_S = 8.0
"""How long a job may take that has little to do, on a machine that has a lot to do."""


@pytest.fixture
def place(tmp_path: pathlib.Path, bubblewrap: Mapping[str, object]) -> JobPlace:
    """Files move outside of containers, so that one runtime stands for all."""
    return JobPlace(tmp_path, bubblewrap)


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        yield server


def run(place: JobPlace, *steps: Any, http: dict[str, Any] | None = None, **fields: Any) -> list[Event]:
    """Run a job whose storage is `http` with little patience, and files."""
    storage = {"file": {"roots": [str(place.storage)]}, "http": QUICK | (http or {})}
    return place.run(*(steps or [step("true")]), storage=storage, **fields)


def fetch(place: JobPlace, url: str, **http: Any) -> tuple[bytes | None, str | None]:
    """Have a job take `url` in; its bytes, or the sentence on why not. Little of it may be left in the job's place."""
    began = time.monotonic()
    events = run(
        place,
        script("cat /in/file > /out/file"),
        http=http,
        inputs=[{"path": "/in/file", "url": url}],
        outputs=[{"path": "/out/file", "url": place.url("file")}],
    )
    assert time.monotonic() - began < SLACK_S
    kind, sentence = outcome(events)
    if kind == "complete":
        return (place.storage / "file").read_bytes(), None
    assert kind == "system_error"
    assert sum(path.stat().st_size for path in place.directory.rglob("*") if path.is_file()) < 4_000_000
    return None, sentence


def store(place: JobPlace, url: str, **http: Any) -> tuple[list[Event], str | None]:
    """Have a job store a file of BODY's size at `url`; what it reports as stored, and its sentence if it failed."""
    (place.storage / "source").write_bytes(BODY)
    events = run(
        place,
        script("cp /in/source /out/file"),
        http=http,
        inputs=[{"path": "/in/source", "url": place.url("source")}],
        outputs=[{"path": "/out/file", "url": url}],
    )
    return only(events, "output"), outcome(events)[1]


# What goes well.


def test_a_file_comes_in_byte_by_byte_as_it_is(place: JobPlace, web: Web) -> None:
    url = web.on("/a/file?job_key=1&path=%2Fx%20y", answer("200 OK", BODY))
    assert fetch(place, url) == (BODY, None)
    (request,) = web.requests
    assert request.headers["Accept-Encoding"] == "identity"
    assert request.headers["Host"] == f"127.0.0.1:{web.port}"
    assert "Authorization" not in request.headers


@pytest.mark.parametrize(
    "parts",
    [
        [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"2;x=y\r\nab\r\n", b"1\r\nc\r\n0\r\nT: x\r\n\r\n"],
        [b"HTTP/1.0 200 OK\r\n\r\n", b"ab", b"c"],
        [b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n", b"HTTP/1.1 200\r\nContent-Length: 3\r\n\r\nabc"],
        [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 3\r\nConnection: close\r\n\r\n", b"abc"],
    ],
)
def test_every_way_to_say_how_long_a_file_is_is_understood(place: JobPlace, web: Web, parts: list[bytes]) -> None:
    assert fetch(place, web.on("/f", parts)) == (b"abc", None)


def test_an_empty_file_comes_in(place: JobPlace, web: Web) -> None:
    assert fetch(place, web.on("/f", answer("200 OK"))) == (b"", None)


def test_a_server_of_the_standard_library_serves_and_a_name_stands_for_its_address(
    place: JobPlace, tmp_path: pathlib.Path
) -> None:
    (tmp_path / "a b").write_bytes(BODY)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        assert fetch(place, f"http://localhost:{server.server_port}/a b") == (BODY, None)
        server.shutdown()


def test_a_server_at_an_ipv6_address_is_reached(place: JobPlace) -> None:
    try:
        server = Web(host="::1")
    except OSError:
        pytest.skip("needs the IPv6 loopback address ::1")
    with server:
        assert fetch(place, server.on("/f", answer("200 OK", b"six"))) == (b"six", None)
    assert server.requests[0].headers["Host"] == f"[::1]:{server.port}"


def test_a_file_goes_out_and_what_was_sent_is_reported(place: JobPlace, web: Web) -> None:
    url = web.on("/results/f", answer("201 Created"))
    stored, sentence = store(place, url)
    assert sentence is None
    assert [(event["url"], event["size_bytes"]) for event in stored] == [(url, len(BODY))]
    (request,) = web.requests
    assert (request.method, request.body) == ("PUT", BODY)


def test_a_directory_and_what_wildcards_match_go_out_file_by_file(place: JobPlace, web: Web) -> None:
    targets = {"/up/d/a?t=/x/", "/up/d/deep/b%20c?t=/x/", "/w/1.txt", "/w/2.txt"}
    for target in targets:
        web.on(target, answer("204 No Content"))
    events = run(
        place,
        script("mkdir -p /out/d/deep /w; touch /out/d/a '/out/d/deep/b c' /w/1.txt /w/2.txt", workdir="/w"),
        outputs=[
            {"path": "/out/d", "url": f"{web.url}/up/d/?t=/x/", "type": "DIRECTORY"},
            {"path": "/w/*.txt", "path_prefix": "/w", "url": f"{web.url}/w/"},
        ],
    )
    assert outcome(events) == ("complete", None)
    assert {request.target for request in web.requests} == targets
    assert len(only(events, "output")) == 4


def test_spaces_and_letters_beyond_ascii_are_escaped_once(place: JobPlace, web: Web) -> None:
    target = "/a%20b/%C3%BC%20%41+[x]|~?path=/a%20b&c=%C3%BC;'%2F"
    web.on(target, answer("200 OK", b"x"))
    assert fetch(place, web.url + "/a b/ü %41+[x]|~?path=/a b&c=ü;'%2F#fragment") == (b"x", None)


def test_a_slash_at_the_end_of_an_outputs_url_is_kept(place: JobPlace, web: Web) -> None:
    assert store(place, web.on("/upload/", answer("200 OK")))[1] is None


# User and password.


def test_user_and_password_are_sent_and_never_shown(place: JobPlace, web: Web) -> None:
    web.on("/in?token=hush", answer("200 OK", b"x"))
    web.on("/out", answer("200 OK"))
    secret = web.url.replace("://", "://us%40er:correct%20horse@")
    events = run(
        place,
        inputs=[{"path": "/in", "url": secret + "/in?token=hush"}],
        outputs=[{"path": "/in", "url": secret + "/out"}],
    )
    assert [event["url"] for event in only(events, "output")] == [web.url + "/out"]
    expected = "Basic " + base64.b64encode(b"us@er:correct horse").decode()
    assert [request.headers["Authorization"] for request in web.requests] == [expected, expected]
    text = place.report_file.read_text("ascii")
    assert "horse" not in text
    assert "hush" not in text


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("http://u:pw@127.0.0.1:1/x?X-Amz-Signature=pw&y=1", "http://127.0.0.1:1/x?X-Amz-Signature=********&y=1"),
        ("http://u:p/w@127.0.0.1/x", "http://127.0.0.1/x"),
        ("http:u:pw@127.0.0.1/x", "http:127.0.0.1/x"),
        ("http://u:pw@169.254.169.254/", "http://169.254.169.254/"),
        ("ftp://u:pw@example.org/x", "ftp://example.org/x"),
        ("https://u:pw@[::1/x", "https://[::1/x"),
        ("http://u:pw@host:99999/", "http://host:99999/"),
    ],
)
def test_a_sentence_shows_no_user_and_no_secret(place: JobPlace, url: str, seen: str) -> None:
    _, sentence = fetch(place, url)
    assert str(sentence).startswith(seen)
    for secret in ("pw", "p/w", "u:"):
        assert secret not in str(sentence)


def test_user_and_password_stay_with_their_host(place: JobPlace, web: Web) -> None:
    with Web(host="127.0.0.2") as other:
        last = other.on("/c", answer("200 OK", b"x"))
        web.on("/b", answer("307 Temporary Redirect", Location=last))
        web.on("/a", answer("302 Found", Location="/b"))
        assert fetch(place, web.url.replace("://", "://u:p@") + "/a") == (b"x", None)
    assert ["Authorization" in request.headers for request in web.requests + other.requests] == [True, True, False]


def test_user_and_password_go_along_to_tls_and_never_back() -> None:
    url = web_url.parse("http://u:p@h/x")
    assert url.moved_to("https://h/y").authorization is not None
    assert url.moved_to("http://h:81/y").authorization is None
    assert url.moved_to("https://h:81/y").authorization is None
    with pytest.raises(ValueError, match="unencrypted"):
        web_url.parse("https://u:p@h/x").moved_to("http://other/y")
    assert web_url.parse("https://h/x").moved_to("http://other/y").scheme == "http"


# Redirects.


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent"])
def test_a_redirect_is_followed(place: JobPlace, web: Web, status: str) -> None:
    web.on("/d/b%20%C3%BC", answer("200 OK", b"x"))
    assert fetch(place, web.on("/d/a", answer(status, b"gone", Location="b ü"))) == (b"x", None)


def test_an_upload_is_redirected_with_all_of_its_body(place: JobPlace, web: Web) -> None:
    web.on("/b", answer("200 OK"))
    url = web.on("/a", Deaf(answer("307 Temporary Redirect", Location="/b")))
    stored, sentence = store(place, url)
    assert (sentence, stored[0]["url"]) == (None, url)
    assert web.requests[-1].body == BODY


def test_an_upload_that_would_become_a_download_is_not_redirected(place: JobPlace, web: Web) -> None:
    url = web.on("/a", answer("302 Found", Location="/b"))
    assert store(place, url)[1] == f"{url} cannot be written: the server answers 302 Found."


def test_redirects_have_an_end(place: JobPlace, tmp_path: pathlib.Path, web: Web) -> None:
    web.on("/b", answer("302 Found", Location="/a"))
    ring = web.on("/a", answer("302 Found", Location="/b"))
    _, sentence = fetch(place, ring)
    assert str(sentence).endswith("and there it redirects in a ring.") or str(sentence).endswith("redirects in a ring.")
    for number in range(20):
        web.on(f"/{number}", answer("302 Found", Location=f"/{number + 1}"))
    (tmp_path / "2").mkdir()
    _, sentence = fetch(JobPlace(tmp_path / "2", place.runtime), web.url + "/0")
    assert str(sentence).endswith("it redirects more than 10 times.")


@pytest.mark.parametrize(
    ("location", "why"),
    [
        ("http://169.254.169.254/latest", "the host 169.254.169.254 is refused: 169.254.169.254 is link-local"),
        ("http://0xa9fea9fe/", "the host 0xa9fea9fe is refused: 169.254.169.254 is link-local"),
        ("http://[::ffff:169.254.169.254]/", "is link-local"),
        ("file:///etc/passwd", "it is not a URL that begins with http:// or https://"),
        ("ftp://u:pw@h/", "it is not a URL that begins with http:// or https://"),
        ("http://[x/", "where it cannot be followed"),
        ("", "without saying where to go"),
    ],
)
def test_a_redirect_to_where_nobody_may_go_is_not_followed(place: JobPlace, web: Web, location: str, why: str) -> None:
    url = web.on("/a", answer("302 Found", Location=location))
    _, sentence = fetch(place, url)
    assert str(sentence).startswith(f"{url} cannot be read: ")
    assert why in str(sentence)
    assert "pw" not in str(sentence)


# Where jobs may go.

LINK_LOCAL = [
    "169.254.169.254",
    "2852039166",
    "0xa9fea9fe",
    "0251.0376.0251.0376",
    "169.16689662",
    "169\uff0e254.169.254",
    "[fe80::1]",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "[64:ff9b::169.254.169.254]",
    "[2002:a9fe:a9fe::]",
    "[::169.254.1.1]",
]


@pytest.mark.parametrize("host", [*LINK_LOCAL, "0.0.0.0", "0", "[::]", "224.0.0.1", "[ff02::1]", "[fd00:ec2::254]"])
def test_some_addresses_are_refused_before_anything_moves(place: JobPlace, web: Web, host: str) -> None:
    events = run(
        place,
        inputs=[{"path": "/a", "url": web.on("/a", answer("200 OK"))}],
        outputs=[{"path": "/b", "url": f"http://{host}/b"}],
    )
    kind, sentence = outcome(events)
    assert (kind, web.requests) == ("system_error", [])
    assert str(sentence).startswith(f"http://{host}/b: the host ")
    assert " is refused: " in str(sentence)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "::1", "10.0.0.1", "192.168.0.1", "8.8.8.8", "2001:db8::1", "::ffff:10.0.0.1"]
)
def test_other_addresses_are_open_unless_the_operator_denies_them(address: str) -> None:
    assert Policy([]).objection(address) is None
    assert "deny_networks" in str(Policy(["0.0.0.0/0", "::/0"]).objection(address))


def test_a_denied_network_is_denied_in_every_notation() -> None:
    storage = HttpStorage({"deny_networks": ["10.0.0.0/8"]})
    for host in ("10.1.2.3", "0x0a010203", "167838211", "[::ffff:10.1.2.3]"):
        sentence = f"http://{host}/: the host {host.strip('[]')} is refused: "
        assert str(storage.unsupported(f"http://{host}/", "get")).startswith(sentence.partition(": the")[0])
    assert storage.unsupported("http://11.1.2.3/", "get") is None


def test_a_name_is_refused_for_the_address_that_it_stands_for(place: JobPlace, web: Web) -> None:
    web.on("/f", answer("200 OK", b"x"))
    url = f"http://localhost:{web.port}/f"
    _, sentence = fetch(place, url, deny_networks=["127.0.0.0/8", "::1/128"])
    assert "cannot be read: the host localhost is refused: " in str(sentence)
    assert "deny_networks" in str(sentence)
    assert web.requests == []


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http:///x", "its host is not a name that can be looked up"),
        ("http:x", "the host is missing"),
        ("http://a b/x", "its host is not a name"),
        ("http://a\\@b/x", "its host or port is malformed"),  # the host is a to some programs, and b to others
        ("http://[::1%25lo]/x", "its host is not an IPv6 address"),
        ("http://h:0/x", "its port is not one"),
        ("http://h:x/x", "its host or port is malformed"),
        ("http://a..b/", "its host is not a name"),
    ],
)
def test_a_malformed_url_is_refused(place: JobPlace, url: str, why: str) -> None:
    assert why in str(fetch(place, url)[1])


def test_a_host_that_nobody_knows_is_named(place: JobPlace) -> None:
    _, sentence = fetch(place, "http://u:pw@no-such-host.invalid/x")
    assert sentence == "http://no-such-host.invalid/x cannot be read: the host no-such-host.invalid is unknown."


def test_a_directory_cannot_be_taken_from_a_web_server(place: JobPlace, web: Web) -> None:
    events = run(place, inputs=[{"path": "/d", "url": web.url + "/d/", "type": "DIRECTORY"}])
    sentence = f"{web.url}/d/: web servers have no directories; each file needs an input of its own."
    assert (outcome(events), web.requests) == (("system_error", sentence), [])


# Going on after a failure.


def _in_pieces(etag: str | None = '"v1"', step_bytes: int = 300_000) -> Any:
    """A server that breaks off after so many bytes, and has ranges."""

    def serve(request: Request) -> Iterable[bytes]:
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        if request.headers.get("If-Range", etag) != etag:
            start = 0
        status, fields = "200 OK", {"ETag": etag, "Content_Length": len(BODY) - start}
        if start:
            status, fields["Content_Range"] = "206 Partial Content", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}"
        yield answer(status, BODY[start : start + step_bytes], **fields)

    return serve


def test_a_download_that_breaks_off_goes_on_where_it_was(place: JobPlace, web: Web) -> None:
    assert fetch(place, web.on("/f", _in_pieces()), tries=8) == (BODY, None)
    asked = [request.headers.get("Range") for request in web.requests]
    assert asked == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]
    assert {request.headers.get("If-Range") for request in web.requests[1:]} == {'"v1"'}


def test_a_file_that_changed_meanwhile_is_read_from_the_start(place: JobPlace, web: Web) -> None:
    new = b"new" * 1000
    broken = answer("200 OK", BODY[:1000], ETag='"v1"', Content_Length=len(BODY))
    assert fetch(place, web.on("/f", broken, answer("200 OK", new, ETag='"v2"'))) == (new, None)


@pytest.mark.parametrize("tag", [{}, {"ETag": 'W/"weak"'}, {"ETag": '"v1"', "Accept_Ranges": "none"}])
def test_where_nothing_tells_that_a_file_is_the_same_it_is_read_from_the_start(
    place: JobPlace, web: Web, tag: dict[str, str]
) -> None:
    broken = answer("200 OK", BODY[:1000], Content_Length=len(BODY), **tag)
    assert fetch(place, web.on("/f", broken, answer("200 OK", BODY))) == (BODY, None)
    assert "Range" not in web.requests[1].headers


def test_the_date_tells_it_too(place: JobPlace, web: Web) -> None:
    date = "Mon, 01 Jan 2024 00:00:00 GMT"
    broken = answer("200 OK", BODY[:1000], Content_Length=len(BODY), Last_Modified=date)
    content = f"bytes 1000-{len(BODY) - 1}/{len(BODY)}"
    rest = answer("206 Partial Content", BODY[1000:], Content_Range=content, Last_Modified=date)
    assert fetch(place, web.on("/f", broken, rest)) == (BODY, None)
    assert web.requests[1].headers["If-Range"] == date


def test_a_stalled_download_goes_on_over_another_connection(place: JobPlace, web: Web) -> None:
    head = answer("200 OK", BODY[:1000], Content_Length=len(BODY), ETag='"v"')
    content = f"bytes 1000-{len(BODY) - 1}/{len(BODY)}"
    rest = answer("206 Partial Content", BODY[1000:], Content_Range=content, ETag='"v"')
    assert fetch(place, web.on("/f", lambda _: web.stall(head), rest), stall_s=2) == (BODY, None)


@pytest.mark.parametrize("status", ["429 Too Many Requests", "503 Service Unavailable"])
def test_a_busy_server_is_asked_again_when_it_says(place: JobPlace, web: Web, status: str) -> None:
    url = web.on("/f", answer(status, Retry_After="1"), answer("200 OK", b"x"))
    began = time.monotonic()
    assert fetch(place, url) == (b"x", None)
    assert time.monotonic() - began >= 1


def test_a_server_that_stays_busy_is_not_asked_for_ever(place: JobPlace, web: Web) -> None:
    url = web.on("/f", answer("503 Nice words", b"more words"))
    _, sentence = fetch(place, url, tries=3)
    assert sentence == f"{url} cannot be read: the server answers 503 Service Unavailable."
    assert len(web.requests) == 3


@pytest.mark.parametrize("status", [204, 304, 400, 401, 403, 404, 410, 500])
def test_an_answer_without_the_file_is_an_error_with_its_status(place: JobPlace, web: Web, status: int) -> None:
    url = web.on("/f", answer(f"{status} \x1b[31mwords", b"words"))
    _, sentence = fetch(place, url)
    assert str(sentence).startswith(f"{url} cannot be read: the server answers {status} ")
    assert "words" not in str(sentence)
    assert len(web.requests) == 1


def test_an_upload_is_tried_again_from_the_start(place: JobPlace, web: Web) -> None:
    url = web.on("/f", b"", answer("502 Bad Gateway"), answer("200 OK"))
    stored, sentence = store(place, url, tries=3)
    assert (sentence, stored[0]["size_bytes"]) == (None, len(BODY))
    assert [request.body for request in web.requests] == [BODY] * 3


@pytest.mark.parametrize("status", ["403 Forbidden", "405 Method Not Allowed", "413 Content Too Large", "501 No"])
def test_an_upload_that_is_refused_is_an_error_with_its_status(place: JobPlace, web: Web, status: str) -> None:
    url = web.on("/f", answer(status))
    stored, sentence = store(place, url)
    assert stored == []
    assert str(sentence).startswith(f"{url} cannot be written: the server answers {status[:3]} ")


# Servers that misbehave: each ends as one sentence, soon, and without filling the disk.


def _zeros(head: bytes) -> Iterable[bytes]:
    yield head
    yield from itertools.repeat(bytes(1 << 16))


def _slowly(head: bytes, byte: bytes) -> Iterable[bytes]:
    yield head
    for _ in itertools.count():
        time.sleep(0.05)
        yield byte


def _endless_chunks() -> Iterable[bytes]:
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    yield from itertools.repeat(b"10000\r\n" + bytes(1 << 16) + b"\r\n")


def _endless_trailer() -> Iterable[bytes]:
    yield b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n"
    yield from itertools.repeat(b"X: " + b"y" * 1000 + b"\r\n")


ENDLESS = "the server talks without end and sends nothing"
_LONG = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n"


@pytest.mark.parametrize(
    ("misbehaviour", "why"),
    [
        (lambda web: web.stall(), "the server was silent for 0.6 s"),
        (lambda web: web.stall(_LONG[:20]), "the server was silent for 0.6 s"),
        (lambda web: web.stall(_LONG), "the server was silent for 0.6 s"),
        (lambda web: web.stall(_LONG + bytes(1000)), "the server was silent for 0.6 s"),
        (lambda web: [], "the server closed the connection without an answer"),
        (lambda web: [_LONG + bytes(999)], "the server broke off after 999 of 1000000 bytes"),
        (
            lambda web: [b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nabcd"],
            "the server sends more than the 3 bytes that it announced",
        ),
        (lambda web: _zeros(b"HTTP/1.1 200 OK\r\n\r\n"), "it is larger than 0.002 GB (storage.http.max_gb)"),
        (lambda web: _zeros(_LONG), "the server sends more than the 1000000 bytes that it announced"),
        (
            lambda web: _zeros(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n"),
            "it is larger than 0.002 GB (storage.http.max_gb)",
        ),
        (lambda web: _endless_chunks(), "it is larger than 0.002 GB (storage.http.max_gb)"),
        (lambda web: _endless_trailer(), ENDLESS),
        (lambda web: _slowly(_LONG, b"x"), "it goes slower than 1000 bytes/s"),
        (lambda web: _slowly(b"HTTP/1.1 200 OK\r\n", b"x"), "the server was silent for 0.6 s"),
        (lambda web: _slowly(b"", b"x"), "the server was silent for 0.6 s"),
        (lambda web: [b"SSH-2.0-OpenSSH_9.6\r\n\r\n"], "the server does not speak HTTP (BadStatusLine)"),
        (lambda web: [b"\xff\xfe\0\0" * 10 + b"\r\n\r\n"], "the server does not speak HTTP (BadStatusLine)"),
        (lambda web: _zeros(b"HTTP/1.1 200 OK\r\nX: "), "the server does not speak HTTP (LineTooLong)"),
        (
            lambda web: itertools.chain([b"HTTP/1.1 200 OK\r\n"], itertools.repeat(b"A: b\r\n")),
            "the server does not speak HTTP (HTTPException)",
        ),
        (
            lambda web: itertools.repeat(b"HTTP/1.1 100 Continue\r\n\r\n"),
            ENDLESS,
        ),
        (lambda web: itertools.repeat(b"HTTP/1.1 103 Hint\r\n\r\n"), ENDLESS),
        (
            lambda web: [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nabc"],
            "the server broke off in the middle of the file",
        ),
        (lambda web: [b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"], "announces no size that makes sense"),
        (lambda web: [answer("200 OK", b"abc", content_length=4)], "announces no size that makes sense"),
        (lambda web: [answer("206 Partial Content", b"abc")], "the server answers 206 Partial Content"),
        (lambda web: [answer("200 OK", gzip.compress(b"a"), Content_Encoding="gzip")], "sends it compressed"),
    ],
)
def test_a_server_that_misbehaves_is_one_sentence(place: JobPlace, web: Web, misbehaviour: Any, why: str) -> None:
    url = web.on("/f", lambda _: misbehaviour(web))
    _, sentence = fetch(place, url, max_gb=0.002)
    assert str(sentence).startswith(f"{url} cannot be read: ")
    assert why in str(sentence)
    assert len(str(sentence)) < 300


@pytest.mark.parametrize(
    ("content", "length"),
    [("bytes 0-999/1000", 1000), ("bytes 101-999/1000", 899), ("bytes 100-999/1001", 900), ("x", 900), ("", 900)],
)
def test_another_part_than_was_asked_for_is_never_taken(place: JobPlace, web: Web, content: str, length: int) -> None:
    broken = answer("200 OK", b"a" * 100, ETag='"v"', Content_Length=1000)
    wrong = answer("206 Partial Content", b"b" * length, ETag='"v"', Content_Range=content)
    url = web.on("/f", broken, wrong)
    _, sentence = fetch(place, url)
    assert sentence == f"{url} cannot be read: the server sends another part of the file than it was asked for."


def test_a_file_that_is_called_compressed_because_it_is_one_is_left_alone(place: JobPlace, web: Web) -> None:
    body = gzip.compress(b"reads")
    assert fetch(place, web.on("/reads.fq.gz", answer("200 OK", body, Content_Encoding="x-gzip"))) == (body, None)


def test_what_would_fill_the_disk_is_not_downloaded(place: JobPlace, tmp_path: pathlib.Path, web: Web) -> None:
    free_gb = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize / 1e9
    web.on("/f", lambda _: _zeros(b"HTTP/1.1 200 OK\r\n\r\n"))
    _, sentence = fetch(place, web.url + "/f", keep_free_gb=free_gb + 10)
    assert "it has no end, and would fill the disk, of which" in str(sentence)
    (tmp_path / "2").mkdir()
    web.on("/f", lambda _: _zeros(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n"))
    _, sentence = fetch(JobPlace(tmp_path / "2", place.runtime), web.url + "/f", keep_free_gb=free_gb - 1)
    assert "it has 10000000000 bytes, and would fill the disk, of which" in str(sentence)


def test_a_server_that_takes_nothing_in_is_one_sentence(place: JobPlace, web: Web) -> None:
    class DeafStall(Deaf):
        def __call__(self, request: Request) -> Iterable[bytes]:
            return web.stall()

    (place.storage / "large").write_bytes(bytes(32 << 20))
    url = web.on("/f", DeafStall())
    events = run(
        place,
        inputs=[{"path": "/large", "url": place.url("large")}],
        outputs=[{"path": "/large", "url": url}],
    )
    assert outcome(events) == ("system_error", f"{url} cannot be written: the server was silent for 0.6 s.")


def test_a_port_where_nobody_listens_is_one_sentence(place: JobPlace) -> None:
    with Web() as server:
        url = server.url + "/f"
    assert fetch(place, url)[1] == f"{url} cannot be read: the server cannot be reached (Connection refused)."


@pytest.mark.parametrize("how", ["marker", "signal"])
def test_a_job_is_canceled_while_its_download_stalls(place: JobPlace, web: Web, how: str) -> None:
    url = web.on("/f", lambda _: web.stall(_LONG))
    place.write(step("true"), inputs=[{"path": "/f", "url": url}], storage={"http": {}})
    with place.start() as runner:
        until(lambda: web.requests, "the request")
        began = time.monotonic()
        if how == "marker":
            place.cancelled_file.touch()
        else:
            runner.terminate()
        assert place.end()["outcome"] == ("canceled" if how == "marker" else "system_error")
        assert time.monotonic() - began < 2
        runner.communicate(timeout=30)


# TLS.


@pytest.fixture
def authority() -> trustme.CA:
    return trustme.CA()


def _tls(authority: trustme.CA, *names: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(context)
    return context


def _trusting(place: JobPlace, authority: trustme.CA) -> None:
    path = place.storage.parent / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    place.environment["SSL_CERT_FILE"] = str(path)


@pytest.mark.parametrize("python", pythons())
def test_files_go_both_ways_over_tls_on_every_python_here(place: JobPlace, authority: trustme.CA, python: str) -> None:
    _trusting(place, authority)
    place.python = python
    with Web(_tls(authority, "localhost")) as server:
        server.on("/in", answer("200 OK", BODY))
        server.on("/out", answer("200 OK"))
        url = f"https://localhost:{server.port}"
        events = run(
            place,
            script("cp /in/f /out/f"),
            inputs=[{"path": "/in/f", "url": url + "/in"}],
            outputs=[{"path": "/out/f", "url": url + "/out"}],
        )
    assert outcome(events) == ("complete", None)
    assert server.requests[1].body == BODY


def test_a_server_that_is_not_who_it_should_be_is_not_spoken_to(
    place: JobPlace, tmp_path: pathlib.Path, authority: trustme.CA
) -> None:
    with Web(_tls(authority, "localhost")) as server:
        url = f"https://localhost:{server.port}/f"
        _, sentence = fetch(place, url)
        assert f"{url} cannot be read: the server's certificate is not to be trusted (" in str(sentence)
        (tmp_path / "2").mkdir()
        other = JobPlace(tmp_path / "2", place.runtime)
        _trusting(other, authority)
        _, sentence = fetch(other, f"https://127.0.0.1:{server.port}/f")
        assert "certificate is not to be trusted (IP address mismatch" in str(sentence)
        assert server.requests == []


def test_a_download_over_tls_that_breaks_off_without_a_length_is_not_taken_for_whole(
    place: JobPlace, authority: trustme.CA
) -> None:
    _trusting(place, authority)
    with Web(_tls(authority, "localhost")) as server:
        server.on("/f", [b"HTTP/1.0 200 OK\r\n\r\n", b"half of"])
        _, sentence = fetch(place, f"https://localhost:{server.port}/f")
    assert "the server broke the connection off" in str(sentence)


def test_a_server_without_tls_is_one_sentence(place: JobPlace, web: Web) -> None:
    _, sentence = fetch(place, web.url.replace("http", "https") + "/f")
    assert "cannot be read: TLS failed (" in str(sentence) or "broke the connection off" in str(sentence)


# The rest.


def test_a_job_without_such_urls_does_not_import_sockets(place: JobPlace) -> None:
    place.write(step("true"), storage={"file": {"roots": [str(place.storage)]}, "http": {}})
    command = [sys.executable, "-X", "importtime", *place.command()[1:]]
    done = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert b"storage.base" in done.stderr
    for module in (b"socket", b"ssl", b"http.client", b"ipaddress"):
        assert module not in done.stderr, module


def test_the_settings_have_the_defaults_that_the_runner_has() -> None:
    section = Settings().job_storage["http"]
    ours = Limits()._asdict()
    assert {name: list(ours[name]) if name == "deny_networks" else ours[name] for name in section} == section


@given(st.text())
def test_whatever_a_url_is_what_is_said_to_a_server_is_one_line(text: str) -> None:
    try:
        url = web_url.parse("http://" + text)
    except ValueError:
        return
    assert re.fullmatch(r"/[!-~]*", url.target)
    assert re.fullmatch(r"[!-~]+", url.authority)
    again = web_url.parse(f"http://{url.authority}{url.target}")
    assert (again.target, again.host, again.port) == (url.target, url.host, url.port)


@given(st.text("ab:@/?#%[]\\ =&", max_size=12), st.sampled_from(["http", "https", "ftp", "s3"]))
def test_a_password_is_never_shown(rest: str, scheme: str) -> None:
    assert "SECRET" not in shown(f"{scheme}://user:SECRET@{rest}")
    assert "SECRET" not in shown(f"{scheme}://SECRET@{rest}")


def test_a_query_stays_behind_the_path() -> None:
    assert below("http://h/d/?k=/v/", "a b") == "http://h/d/a%20b?k=/v/"
    assert below("file:///d?/", "a") == "file:///d?/a"


def test_what_is_no_web_url_is_shown_as_it_is() -> None:
    for url in ("/a/b@c:d?key=1", "file:///a/b", "s3://bucket/a@b"):
        assert shown(url) == url
