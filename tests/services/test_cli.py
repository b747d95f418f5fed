"""The client commands as their users meet them, with a server that runs what they ask for."""

from __future__ import annotations

import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from tests.jobs import sandboxes, until
from tests.services.server import Server
from tests.services.typed import TESAPI, Piped, Terminal, environment, modules_imported, typed

ROOT = pathlib.Path(__file__).parents[2]
SLEEPER = ("alpine", "--", "sh", "-c", "echo begun; while :; do sleep 0.05; done")
NOWHERE = "http://127.0.0.1:9"


def _only_task(server: Server) -> str:
    """The id of the one task there is."""
    (task,) = server.all()
    return str(task["id"])


def _runs(server: Server, task_id: str) -> bool:
    return bool(sandboxes(str(server.get(task_id)["logs"][0]["metadata"]["job_id"])))


# run


def test_run_prints_what_the_task_prints_and_ends_as_it_does(server: Server) -> None:
    run = typed(server.url, "run", "alpine", "--", "sh", "-c", "echo out; echo err >&2; exit 7", cwd=server.folder)
    assert (run.returncode, run.stdout, run.stderr) == (7, "out\n", "err\n")
    run = typed(server.url, "run", "alpine", "--", "printf", "no newline", cwd=server.folder)
    assert (run.returncode, run.stdout, run.stderr) == (0, "no newline", "")


def test_words_reach_the_command_as_they_were_typed(server: Server) -> None:
    words = ["a b", "it's", '"quoted"', "ünï 😀", "-n", "--", "--help", "$HOME", "${x}", "*", "", "a\nb", "\\", "%s"]
    run = typed(server.url, "run", "alpine", "--", "printf", "[%s]", *words, cwd=server.folder)
    assert run.stdout == "".join(f"[{word}]" for word in words)
    assert run.returncode == 0


def test_a_word_that_is_no_text_is_refused(server: Server) -> None:
    run = typed(server.url, "run", "alpine", "--", "echo", b"\xff", cwd=server.folder)
    assert run.returncode == 2
    assert "not UTF-8" in run.stderr
    assert server.all() == []


def test_files_and_directories_go_in_and_come_out(server: Server) -> None:
    shared = server.folder / "data" / "files"
    (shared / "in dir" / "sub").mkdir(parents=True)
    (shared / "in dir" / "sub" / "x").write_text("shared\n")
    (server.folder / "my own.txt").write_text("own é\n")
    (server.folder / "own dir").mkdir()
    (server.folder / "own dir" / "y").write_text("y\n")
    files = ["-i", "own=my own.txt", "-i", "shared=data/files/in dir", "-i", "dir=own dir"]
    files += ["-o", "one=data/files/out #1.txt", "-o", "many=data/files/results/"]
    script = 'cat "$own" > "$many/a" && cat $shared/sub/x ${dir}/y > $one && mkdir $many/deep && cp "$own" $many/deep/'
    run = typed(server.url, "run", *files, "alpine", "--", "sh", "-ec", script, cwd=server.folder)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert (shared / "out #1.txt").read_text() == "shared\ny\n"
    assert (shared / "results" / "a").read_text() == "own é\n"
    assert (shared / "results" / "deep" / "my_own.txt").read_text() == "own é\n"
    run = typed(server.url, "run", *files[:2], "alpine", "--", "cat", "$own", cwd=server.folder)
    assert run.stdout == "own é\n"
    run = typed(server.url, "run", "--stdin", "my own.txt", "alpine", "--", "wc", "-c", cwd=server.folder)
    assert run.stdout.strip() == "7"
    run = typed(server.url, "run", "--stdin", "-", "alpine", "--", "tac", cwd=server.folder, given="1\n2\n")
    assert run.stdout == "2\n1\n"


def test_what_is_asked_for_is_in_the_task(server: Server) -> None:
    options = ["-e", "A=1 2", "--cpu", "2", "--ram", "0.5", "--disk", "1", "--name", "named", "--workdir", "/w"]
    options += ["--volume", "/v", "--tag", "k=v=w"]
    run = typed(server.url, "run", *options, "alpine", "--", "sh", "-c", "pwd; echo $A; ls -d /v", cwd=server.folder)
    assert (run.returncode, run.stdout) == (0, "/w\n1 2\n/v\n")
    task = server.get(_only_task(server))
    assert task["resources"] == {"cpu_cores": 2, "ram_gb": 0.5, "disk_gb": 1.0}
    assert (task["name"], task["tags"], task["volumes"]) == ("named", {"k": "v=w"}, ["/v"])


