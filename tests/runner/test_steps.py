"""What the runner does with a job: its executors, their streams and files, and the sentence on every failure."""

from __future__ import annotations

import json
import os
import pathlib

import pytest

from tests.jobs import Place, only, outcome, processes_with, script, step, until


def _stdout(events: list[dict[str, object]], index: int = 0) -> str:
    return str(only(events, "executor_ended")[index]["stdout"])


def test_arguments_reach_the_program_as_they_are(place: Place) -> None:
    odd = ["a b", "$HOME", "*", "", "'\"\\", "-n", "new\nline", "ünï"]
    events = place.run(step("printf", "<%s>", *odd))
    assert outcome(events) == ("complete", None)
    assert _stdout(events) == "".join(f"<{argument}>" for argument in odd)


def test_an_executor_has_the_environment_that_the_task_gives(place: Place) -> None:
    events = place.run(script('printf "%s|%s" "$A" "$PATH"', env={"A": "x=y; $(id)\n'"}))
    assert _stdout(events).startswith("x=y; $(id)\n'|/usr/local/sbin:")


def test_nothing_of_the_runners_environment_reaches_the_task(place: Place) -> None:
    names = {line.split("=")[0] for line in _stdout(place.run(step("env"))).splitlines()}
    engines_own = {"PWD", "SHLVL", "TERM", "container"}
    assert names - engines_own == {"PATH", "HOME", "HOSTNAME"}


def test_values_of_the_environment_do_not_stand_on_a_command_line(place: Place) -> None:
    place.write(step("sleep", "60", env={"TOKEN": "very-secret-value"}))
    with place.start() as runner:
        until(place.remains, "the container")
        assert processes_with("very-secret-value") == []
        place.cancel()
        runner.communicate(timeout=30)


def test_a_missing_working_directory_is_made(place: Place) -> None:
    events = place.run(step("pwd", workdir="/zEjWbQ/deep"), step("pwd", workdir="/usr/lib"), step("pwd"))
    assert [_stdout(events, index) for index in range(3)] == ["/zEjWbQ/deep\n", "/usr/lib\n", "/\n"]


def test_streams_go_from_and_to_the_files_that_are_named(place: Place) -> None:
    events = place.run(
        script("cat; echo oops >&2", stdin="/data/in", stdout="/logs/out.txt", stderr="/logs/err.txt"),
        inputs=[{"path": "/data/in", "content": "hello"}],
        outputs=[
            {"path": "/logs/out.txt", "url": place.url("out")},
            {"path": "/logs/err.txt", "url": place.url("err")},
        ],
    )
    assert outcome(events) == ("complete", None)
    assert (place.stored("out"), place.stored("err")) == ("hello", "oops\n")
    assert only(events, "executor_ended")[0]["stdout"] == "hello"


def test_streams_may_go_to_one_file_and_to_dev_null(place: Place) -> None:
    events = place.run(
        script("echo a; echo b >&2; echo c", stdout="/tmp/both", stderr="/tmp/both"),
        script("echo away", stdin="/dev/null", stdout="/dev/null"),
        outputs=[{"path": "/tmp/both", "url": place.url("both")}],
    )
    assert outcome(events) == ("complete", None)
    assert sorted(place.stored("both")) == sorted("a\nb\nc\n")


def test_a_stdin_that_is_no_file_of_the_task_is_refused(place: Place) -> None:
    events = place.run(step("cat", stdin="/etc/hostname"))
    sentence = "/etc/hostname is not in an input, an output folder or a volume of the task."
    assert outcome(events) == ("system_error", sentence)


def test_a_stdin_that_is_not_there_is_told(place: Place) -> None:
    kind, reason = outcome(place.run(step("cat", stdin="/vol/none"), volumes=["/vol"]))
    assert kind == "system_error"
    assert "No such file or directory" in str(reason)


