"""The client commands with other TES servers: where their API is, what they leave out, and how they fail."""

from __future__ import annotations

import base64
import json
import pathlib
import signal
import threading
import time

import pytest

from tests.services.foreign import INFO, Answer, Asked, Foreign, HangUp, ordinary
from tests.services.typed import Piped, typed

RUN = ("run", "alpine", "--", "true")


@pytest.mark.parametrize("base", ["/ga4gh/tes/v1", "/v1", ""])
@pytest.mark.parametrize("with_path", [False, True])
def test_the_api_is_found_and_a_task_is_posted_once(tmp_path: pathlib.Path, base: str, with_path: bool) -> None:
    with Foreign(base, ordinary) as server:
        run = typed(server.url + (base + "/" if with_path else ""), *RUN, cwd=tmp_path)
        assert (run.returncode, run.stdout, run.stderr) == (0, "done\n", "")
        (post,) = server.posts()
        assert post.path == base + "/tasks"
        assert json.loads(post.body) == {"executors": [{"image": "alpine", "command": ["true"]}]}
        assert post.headers["content-type"] == "application/json"
        first = server.asked[0]
        assert not with_path or first.path == f"{base or '/ga4gh/tes/v1'}/service-info"


def test_a_server_without_service_info_is_found_by_its_tasks(tmp_path: pathlib.Path) -> None:
    def answer(asked: Asked) -> Answer:
        return (404, b"nothing") if asked.path == "/service-info" else ordinary(asked)

    with Foreign("/v1", answer) as server:
        assert typed(server.url, *RUN, cwd=tmp_path).returncode == 0
        assert len(server.posts()) == 1


@pytest.mark.parametrize(
    "answer",
    [
        lambda asked: (200, b"<html>Welcome</html>"),
        lambda asked: (404, {}),
        lambda asked: (200, {"type": {"artifact": "drs"}}),
    ],
)
def test_what_is_no_tes_server_is_sent_nothing(tmp_path: pathlib.Path, answer: object) -> None:
    with Foreign("", answer) as server:  # type: ignore[arg-type]
        run = typed(server.url, *RUN, cwd=tmp_path)
        assert run.returncode == 76
        assert run.stderr == f"tesapi: What answers at {server.url} is no TES server; TES_URL says which one to use.\n"
        assert server.posts() == []


def test_a_gateway_that_protects_other_paths_hides_nothing(tmp_path: pathlib.Path) -> None:
    def answer(asked: Asked) -> Answer:
        if not asked.path.startswith("/v1/"):
            return 401, {}
        return ordinary(asked._replace(path=asked.path.removeprefix("/v1")))

    with Foreign("", answer) as server:
        assert typed(server.url, *RUN, cwd=tmp_path).returncode == 0
        assert len(server.posts()) == 1


def test_a_redirection_is_told_and_not_followed(tmp_path: pathlib.Path) -> None:
    with Foreign("", lambda asked: (307, b"")) as server:
        run = typed(server.url, *RUN, cwd=tmp_path, TES_TOKEN="hush-token")
        assert run.returncode == 76
        assert "leads on to http://elsewhere.example/x: set TES_URL" in run.stderr
        assert "hush" not in run.stderr
        assert server.posts() == []


def test_a_lost_answer_is_told_and_the_task_is_not_sent_again(tmp_path: pathlib.Path) -> None:
    def answer(asked: Asked) -> Answer:
        if asked.method == "POST":
            raise HangUp
        return ordinary(asked)

    with Foreign("/ga4gh/tes/v1", answer) as server:
        run = typed(server.url, *RUN, cwd=tmp_path)
        assert run.returncode == 74
        assert "its answer was lost" in run.stderr
        assert run.stderr.count("\n") == 1
        assert len(server.posts()) == 1


@pytest.mark.parametrize("words", [RUN, ("run", "--detach", *RUN[1:]), ("submit", "-")])
def test_an_interrupt_while_a_task_is_sent_leaves_none_unknown(tmp_path: pathlib.Path, words: tuple[str, ...]) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def answer(asked: Asked) -> Answer:
        if asked.path == "/tasks":
            arrived.set()
            go_on.wait(30)
        if asked.path == "/tasks/t-1":
            return 200, {"id": "t-1", "state": "CANCELED"}
        return ordinary(asked)

    with Foreign("/v1", answer) as server, Piped(server.url, *words, cwd=tmp_path, given=b"{}") as run:
        assert arrived.wait(30)
        run.process.send_signal(signal.SIGINT)
        go_on.set()
        code, stdout, stderr = run.end()
        if words == RUN:
            assert [post.path for post in server.posts()] == ["/v1/tasks", "/v1/tasks/t-1:cancel"]
            assert (code, stdout, stderr) == (130, "", "tesapi: Task t-1 is CANCELED.\n")
        else:
            assert len(server.posts()) == 1
            assert stdout == "t-1\n"