def test_print_shows_the_document_that_would_be_sent(server: Server) -> None:
    (server.folder / "f").write_text("x")
    words = ("run", "-i", "f=f", "--print", "alpine", "--", "cat", "$f")
    run = typed(server.url, *words, cwd=server.folder)
    assert json.loads(run.stdout)["executors"][0]["command"] == ["cat", "/tes/in/f/f"]
    assert server.all() == []
    alone = typed(NOWHERE, *words, cwd=server.folder)
    assert alone.returncode == 0
    assert json.loads(alone.stdout)["inputs"][0]["content"] == "x"
    assert "No TES server answers" in alone.stderr
    again = typed(server.url, "submit", "-", cwd=server.folder, given=run.stdout)
    assert server.wait_for(again.stdout.strip()) == "COMPLETE"


def test_output_comes_while_the_task_runs_and_an_interrupt_cancels_it(server: Server) -> None:
    with Piped(server.url, "run", *SLEEPER, cwd=server.folder) as run:
        assert run.line() == "begun\n"
        task_id = _only_task(server)
        assert server.get(task_id)["state"] == "RUNNING"
        code, stdout, stderr = run.end(signal.SIGINT)
    assert (code, stdout, stderr) == (130, "", f"tesapi: Task {task_id} is CANCELED.\n")
    assert server.get(task_id)["state"] == "CANCELED"
    assert not _runs(server, task_id)


def test_a_service_manager_that_ends_run_ends_its_task(server: Server) -> None:
    with Piped(server.url, "run", *SLEEPER, cwd=server.folder) as run:
        assert run.line() == "begun\n"
        code, _, stderr = run.end(signal.SIGTERM)
    assert code == 143
    assert "is CANCELED." in stderr
    assert server.get(_only_task(server))["state"] == "CANCELED"


def test_a_reader_that_leaves_ends_the_task(server: Server) -> None:
    with Piped(
        server.url, "run", "alpine", "--", "sh", "-c", "while echo y; do sleep 0.1; done", cwd=server.folder
    ) as run:
        assert run.line() == "y\n"
        assert run.process.stdout is not None
        run.process.stdout.close()
        run.process.stdout = None
        code, _, stderr = run.end()
    assert code == 141
    assert "Traceback" not in stderr
    assert server.get(_only_task(server))["state"] == "CANCELED"


def test_a_reader_that_leaves_is_noticed_although_the_task_prints_nothing(server: Server) -> None:
    with Piped(server.url, "run", *SLEEPER, cwd=server.folder) as run:
        assert run.line() == "begun\n"
        assert run.process.stdout is not None
        run.process.stdout.close()
        run.process.stdout = None
        assert run.end()[0] == 141
    assert server.get(_only_task(server))["state"] == "CANCELED"


def test_a_task_that_the_server_could_not_run_says_why(server: Server) -> None:
    run = typed(server.url, "run", "nosuchimage", "--", "true", cwd=server.folder)
    assert run.returncode == 70
    assert run.stderr.startswith(f"tesapi: Task {_only_task(server)}: SYSTEM_ERROR: ")
    assert "nosuchimage" in run.stderr


def test_a_task_that_somebody_cancels_ends_run(server: Server) -> None:
    with Piped(server.url, "run", *SLEEPER, cwd=server.folder) as run:
        assert run.line() == "begun\n"
        canceled = typed(server.url, "cancel", _only_task(server), cwd=server.folder)
        code, _, stderr = run.end()
    assert canceled.returncode == 0
    assert code == 71
    assert "CANCELED" in stderr


def test_a_server_that_is_away_for_a_while_is_waited_for(server: Server) -> None:
    script = "echo one; sleep 3; echo two"
    with Piped(server.url, "run", "alpine", "--", "sh", "-c", script, cwd=server.folder) as run:
        assert run.line() == "one\n"
        server.kill()
        assert run.process.stderr is not None
        notice = run.process.stderr.readline().decode()
        server.start()
        code, stdout, stderr = run.end()
    assert notice == f"tesapi: No TES server answers at {server.url}: Connection refused. Trying again.\n"
    assert (code, stdout, stderr) == (0, "two\n", "tesapi: The server answers again.\n")