def test_executors_run_in_order_and_share_volumes_and_output_folders(place: Place) -> None:
    events = place.run(
        script("echo one > /vol/a; echo x > /out/part; echo lost > /elsewhere"),
        script("cat /vol/a /out/part; test ! -e /elsewhere; cat /out/part > /out/whole"),
        volumes=["/vol/"],
        outputs=[{"path": "/out/whole", "url": place.url("whole")}],
    )
    assert outcome(events) == ("complete", None)
    assert _stdout(events, 1) == "one\nx\n"
    assert place.stored("whole") == "x\n"


def test_each_executor_has_a_writable_tmp_of_its_own(place: Place) -> None:
    events = place.run(script("mkdir /tmp/conda && touch /var/tmp/x"), script("ls /tmp /var/tmp"))
    assert outcome(events) == ("complete", None)
    assert _stdout(events, 1) == "/tmp:\n\n/var/tmp:\n"


def test_the_first_failure_stops_the_job(place: Place) -> None:
    events = place.run(step("true"), script("exit 3"), step("true"))
    assert outcome(events) == ("executor_error", "Executor 1 ended with exit code 3.")
    assert [event["exit_code"] for event in only(events, "executor_ended")] == [0, 3]


def test_an_ignored_failure_is_kept_and_the_next_executor_runs(place: Place) -> None:
    events = place.run(script("exit 3", ignore_error=True), script("exit 4", ignore_error=True), step("true"))
    assert outcome(events) == ("complete", None)
    assert [event["exit_code"] for event in only(events, "executor_ended")] == [3, 4, 0]


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["no-such-program"], 127),
        (["/no/such/program"], 127),
        (["/etc/passwd"], 126),
        (["sh", "-c", "kill -9 $$"], 137),
        (["sh", "-c", "kill -TERM $$"], 143),
    ],
)
def test_the_exit_code_says_what_happened_to_the_program(place: Place, command: list[str], code: int) -> None:
    events = place.run(step(*command))
    assert only(events, "executor_ended")[0]["exit_code"] == code
    assert outcome(events) == ("executor_error", f"Executor 0 ended with exit code {code}.")


def test_a_missing_output_is_a_system_error_that_names_it(place: Place) -> None:
    events = place.run(step("true"), outputs=[{"path": "/out/x", "url": place.url("x")}])
    sentence = "The output /out/x was not written by the task (No such file or directory)."
    assert outcome(events) == ("system_error", sentence)


def test_outputs_are_stored_after_an_executors_error_which_wins_over_a_missing_one(place: Place) -> None:
    events = place.run(
        script("echo 1 > /out/.exitcode; exit 1"),
        outputs=[
            {"path": "/out/missing", "url": place.url("missing")},
            {"path": "/out/.exitcode", "url": place.url("deep/er/.exitcode")},
        ],
    )
    assert outcome(events) == ("executor_error", "Executor 0 ended with exit code 1.")
    assert place.stored("deep/er/.exitcode") == "1\n"
    assert [event["path"] for event in only(events, "output")] == ["/out/.exitcode"]
    assert "/out/missing was not written" in only(events, "note")[0]["text"]


def test_outputs_are_reported_with_their_sizes(place: Place) -> None:
    events = place.run(
        script("printf 12345 > /o; printf '' > /deep/o"),
        outputs=[{"path": "/o", "url": place.url("a")}, {"path": "/deep/o", "url": str(place.storage / "b")}],
    )
    assert outcome(events) == ("complete", None)
    assert [(e["path"], e["url"], e["size_bytes"]) for e in only(events, "output")] == [
        ("/o", place.url("a"), 5),
        ("/deep/o", str(place.storage / "b"), 0),
    ]