def test_a_second_interrupt_while_a_task_is_sent_says_what_is_not_known(tmp_path: pathlib.Path) -> None:
    arrived, go_on = threading.Event(), threading.Event()

    def answer(asked: Asked) -> Answer:
        if asked.method == "POST":
            arrived.set()
            go_on.wait(30)
        return ordinary(asked)

    with Foreign("/v1", answer) as server, Piped(server.url, *RUN, cwd=tmp_path) as run:
        assert arrived.wait(30)
        while run.process.poll() is None:  # two that come at the same time are one
            run.process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        code, stdout, stderr = run.end()
        go_on.set()
        assert (code, stdout) == (130, "")
        assert stderr.startswith("tesapi: Interrupted while the task was sent: it may have been made or not")
        assert len(server.posts()) == 1


@pytest.mark.parametrize(
    ("status", "body", "code", "sentence"),
    [
        (500, b"", 76, "failed (500)."),
        (503, {"detail": "The store is\nfull.\x1b[2J"}, 76, "failed (503): The store is full.\ufffd[2J"),
        (400, {"message": "no executors"}, 65, "refused it (400): no executors"),
        (400, {"msg": "x" * 5000}, 65, "xxx…"),
        (401, {}, 77, "does not permit it (401; set TES_TOKEN)."),
        (403, {"error": "not you"}, 77, "(403; set TES_TOKEN): not you"),
        (307, {}, 65, "refused it (307)."),
        (200, b"fine", 74, "something that is no TES answer"),
        (200, {"id": ""}, 74, "did not tell its id"),
    ],
)
def test_a_refusal_is_one_sentence_and_the_task_is_sent_once(
    tmp_path: pathlib.Path, status: int, body: object, code: int, sentence: str
) -> None:
    with Foreign("", lambda asked: (status, body) if asked.method == "POST" else ordinary(asked)) as server:
        run = typed(server.url, *RUN, cwd=tmp_path)
        assert run.returncode == code, run
        assert sentence in run.stderr
        assert run.stderr.count("\n") == 1
        assert len(run.stderr) < 1000
        assert len(server.posts()) == 1


def test_credentials_are_sent_and_never_shown(tmp_path: pathlib.Path) -> None:
    def answer(asked: Asked) -> Answer:
        return 401, {"detail": "wrong"}

    basic = "Basic " + base64.b64encode(b"me:hush:@").decode()
    for variables, header in (({}, basic), ({"TES_TOKEN": " hush \n"}, "Bearer hush")):
        for how in (answer, ordinary):
            with Foreign("/v1", how) as server:
                url = server.url.replace("http://", "http://me:hush%3A%40@")
                for words in (["list"], ["service-info"], ["run", "--print", "a", "--", "b"], ["get", "t-2"]):
                    run = typed(url, *words, cwd=tmp_path, **variables)
                    assert "hush" not in run.stdout + run.stderr
                assert {asked.headers.get("authorization") for asked in server.asked} == {header}
                if how is answer:
                    assert (run.returncode, run.stderr.count("\n")) == (77, 1)


def test_a_server_that_leaves_nearly_everything_out_will_do(tmp_path: pathlib.Path) -> None:
    def answer(asked: Asked) -> Answer:
        if asked.path == "/tasks/t-1":
            return 200, {"id": "t-1", "state": "EXECUTOR_ERROR", "logs": None}
        if asked.path == "/tasks" and asked.method == "GET":
            return 200, {
                "tasks": [{}, {"id": "t-1", "state": None, "name": None, "tags": None}, 7],
                "next_page_token": "",
            }
        if asked.path.endswith(":cancel"):
            return 200, b""
        return ordinary(asked)

    with Foreign("/v1", answer) as server:
        run = typed(server.url, *RUN, cwd=tmp_path)
        assert (run.returncode, run.stdout) == (1, "")
        assert run.stderr == "tesapi: Task t-1: EXECUTOR_ERROR.\n"
        assert typed(server.url, "list", cwd=tmp_path).stdout == "  UNKNOWN\nt-1  UNKNOWN\n"
        assert typed(server.url, "get", "t-1", cwd=tmp_path).stdout == "id          t-1\nstate       EXECUTOR_ERROR\n"
        assert typed(server.url, "cancel", "t-1", cwd=tmp_path).stdout == "t-1 EXECUTOR_ERROR\n"
        assert typed(server.url, "logs", "-f", "t-1", cwd=tmp_path).returncode == 0