def test_what_came_faster_than_the_server_keeps_is_told_once(server: Server) -> None:
    script = "seq 1 20000; echo; sleep 2.5; seq 20001 20010"
    run = typed(server.url, "run", "alpine", "--", "sh", "-c", script, cwd=server.folder)
    assert run.returncode == 0
    assert run.stdout.endswith("20000\n\n" + "".join(f"{n}\n" for n in range(20001, 20011)))
    assert run.stdout.count("\n20000\n") == 1
    assert run.stderr.count("Some of stdout may be missing here") == 1


# At a terminal


def test_ctrl_c_asks_and_return_cancels(server: Server) -> None:
    with Terminal(server.url, "run", *SLEEPER, cwd=server.folder) as terminal:
        terminal.wait_for("begun")
        terminal.wait_for("RUNNING")
        terminal.type("\x03")
        terminal.wait_for("Cancel the task? [Y/n]")
        assert server.get(_only_task(server))["state"] == "RUNNING"
        terminal.type("\r")
        assert terminal.end() == 130
    assert "is CANCELED." in terminal.shown
    assert "Traceback" not in terminal.shown
    assert not _runs(server, _only_task(server))


def test_ctrl_c_and_no_leaves_the_task_running(server: Server) -> None:
    with Terminal(server.url, "run", *SLEEPER, cwd=server.folder) as terminal:
        terminal.wait_for("begun")
        terminal.type("\x03")
        terminal.wait_for("[Y/n]")
        terminal.type("n\r")
        assert terminal.end() == 130
    task_id = _only_task(server)
    assert f"Task {task_id} goes on" in terminal.shown
    assert server.get(task_id)["state"] == "RUNNING"
    server.cancel(task_id)
    server.wait_for(task_id)


def test_a_second_ctrl_c_leaves_at_once(server: Server) -> None:
    with Terminal(server.url, "run", *SLEEPER, cwd=server.folder) as terminal:
        terminal.wait_for("begun")
        terminal.type("\x03")
        terminal.wait_for("[Y/n]")
        terminal.type("\x03")
        assert terminal.end() == 130
    task_id = _only_task(server)
    assert f"Left: task {task_id} was RUNNING" in terminal.shown
    assert server.get(task_id)["state"] == "RUNNING"
    server.cancel(task_id)
    server.wait_for(task_id)


def test_a_live_line_tells_the_state_and_is_taken_away(server: Server) -> None:
    with Terminal(server.url, "run", "alpine", "--", "sh", "-c", "sleep 1; printf done", cwd=server.folder) as terminal:
        assert terminal.end() == 0
    assert re.search(r"RUNNING.*" + _only_task(server) + r".*0:0\d", terminal.shown)
    assert "\x1b[2K" in terminal.shown  # the line is erased
    assert terminal.shown.rstrip("\x1b[?25h").endswith("done")
    assert terminal.shown.rfind("\x1b[?25h") > terminal.shown.rfind("\x1b[?25l")  # and the cursor is there again


def test_no_color_is_obeyed(server: Server) -> None:
    typed(server.url, "run", "--name", "n", "alpine", "--", "true", cwd=server.folder)
    for variables, has_color in (({}, True), ({"NO_COLOR": "1"}, False)):
        with Terminal(server.url, "list", cwd=server.folder, **variables) as terminal:
            assert terminal.end() == 0
        assert ("\x1b[32mCOMPLETE" in terminal.shown) is has_color
        assert ("\x1b" in terminal.shown) is has_color
        with Terminal(server.url, "run", "alpine", "--", "sleep", "1", cwd=server.folder, **variables) as terminal:
            assert terminal.end() == 0
        assert ("\x1b[36m" in terminal.shown) is has_color


# The other commands


def test_detached_tasks_are_waited_for_and_their_logs_are_shown(server: Server) -> None:
    words = ("alpine", "--", "sh", "-c", "for i in 1 2 3; do echo $i; echo e$i >&2; sleep 0.7; done; exit 4")
    detached = typed(server.url, "run", "--detach", "--json", *words, cwd=server.folder)
    task_id = json.loads(detached.stdout)["id"]
    followed = typed(server.url, "logs", "-f", task_id, cwd=server.folder)
    assert (followed.returncode, followed.stdout, followed.stderr) == (0, "1\n2\n3\n", "e1\ne2\ne3\n")
    shown = typed(server.url, "logs", task_id, cwd=server.folder)
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, "1\n2\n3\n", "e1\ne2\ne3\n")
    waited = typed(server.url, "wait", task_id, cwd=server.folder)
    assert (waited.returncode, waited.stdout) == (4, f"{task_id} EXECUTOR_ERROR exit code 4\n")
    waited = typed(server.url, "wait", "--json", task_id, cwd=server.folder)
    assert json.loads(waited.stdout) == {"id": task_id, "state": "EXECUTOR_ERROR", "exit_code": 4}