def test_files_come_in_by_url_by_plain_path_and_by_content(place: Place) -> None:
    odd = place.storage / "my file #1%+&?\n-ü.txt"
    odd.write_text("odd", "utf-8")
    (place.storage / "per cent%41").write_text("decoded", "utf-8")
    events = place.run(
        step("cat", "/in/odd name\n#%", "/in/b", "/in/c", "/in/empty"),
        inputs=[
            {"path": "/in/odd name\n#%", "url": str(odd)},
            {"path": "/in/b", "url": f"file://{place.storage}/per%20cent%2541"},
            {"path": "/in/c", "content": "literal\r\n\0ü"},
            {"path": "/in/empty", "content": ""},
        ],
    )
    assert outcome(events) == ("complete", None)
    assert _stdout(events) == "odddecodedliteral\r\n\0ü"


def test_an_executable_input_can_be_executed(place: Place) -> None:
    tool = place.storage / "tool"
    tool.write_text("#!/bin/sh\necho ran\n", "ascii")
    tool.chmod(0o755)
    events = place.run(
        step("/home/u/pipe/bin/tool"), inputs=[{"path": "/home/u/pipe/bin/tool", "url": place.url("tool")}]
    )
    assert _stdout(events) == "ran\n"


def test_inputs_cannot_be_changed_and_their_sources_never_are(place: Place) -> None:
    (place.storage / "source").write_text("original", "ascii")
    events = place.run(
        script("echo changed > /in/a || echo refused; rm -f /in/a 2>/dev/null || echo kept; cat /in/a"),
        inputs=[{"path": "/in/a", "url": place.url("source")}],
    )
    assert _stdout(events) == "refused\nkept\noriginal"
    assert place.stored("source") == "original"


def test_an_input_that_is_also_an_output_is_a_copy_that_can_be_written(place: Place) -> None:
    (place.storage / "script").write_text("one\n", "ascii")
    os.link(place.storage / "script", place.storage / "other-name")
    events = place.run(
        script("echo two >> /cromwell/execution/script"),
        inputs=[{"path": "/cromwell/execution/script", "url": place.url("script")}],
        outputs=[{"path": "/cromwell/execution/script", "url": place.url("script")}],
    )
    assert outcome(events) == ("complete", None)
    assert place.stored("script") == "one\ntwo\n"
    assert place.stored("other-name") == "one\n"  # a hard link to what was replaced, not to what replaced it


def test_an_input_inside_of_a_volume_leaves_the_volume_writable(place: Place) -> None:
    events = place.run(
        script("echo more > /vol/deep/b; cat /vol/deep/a /vol/deep/b"),
        volumes=["/vol"],
        inputs=[{"path": "/vol/deep/a", "content": "in\n"}],
    )
    assert _stdout(events) == "in\nmore\n"


def test_an_input_appears_beside_what_the_image_has(place: Place) -> None:
    events = place.run(
        script(
            "cat /usr/share/deep/er/x /usr/share/y /etc/app.conf /bin/own-tool;"
            "ls -d /usr/share/dict /usr/bin/env /etc/passwd >/dev/null && awk 'BEGIN {print 42}'"
        ),
        inputs=[
            {"path": "/usr/share/deep/er/x", "content": "x"},
            {"path": "/usr/share/y", "content": "y"},
            {"path": "/etc/app.conf", "content": "z"},
            {"path": "/bin/own-tool", "content": "t"},
            {"path": "/usr/share/dict", "content": "replaces what may be there"},
        ],
    )
    assert _stdout(events) == "xyzt42\n"


def test_an_output_below_an_input_directory_makes_that_a_writable_copy(place: Place) -> None:
    (place.storage / "data").mkdir()
    (place.storage / "data" / "a").write_text("a", "ascii")
    events = place.run(
        script("cat /data/a > /data/out/r"),
        inputs=[{"path": "/data", "url": place.url("data"), "type": "DIRECTORY"}],
        outputs=[{"path": "/data/out/r", "url": place.url("r")}],
    )
    assert outcome(events) == ("complete", None)
    assert place.stored("r") == "a"
    assert [path.name for path in (place.storage / "data").iterdir()] == ["a"]


