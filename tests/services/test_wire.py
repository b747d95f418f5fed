"""Requests as they come over the wire, however odd: taken exactly or refused, and never a 5xx."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.pure.test_documents import DOCUMENTS, JSON
from tests.services.server import Server

TRUE = {"executors": [{"image": "alpine", "command": ["true"]}]}
SEVERAL = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture(scope="module")
def http(idle: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{idle.url}/ga4gh/tes/v1", timeout=30) as client:
        yield client


def _task_with(**fields: object) -> bytes:
    return json.dumps({**TRUE, **fields}).encode()


def _raw(server: Server, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """The answer to bytes that no well-behaved client would send."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(request)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, body


def _request(line: str, *headers: str, body: bytes = b"") -> bytes:
    if not any(header.startswith(("Content-Length", "Transfer-Encoding")) for header in headers):
        headers = (*headers, f"Content-Length: {len(body)}")
    return "\r\n".join([f"{line} HTTP/1.1", "Host: localhost", "Connection: close", *headers, "", ""]).encode() + body


# How clients put their requests together.


@pytest.mark.parametrize(
    "path", ["//v1/tasks", "/v1//tasks", "/v1/tasks/", "/ga4gh/tes/v1///tasks//", "//ga4gh/v1/tasks"]
)
def test_slashes_may_be_doubled_and_trail(idle: Server, path: str) -> None:
    status, _, body = _raw(idle, _request(f"POST {path}", body=_task_with()))
    assert status == 200
    task_id = json.loads(body)["id"]
    assert json.loads(_raw(idle, _request(f"GET {path.rstrip('/')}/{task_id}/"))[2])["id"] == task_id
    assert _raw(idle, _request(f"POST {path.rstrip('/')}/{task_id}:cancel/"))[::2] == (200, b"{}")


@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Content-Type: application/json; charset=utf-8",),
        ("Content-Type: application/json;charset=UTF-8",),
        ("Content-Type: text/plain",),
        ("Content-Type: application/x-www-form-urlencoded",),
        ("Content-Type: ",),
        ("Content-Encoding: identity",),
        ("Authorization: Basic Tm9uZTpOb25l",),
        ("Authorization: Bearer",),
        ("Authorization: \xff\xfe",),
        ("Expect: 100-continue",),
    ],
)
def test_whatever_headers_a_client_sends_its_body_is_read(idle: Server, headers: tuple[str, ...]) -> None:
    status, answered, body = _raw(idle, _request("POST /v1/tasks?api_key=K%201%262&x", *headers, body=_task_with()))
    if status == 100:
        body = body.partition(b"\r\n\r\n")[2]
        status = 200
    else:
        assert answered["content-type"] == "application/json"
    assert status == 200
    assert list(json.loads(body)) == ["id"]


def test_cancel_takes_a_body_of_no_length_and_none_at_all(idle: Server, http: httpx.Client) -> None:
    for headers in (("Content-Type: application/json", "Content-Length: 0"), ("Transfer-Encoding: chunked",), ()):
        task_id = idle.post(TRUE)
        body = b"0\r\n\r\n" if "Transfer-Encoding: chunked" in headers else b""
        assert _raw(idle, _request(f"POST /v1/tasks/{task_id}:cancel", *headers, body=body))[::2] == (200, b"{}")
        assert idle.get(task_id)["state"] == "CANCELED"
        assert idle.get(task_id)["logs"][0]["logs"] == []