def test_several_tasks_are_waited_for(server: Server) -> None:
    ids = [
        typed(server.url, "run", "--detach", "alpine", "--", *words, cwd=server.folder).stdout.strip()
        for words in (["sleep", "0.5"], ["true"], ["false"])
    ]
    assert typed(server.url, "wait", *ids[:2], cwd=server.folder).returncode == 0
    waited = typed(server.url, "wait", *ids, cwd=server.folder)
    assert waited.returncode == 1
    assert sorted(line.split()[:2] for line in waited.stdout.splitlines()) == sorted(
        [[ids[0], "COMPLETE"], [ids[1], "COMPLETE"], [ids[2], "EXECUTOR_ERROR"]]
    )


def test_ending_wait_or_logs_does_not_end_the_task(server: Server) -> None:
    task_id = typed(server.url, "run", "--detach", *SLEEPER, cwd=server.folder).stdout.strip()
    with Piped(server.url, "logs", "-f", task_id, cwd=server.folder) as logs:
        assert logs.line() == "begun\n"
        assert logs.end(signal.SIGINT) == (130, "", "")
    with Piped(server.url, "logs", "-f", task_id, cwd=server.folder) as logs:
        assert logs.line() == "begun\n"
        assert logs.end(signal.SIGTERM) == (143, "", "")
    with Terminal(server.url, "wait", task_id, cwd=server.folder) as terminal:
        terminal.wait_for("RUNNING")
        terminal.type("\x03")
        assert terminal.end() == 130
    assert server.get(task_id)["state"] == "RUNNING"
    canceled = typed(server.url, "cancel", task_id, cwd=server.folder)
    assert canceled.returncode == 0
    assert canceled.stdout.split()[0] == task_id
    assert typed(server.url, "wait", task_id, cwd=server.folder).returncode == 71


def test_documents_are_submitted_and_tasks_are_found_again(server: Server) -> None:
    document = {"executors": [{"image": "alpine", "command": ["true"]}]}
    documents = [{**document, "name": f"{kind}-{n}", "tags": {"kind": kind}} for kind in ("a", "b") for n in range(3)]
    (server.folder / "tasks.json").write_text("\n".join(json.dumps(one) for one in documents))
    submitted = typed(server.url, "submit", "--json", "tasks.json", cwd=server.folder)
    ids = [json.loads(line)["id"] for line in submitted.stdout.splitlines()]
    assert len(ids) == 6
    assert typed(server.url, "wait", *ids, cwd=server.folder).returncode == 0

    def listed(*words: str) -> list[str]:
        run = typed(server.url, "list", "--json", *words, cwd=server.folder)
        assert run.returncode == 0, run.stderr
        return [json.loads(line)["id"] for line in run.stdout.splitlines()]

    assert listed() == ids[::-1]
    assert listed("--tag", "kind=a", "--state", "COMPLETE") == ids[2::-1]
    assert listed("--tag", "kind", "--limit", "4") == ids[:1:-1]
    assert listed("--name-prefix", "b-1") == [ids[4]]
    assert listed("--state", "running") == []
    row = typed(server.url, "list", "--limit", "1", cwd=server.folder).stdout
    assert row.split()[:2] == [ids[5], "COMPLETE"]
    assert row.split()[3:] == ["b-2"]
    minimal = typed(server.url, "get", "--json", "--view", "minimal", ids[0], cwd=server.folder)
    assert json.loads(minimal.stdout) == {"id": ids[0], "state": "COMPLETE"}
    assert json.loads(typed(server.url, "get", "--json", ids[0], cwd=server.folder).stdout) == server.get(ids[0])
    text = typed(server.url, "get", ids[0], cwd=server.folder).stdout
    assert re.search(r"^state +COMPLETE$", text, re.MULTILINE)
    assert "exit code 0" in text