def test_executors_share_what_lies_at_the_top(place: Place) -> None:
    events = place.run(
        script("echo one > /x.txt; echo no > /y.txt"),
        script("cat /x.txt; echo two >> /x.txt", workdir="/work/dir"),
        outputs=[{"path": "/x.txt", "url": place.url("x")}],
    )
    assert outcome(events) == ("complete", None)
    assert place.stored("x") == "one\ntwo\n"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("rmdir /var/tmp /var; ln -s {host} /var", {}),
        ("ln -s {host} /vol/wd", {"workdir": "/vol/wd/made"}),
        ("ln -s /oldroot{host} /vol/wd", {"workdir": "/vol/wd/made"}),
        ("rm -rf /vol/in; ln -s {host} /vol/in", {}),
        ("rm -rf /vol/in; ln -s /oldroot{host} /vol/in", {}),
    ],
)
def test_what_one_executor_left_does_not_lead_the_next_ones_preparation_out(
    place: Place, first: str, second: dict[str, object]
) -> None:
    host = place.storage.parent / "host"
    host.mkdir()
    place.run(
        script(first.format(host=host) + "; true", ignore_error=True),
        script("true", **second),
        inputs=[{"path": "/vol/in/deep/file", "content": "x"}],
        outputs=[{"path": "/top", "url": place.url("top")}],
        volumes=["/vol"],
    )
    assert list(host.iterdir()) == []


def test_a_link_in_an_input_directory_does_not_lead_another_input_out(place: Place) -> None:
    host = place.storage / "host"
    host.mkdir()
    (place.storage / "data").mkdir()
    (place.storage / "data" / "link").symlink_to("../host")
    place.run(
        step("true"),
        inputs=[
            {"path": "/data", "url": place.url("data"), "type": "DIRECTORY"},
            {"path": "/data/link/made", "content": "x"},
        ],
    )
    assert list(host.iterdir()) == []


@pytest.mark.skipif(os.getuid() == 0, reason="to root no folder is closed")
def test_an_output_that_cannot_be_read_does_not_keep_the_others_from_being_stored(place: Place) -> None:
    events = place.run(
        script("mkdir /out/closed; echo x > /out/closed/x; chmod 0 /out/closed; echo a > /out/a; exit 3"),
        outputs=[
            {"path": "/out/closed", "url": place.url("closed"), "type": "DIRECTORY"},
            {"path": "/out/a", "url": place.url("a")},
        ],
    )
    assert outcome(events) == ("executor_error", "Executor 0 ended with exit code 3.")
    assert place.stored("a") == "a\n"


def test_an_output_folder_may_lie_inside_of_the_image(place: Place) -> None:
    events = place.run(
        script("echo o > /usr/local/results/o"), outputs=[{"path": "/usr/local/results/o", "url": place.url("o")}]
    )
    assert outcome(events) == ("complete", None)
    assert place.stored("o") == "o\n"


@pytest.mark.parametrize("path", ["/proc/x", "/dev/x", "/sys/x"])
def test_the_containers_own_folders_hold_no_files_of_the_task(place: Place, path: str) -> None:
    kind, reason = outcome(place.run(step("true"), inputs=[{"path": path, "content": ""}]))
    assert (kind, str(reason).split(" cannot")[0]) == ("system_error", path)


def test_two_different_inputs_cannot_have_one_path(place: Place, tmp_path: pathlib.Path) -> None:
    same = {"path": "/in/a", "content": "same"}
    assert outcome(place.run(step("cat", "/in/a"), inputs=[same, same])) == ("complete", None)
    other = place.another(tmp_path / "other")
    events = other.run(step("true"), inputs=[same, {"path": "/in//a", "content": "other"}])
    assert outcome(events) == ("system_error", "Two different inputs have the path /in/a.")