def test_head_is_get_without_its_body(idle: Server, http: httpx.Client) -> None:
    task_id = idle.post(TRUE)
    for path in ("tasks", f"tasks/{task_id}", "service-info", "tasks/none"):
        head, get = http.head(path), http.get(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert head.headers["content-length"] == get.headers["content-length"]


# Bodies that bite.


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"name":"\\ud800","executors":[{"image":"a","command":["x"]}]}', "the body"),
        (b'{"name":"\xff","executors":[{"image":"a","command":["x"]}]}', "the body"),
        (_task_with().decode().encode("utf-16"), "the body"),
        (b"\xef\xbb\xbf" + _task_with(), "the body"),
        (gzip.compress(_task_with()), "the body"),
        (b"[" * 200_000, "the body"),
        (b'{"tags":' * 100_000, "the body"),
        (_task_with(resources={"ram_gb": "RAM"}).replace(b'"RAM"', b"NaN"), "resources.ram_gb"),
        (_task_with(resources={"ram_gb": "RAM"}).replace(b'"RAM"', b"1e400"), "resources.ram_gb"),
        (_task_with(resources={"ram_gb": "RAM"}).replace(b'"RAM"', b"-Infinity"), "resources.ram_gb"),
        (_task_with(resources={"cpu_cores": "N"}).replace(b'"N"', b"9" * 4000), "resources.cpu_cores"),
        (_task_with(resources={"cpu_cores": "N"}).replace(b'"N"', b"9" * 5000), "the body"),
        (_task_with(resources={"cpu_cores": "N"}).replace(b'"N"', b"1e300"), "resources.cpu_cores"),
        (_task_with(resources={"ram_gb": "N"}).replace(b'"N"', b"9" * 5000), "the body"),
        (_task_with(executors=[{"image": "a", "command": ["a\0b"]}]), "executors[0].command[0]"),
        (_task_with(inputs=[{"url": "s3://a/\0", "path": "/a"}]), "inputs[0].url"),
        (b'{"executors":[{"image":"a","command":["x"]}],"executors":[]}', "executors"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_would_bite_later_is_refused_at_once(idle: Server, http: httpx.Client, body: bytes, field: str) -> None:
    before = http.get("tasks").content
    answer = http.post("tasks", content=body)
    assert answer.status_code == 400, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert field in [error["field"] for error in answer.json()["errors"]]
    assert http.get("tasks").content == before


def test_a_number_in_a_field_that_nobody_knows_is_nobodys_business(http: httpx.Client) -> None:
    for number in (b"1e400", b"9" * 5000, b"-0.0"):
        assert http.post("tasks", content=_task_with(vendor="N").replace(b'"N"', number)).status_code in {200, 400}


def test_a_compressed_body_is_refused_by_its_header(http: httpx.Client) -> None:
    answer = http.post("tasks", content=gzip.compress(_task_with()), headers={"Content-Encoding": "gzip"})
    assert answer.status_code == 400
    assert answer.json()["errors"][0]["field"] == "Content-Encoding"


def test_of_a_repeated_key_the_last_one_holds(http: httpx.Client) -> None:
    body = b'{"name":"a","name":"b","executors":[{"image":"a","command":["x"]}],"tags":{"k":"1","k":"2"}}'
    task = http.get(f"tasks/{http.post('tasks', content=body).json()['id']}?view=FULL").json()
    assert (task["name"], task["tags"]) == ("b", {"k": "2"})


def test_a_body_that_is_too_long_is_a_413_whether_its_length_was_told_or_not(idle: Server, http: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 65536

    before = http.get("tasks").content
    for content in (b" " * (1 << 20) + _task_with(), chunks()):
        answer = http.post("tasks", content=content)
        assert answer.status_code == 413
        assert answer.headers["content-type"] == "application/problem+json"
        assert "server.max_body_mb" in answer.json()["detail"]
    # Told only, and never sent: it need not be waited for.
    told = _request("POST /v1/tasks", f"Content-Length: {10**18}")
    host, port = idle.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(told)
        assert b" 413 " in connection.recv(65536).split(b"\r\n")[0]
    assert http.get("tasks").content == before
    padding = b" " * ((1 << 20) - len(_task_with()))
    assert http.post("tasks", content=padding + _task_with()).status_code == 200


def test_a_client_that_hangs_up_in_the_middle_of_its_body_makes_no_task(idle: Server, http: httpx.Client) -> None:
    before = http.get("tasks").content
    host, port = idle.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(_request("POST /v1/tasks", "Content-Length: 1000", body=_task_with()))
    assert http.get("tasks").content == before
    assert "Traceback" not in idle.log.read_text("utf-8")


@pytest.mark.parametrize(
    "name", ["x" * 900_000, "\U0001f9ec" * 1000, "שלום", "\u2028", "a\0b", "'; DROP TABLE tasks --"]
)
def test_names_of_any_length_and_script_come_back_as_they_are(http: httpx.Client, name: str) -> None:
    body = _task_with(name=name, tags={name[:1000]: name[:1000]}, description=name[:1000])
    task_id = http.post("tasks", content=body).json()["id"]
    for view in ("BASIC", "FULL"):
        task = http.get(f"tasks/{task_id}", params={"view": view}).json()
        assert (task["name"], task["tags"], task["description"]) == (name, {name[:1000]: name[:1000]}, name[:1000])
    found = http.get("tasks", params={"name_prefix": name[:1000], "tag_key": name[:1000], "tag_value": name[:1000]})
    assert [task["id"] for task in found.json()["tasks"]] == [task_id]


@given(DOCUMENTS)
@SEVERAL
def test_what_was_posted_comes_back(http: httpx.Client, posted: dict[str, Any]) -> None:
    posted.get("resources", {}).pop("backend_parameters", None)  # no destination here knows any
    answer = http.post("tasks", json=posted)
    assert answer.status_code == 200, answer.text
    task = http.get(f"tasks/{answer.json()['id']}?view=FULL").json()
    assert {
        name: value for name, value in task.items() if name not in {"id", "state", "logs", "creation_time"}
    } == posted


@given(st.binary(max_size=200) | JSON.map(lambda value: json.dumps(value).encode()))
@SEVERAL
def test_no_body_is_a_server_error(http: httpx.Client, body: bytes) -> None:
    assert http.post("tasks", content=body).status_code in {200, 400}


@given(
    st.dictionaries(
        st.sampled_from(["view", "state", "page_size", "page_token", "name_prefix", "tag_key", "tag_value", "x"]),
        st.lists(st.text() | st.sampled_from(["FULL", "QUEUED", "1", "0-0", "\0"]), max_size=3),
        max_size=4,
    ),
)
@SEVERAL
def test_no_parameter_is_a_server_error(http: httpx.Client, parameters: dict[str, list[str]]) -> None:
    answer = http.get(
        "tasks",
        params={name.encode(): [v.encode("utf-8", "replace") for v in values] for name, values in parameters.items()},
    )
    assert answer.status_code in {200, 400}
    if answer.status_code == 400:
        assert answer.json()["errors"][0]["field"] in parameters


@given(st.binary(max_size=30))
@SEVERAL
def test_no_path_is_a_server_error(idle: Server, path: bytes) -> None:
    quoted = "".join(f"%{byte:02x}" for byte in path)
    for line in (
        f"GET /v1/tasks/{quoted}?view=FULL",
        f"POST /v1/tasks/{quoted}:cancel",
        f"GET /v1/tasks?name_prefix={quoted}",
    ):
        status, headers, _ = _raw(idle, _request(line))
        assert status < 500
        assert headers["content-type"] in {"application/json", "application/problem+json"}