def test_filters_that_the_server_does_not_know_hold_all_the_same(tmp_path: pathlib.Path) -> None:
    tasks = [
        {"id": f"t-{n}", "state": ("COMPLETE", "RUNNING")[n % 2], "name": f"n{n}", "tags": {"k": str(n // 2)}}
        for n in range(8)
    ]

    def answer(asked: Asked) -> Answer:
        if asked.path != "/tasks":
            return ordinary(asked)
        later = "page_token=next" in asked.query
        return 200, {"tasks": tasks[4:] if later else tasks[:4], "next_page_token": "next"}  # for ever, too

    with Foreign("/v1", answer) as server:

        def listed(*words: str) -> str:
            lines = typed(server.url, "list", *words, cwd=tmp_path).stdout.splitlines()
            return " ".join(line.split()[0] for line in lines)

        assert listed("--state", "RUNNING") == "t-1 t-3 t-5 t-7"
        assert listed("--tag", "k=2") == "t-4 t-5"
        assert listed("--name-prefix", "n3") == "t-3"
        assert listed("--limit", "5") == "t-0 t-1 t-2 t-3 t-4"


def _in_turn(tasks: list[dict[str, object]]) -> Foreign:
    """A server whose task is each of `tasks` in turn, one further with each FULL view; the last one stays."""
    left = list(tasks)

    def answer(asked: Asked) -> Answer:
        if asked.path != "/tasks/t-1":
            return ordinary(asked)
        now = left.pop(0) if len(left) > 1 and "view=FULL" in asked.query else left[0]
        return 200, {"id": "t-1", **now}

    return Foreign("/v1", answer)


def _seen(stdout: str, state: str = "RUNNING") -> dict[str, object]:
    return {"state": state, "logs": [{"logs": [{"stdout": stdout, "exit_code": 0}]}]}


def test_only_what_is_new_of_a_tail_is_printed_and_each_gap_is_told_once(tmp_path: pathlib.Path) -> None:
    text = "".join(f"{n:04}\n" for n in range(1000))
    windows = [text[:50], text[:50], text[25:100], text[300:400], text[300:400], text[350:450], text[700:800]]
    with _in_turn([*map(_seen, windows), _seen(text[710:850], "COMPLETE")]) as server:
        run = typed(server.url, "logs", "-f", "t-1", cwd=tmp_path)
    assert run.returncode == 0
    assert run.stdout == text[:100] + text[300:450] + text[700:850]
    assert run.stderr.count("\n") == run.stderr.count("Some of stdout may be missing here") == 2


def test_every_executor_and_another_attempt_are_printed_from_their_beginnings(tmp_path: pathlib.Path) -> None:
    def attempt(*outputs: str) -> dict[str, object]:
        return {"logs": [{"stdout": stdout, "exit_code": 0} for stdout in outputs]}

    tasks: list[dict[str, object]] = [
        {"state": "RUNNING", "logs": [attempt("a")]},
        {"state": "RUNNING", "logs": [attempt("ab", "a")]},
        {"state": "RUNNING", "logs": [attempt("ab", "a"), attempt("ab")]},
        {"state": "COMPLETE", "logs": [attempt("ab", "a"), attempt("ab", "cd")]},
    ]
    with _in_turn(tasks) as server:
        assert typed(server.url, "logs", "-f", "t-1", cwd=tmp_path).stdout == "abaabcd"


def test_a_failure_while_following_is_got_over(tmp_path: pathlib.Path) -> None:
    answers: list[Answer] = [(503, {"detail": "busy"}), (502, b""), (429, {})]

    def answer(asked: Asked) -> Answer:
        if asked.path == "/tasks/t-1" and answers:
            return answers.pop(0)
        return ordinary(asked)

    with Foreign("/v1", answer) as server:
        run = typed(server.url, *RUN, cwd=tmp_path)
        assert (run.returncode, run.stdout) == (0, "done\n")
        assert run.stderr == (
            f"tesapi: {server.url} failed (503): busy Trying again.\ntesapi: The server answers again.\n"
        )


def test_a_task_that_is_gone_while_it_is_followed_is_told(tmp_path: pathlib.Path) -> None:
    with Foreign("/v1", lambda asked: (404, {}) if asked.path == "/tasks/t-1" else ordinary(asked)) as server:
        run = typed(server.url, *RUN, cwd=tmp_path)
        assert run.returncode == 66
        assert "has no such task" in run.stderr


def test_a_file_root_of_the_server_decides_how_a_file_goes_there(tmp_path: pathlib.Path) -> None:
    (tmp_path / "f").write_text("x")

    def answer(asked: Asked) -> Answer:
        return (200, {**INFO, "storage": [f"file://{tmp_path}"]}) if asked.path == "/service-info" else ordinary(asked)

    with Foreign("/v1", answer) as server:
        run = typed(server.url, "run", "-i", "f=f", "--print", "alpine", "--", "cat", "$f", cwd=tmp_path)
        assert json.loads(run.stdout)["inputs"][0]["url"] == f"file://{tmp_path}/f"
        assert INFO["id"] == "x"