def test_everything_is_refused_before_anything_moves(place: Place) -> None:
    (place.storage / "a").write_text("a", "ascii")
    events = place.run(
        step("true"),
        inputs=[{"path": "/in/a", "url": place.url("a")}],
        outputs=[{"path": "/out/o", "url": "s3://bucket/key"}],
    )
    sentence = "s3://bucket/key: this server has no storage for s3: URLs; it has file."
    assert outcome(events) == ("system_error", sentence)
    assert not (place.directory / "tes").exists()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("file:///etc/shadow", "not under the storage roots"),
        ("/etc/shadow", "not under the storage roots"),
        ("file://elsewhere/x", "the host 'elsewhere' in a file URL is not this machine"),
        ("file:relative", "the path in a file URL is to be absolute"),
        ("file:///%zz", "a % in a file URL is to be followed by two hexadecimal digits"),
        ("https://example.org/x", "has no storage for https: URLs"),
    ],
)
def test_a_url_that_cannot_be_served_is_named_with_the_reason(place: Place, url: str, why: str) -> None:
    kind, reason = outcome(place.run(step("true"), inputs=[{"path": "/in", "url": url}]))
    assert kind == "system_error"
    assert str(reason).startswith(url)
    assert why in str(reason)


def test_an_input_that_is_not_there_is_named(place: Place) -> None:
    events = place.run(step("true"), inputs=[{"path": "/in", "url": place.url("none")}])
    assert outcome(events) == ("system_error", f"{place.url('none')} cannot be read: No such file or directory.")


@pytest.mark.parametrize("kind", ["fifo", "folder with a fifo", "device"])
def test_only_files_and_directories_are_staged(place: Place, kind: str) -> None:
    source = place.storage / "odd"
    if kind == "fifo":
        os.mkfifo(source)
    elif kind == "folder with a fifo":
        source.mkdir()
        os.mkfifo(source / "fifo")
    else:
        source.symlink_to("/dev/zero")
    end, reason = outcome(place.run(step("true"), inputs=[{"path": "/in", "url": place.url("odd")}]))
    assert end == "system_error"
    assert place.url("odd") in str(reason)


@pytest.mark.parametrize("target", ["/etc/passwd", "../../../../../../../etc/passwd", "/proc/self/environ"])
def test_an_output_that_is_a_link_out_of_the_task_is_refused(place: Place, target: str) -> None:
    events = place.run(step("ln", "-s", target, "/out/o"), outputs=[{"path": "/out/o", "url": place.url("o")}])
    kind, reason = outcome(events)
    assert kind == "system_error"
    assert "is not in an input, an output folder or a volume of the task" in str(reason)
    assert not (place.storage / "o").exists()


def test_an_output_that_is_a_link_inside_of_the_task_is_followed(place: Place) -> None:
    events = place.run(
        script(
            "echo real > /vol/real; ln -s /vol/real /out/link; rmdir /out/up; ln -s ../vol /out/up;"
            "ln -s /out/ring /out/ring"
        ),
        volumes=["/vol"],
        outputs=[
            {"path": "/out/link", "url": place.url("a")},
            {"path": "/out/up/real", "url": place.url("b")},
            {"path": "/out/ring", "url": place.url("c")},
        ],
    )
    assert outcome(events) == ("system_error", "/out/ring leads through too many symbolic links.")
    assert (place.stored("a"), place.stored("b")) == ("real\n", "real\n")


def test_a_stream_cannot_be_led_out_of_the_task_by_a_link(place: Place) -> None:
    victim = place.storage.parent / "victim"
    victim.write_text("safe", "ascii")
    events = place.run(
        step("ln", "-s", str(victim), "/out/log"),
        step("echo", "overwritten", stdout="/out/log"),
        outputs=[{"path": "/out/o", "url": place.url("o")}],
    )
    assert outcome(events)[0] == "system_error"
    assert victim.read_text("ascii") == "safe"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_task_that_exchanges_its_stream_for_a_link_shows_nothing_of_the_machine(place: Place, stream: str) -> None:
    secret = place.storage.parent / "secret"
    secret.write_text("secret of the machine", "ascii")
    events = place.run(script(f"rm /out/log; ln -s {secret} /out/log; sleep 1.5", **{stream: "/out/log"}))
    assert outcome(events) == ("complete", None)
    assert "secret" not in place.report_file.read_text("ascii")
    tails = place.directory / "metadata" / "tails.json"
    assert not tails.exists() or "secret" not in tails.read_text("ascii")