def test_a_list_follows_its_pages(server: Server) -> None:
    document = {"executors": [{"image": "nosuchimage", "command": ["true"]}]}
    given = json.dumps([document] * 300)
    ids = typed(server.url, "submit", "-", cwd=server.folder, given=given).stdout.split()
    rows = typed(server.url, "list", cwd=server.folder).stdout.splitlines()
    assert [row.split()[0] for row in rows] == ids[::-1]
    assert len(typed(server.url, "list", "--limit", "290", cwd=server.folder).stdout.splitlines()) == 290
    with Piped(server.url, "list", cwd=server.folder) as cut:
        assert cut.line().split()[0] == ids[-1]
        assert cut.process.stdout is not None
        cut.process.stdout.close()
        cut.process.stdout = None
        assert cut.end() == (141, "", "")


def test_a_document_that_is_refused_says_which_field_and_which_document(server: Server) -> None:
    good = {"executors": [{"image": "alpine", "command": ["true"]}]}
    given = json.dumps([good, {"executors": [{"image": "alpine"}]}, good])
    run = typed(server.url, "submit", "-", cwd=server.folder, given=given)
    assert run.returncode == 65
    assert run.stderr.startswith("tesapi: Document 2 of 3: ")
    assert "executors[0].command" in run.stderr
    assert [task["id"] for task in server.all()] == run.stdout.split()


def test_destinations_are_shown_as_a_table_and_as_json(server: Server) -> None:
    head, line = typed(server.url, "destinations", cwd=server.folder).stdout.splitlines()
    assert head.split() == ["NAME", "KIND", "STATE", "SINCE", "RUNNING", "WAITING"]
    name, kind, state, _, running, waiting, sentence = line.split(maxsplit=6)
    assert (name, kind, state, running, waiting) == ("local", "local", "up", "0", "0")
    assert sentence.startswith("Containers are run by bubblewrap")
    found = json.loads(typed(server.url, "destinations", "--json", cwd=server.folder).stdout)
    assert (found["name"], found["ok"]) == ("local", True)


def test_service_info_is_shown(server: Server) -> None:
    run = typed(server.url, "service-info", cwd=server.folder)
    assert f"storage: file://{server.folder}/data/files" in run.stdout
    run = typed(server.url + "/ga4gh/tes/v1/", "service-info", "--json", cwd=server.folder)
    assert json.loads(run.stdout)["type"]["artifact"] == "tes"


@pytest.mark.parametrize("command", [["get"], ["logs"], ["logs", "-f"], ["wait"], ["cancel"]])
def test_a_task_that_is_not_there_is_one_sentence(server: Server, command: list[str]) -> None:
    for task_id in ("nosuch", "../service-info", "a b\x1b[31m"):
        run = typed(server.url, *command, task_id, cwd=server.folder)
        assert run.returncode == 66, run
        assert run.stdout == ""
        assert re.fullmatch(r"tesapi: [ -~\ufffd]*\n", run.stderr)


def test_what_a_terminal_would_obey_is_not_shown_of_names(server: Server) -> None:
    name = "a\x1b]0;title\x07b\x1b[2J\u202e\nc"
    run = typed(server.url, "run", "--detach", "--name", name, "alpine", "--", "true", cwd=server.folder)
    task_id = run.stdout.strip()
    for words in (["list"], ["get", task_id], ["list", "--json"]):
        shown = typed(server.url, *words, cwd=server.folder).stdout
        assert not set(shown) & set("\x1b\x07\u202e")
    assert json.loads(shown)["name"] == name


def test_streams_that_are_closed_or_know_few_characters_will_do(server: Server) -> None:
    words = [*TESAPI, "run", "--name", "n\u4e00", "alpine", "--", "echo", "\u00fc"]
    closed = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *words], cwd=server.folder, env=environment(server.url), capture_output=True
    )
    assert (closed.returncode, closed.stderr) == (0, b"")
    listed = typed(server.url, "list", cwd=server.folder, PYTHONIOENCODING="latin-1")
    assert (listed.returncode, listed.stderr) == (0, "")
    assert "n\\u4e00" in listed.stdout


# Without a server


@pytest.mark.parametrize(
    "words",
    [["list"], ["get", "x"], ["wait", "x"], ["logs", "-f", "x"], ["cancel", "x"], ["run", "alpine", "--", "true"]],
)
def test_a_dead_server_is_one_sentence(tmp_path: pathlib.Path, words: list[str]) -> None:
    run = typed("http://user:hush@127.0.0.1:9", *words, cwd=tmp_path, TES_TOKEN="")
    assert (run.returncode, run.stdout) == (69, "")
    expected = (
        "tesapi: No TES server answers at http://127.0.0.1:9: Connection refused. TES_URL says which server to use."
    )
    assert run.stderr == expected + "\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "tesapi: Missing command. Try tesapi --help."),
        (["nosuch"], "tesapi: No such command 'nosuch'. Try tesapi --help."),
        (["get"], "tesapi: Missing argument 'ID'. Try tesapi get --help."),
        (["run"], "tesapi: Missing argument 'IMAGE'. Try tesapi run --help."),
        (["run", "alpine", "sh", "-c", "true"], "No such option '-c'. Options of COMMAND go behind --. Try tesapi run"),
        (["run", "alpine"], "tesapi: Which command? tesapi run IMAGE -- COMMAND…"),
        (["run", "-i", "x", "alpine", "--", "y"], "tesapi: -i 'x' is to have the form NAME=VALUE."),
        (["run", "--ram", "nan", "a", "--", "y"], "'nan' is not a number of gigabytes"),
        (["run", "--cpu", "0", "a", "--", "y"], "--cpu"),
        (["run", "--json", "a", "--", "y"], "tesapi: --json goes with --detach."),
        (["list", "--state", "DONE"], "--state"),
        (["submit", "/no/such"], "tesapi: /no/such: No such file or directory."),
        (["get", ""], "tesapi: '' is not the id of a task."),
    ],
)
def test_a_wrong_command_line_is_one_sentence(tmp_path: pathlib.Path, words: list[str], sentence: str) -> None:
    run = typed(NOWHERE, *words, cwd=tmp_path)
    assert run.stdout == ""
    assert sentence in run.stderr
    assert run.stderr.count("\n") == 1
    assert run.returncode == 2


@pytest.mark.parametrize("words", [["--help"], ["run", "--help"], ["logs", "--help"], ["--version"]])
def test_help_imports_nothing_that_takes_its_time(tmp_path: pathlib.Path, words: list[str]) -> None:
    imported, said = modules_imported(words, tmp_path)
    packages = {name.partition(".")[0] for name in imported}
    assert "click" in packages
    slow = {"fastapi", "starlette", "uvicorn", "uvloop", "dynaconf", "rich", "httpx", "pydantic", "asyncio", "ssl"}
    assert not packages & slow
    assert words == ["--version"] or "69     no server answers" in said["stdout"]


def test_a_shell_can_complete_commands(tmp_path: pathlib.Path) -> None:
    (tmp_path / "tesapi").write_text(f'#!/bin/sh\nexec {sys.executable} -m tesapi "$@"\n')
    (tmp_path / "tesapi").chmod(0o755)
    variables = {"_TESAPI_COMPLETE": "bash_complete", "COMP_WORDS": "tesapi ser", "COMP_CWORD": "1"}
    run = subprocess.run(
        TESAPI, env=environment(NOWHERE, **variables), capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert run.stdout.split() == ["plain,serve", "plain,service-info"]


# The documentation


@pytest.mark.parametrize(("file", "part"), [("docs/cli.md", ""), ("README.md", "## Command line")])
def test_the_examples_of_the_documentation_do_what_it_says(server: Server, file: str, part: str) -> None:
    text = (ROOT / file).read_text("utf-8").partition(part + "\n")[2].partition("\n## What a task goes through")[0]
    examples = re.findall(r"```console\n(.*?)```", text, re.DOTALL)
    assert examples
    (server.folder / "bin").mkdir()
    (server.folder / "bin" / "tesapi").write_text(f'#!/bin/sh\nexec {sys.executable} -m tesapi "$@"\n')
    (server.folder / "bin" / "tesapi").chmod(0o755)
    variables = {"PATH": f"{server.folder}/bin:{os.environ['PATH']}"}
    for example in examples:
        steps = re.split(r"^\$ ", example, flags=re.MULTILINE)[1:]
        commands = [re.match(r"(?:.*\n)(?:> .*\n)*", step)[0] for step in steps]  # type: ignore[index]
        said = "".join(step[len(command) :] for step, command in zip(steps, commands, strict=True))
        script = "".join(re.sub(r"^> ", "", command, flags=re.MULTILINE) for command in commands)
        run = subprocess.run(
            ["bash", "-uc", script],
            cwd=server.folder,
            env=environment(server.url, **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        pattern = re.escape(said).replace("…", ".*")
        assert re.fullmatch(pattern, run.stdout, re.DOTALL), f"{example}\n{run.stdout}"
    until(lambda: all(task["state"] != "RUNNING" for task in server.all()), "the examples' tasks to end")