def test_a_task_that_exchanges_its_stream_for_a_fifo_does_not_hold_the_job(place: Place) -> None:
    events = place.run(script("echo x; rm /out/log; mkfifo /out/log; sleep 1.5", stdout="/out/log"))
    assert outcome(events) == ("complete", None)
    assert _stdout(events) == "x\n"


def test_a_stream_that_became_a_fifo_does_not_hold_the_job(place: Place) -> None:
    events = place.run(step("mkfifo", "/out/log"), step("echo", "x", stdout="/out/log"), outputs=[], volumes=["/out"])
    assert outcome(events)[0] == "system_error"


def test_kernel_settings_cannot_be_changed_even_where_the_runner_is_root(place: Place) -> None:
    events = place.run(
        script("f=/proc/sys/kernel/core_pattern; cat $f > /tmp/c; cat /tmp/c > $f && echo CHANGED; true")
    )
    assert "CHANGED" not in _stdout(events)


def test_a_task_has_no_capabilities_and_no_new_privileges(place: Place) -> None:
    status = dict(
        line.split(":\t", 1)
        for line in _stdout(place.run(step("cat", "/proc/self/status"))).splitlines()
        if ":\t" in line
    )
    assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"] == "1"


def test_nothing_in_the_background_outlives_its_executor(place: Place) -> None:
    events = place.run(script("setsid sleep 1000 >/dev/null 2>&1 & echo started"))
    assert outcome(events) == ("complete", None)
    assert place.remains() == []


def test_what_is_not_text_becomes_text_in_the_report(place: Place) -> None:
    events = place.run(script("printf '\\377\\000\\033ok\\360\\237\\230\\200'"))
    assert _stdout(events) == "\ufffd\0\x1bok😀"


@pytest.mark.parametrize(
    "printer",
    [
        "yes abc | head -c 5000000",
        "head -c 3000000 /dev/urandom",
        "head -c 3000000 /dev/zero",
        "yes 😀 | head -c 3000000",
    ],
)
def test_a_report_stays_small_whatever_is_printed(place: Place, printer: str) -> None:
    events = place.run(script(f"{printer}; {printer} >&2; echo; echo the end"))
    assert outcome(events) == ("complete", None)
    assert _stdout(events).endswith("\nthe end\n")
    assert place.report_file.stat().st_size < 70_000


def test_the_streams_so_far_can_be_read_while_an_executor_runs(place: Place) -> None:
    place.write(step("true"), script("echo so far; sleep 60"))
    tails = place.directory / "metadata" / "tails.json"
    with place.start() as runner:
        until(tails.exists, "tails")
        assert json.loads(tails.read_bytes()) == {"index": 1, "stdout": "so far\n", "stderr": ""}
        place.cancel()
        runner.communicate(timeout=30)


def test_a_document_of_another_version_is_refused(place: Place) -> None:
    events = place.run(step("true"), version=99)
    assert outcome(events) == ("system_error", "The job document is of version 99; this runner reads 1.")


def test_a_broken_document_is_refused(place: Place) -> None:
    place.write(step("true"))
    (place.directory / "inputs" / "job.json").write_text("{", "ascii")
    with place.start() as runner:
        runner.communicate(timeout=30)
    kind, reason = outcome(place.report())
    assert kind == "system_error"
    assert str(reason).startswith("The job document cannot be read: JSONDecodeError")
