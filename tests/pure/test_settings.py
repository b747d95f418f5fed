"""What the operator writes, in the file and in the environment, and what becomes of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tesapi.errors import ConfigurationProblem
from tesapi.settings import Loaded, SecretUrl, Settings, declared_keys, describe, load

REPOSITORY = Path(__file__).parents[2]
SECRET = "correct-horse"
NO_NAME = "without a configured identity the server listens on loopback only"


@pytest.fixture
def cwd(tmp_path: Path) -> Path:
    return tmp_path.resolve()


def loaded(cwd: Path, toml: str | None = None, **environ: str) -> Loaded:
    if toml is not None:
        (cwd / "settings.toml").write_text(toml, encoding="utf-8")
    return load(environ=environ, cwd=cwd)


def refusal(cwd: Path, toml: str | None = None, **environ: str) -> str:
    with pytest.raises(ConfigurationProblem) as caught:
        loaded(cwd, toml, **environ)
    return str(caught.value)


# Where values come from.


def test_without_a_file_and_variables_the_defaults_hold(cwd: Path) -> None:
    found = loaded(cwd)
    settings = found.settings
    assert (settings.server.host, settings.server.port, settings.server.is_loopback) == ("127.0.0.1", 8080, True)
    assert settings.server.data_dir == cwd / "data"
    assert settings.sqlite_path == cwd / "data/tesapi.db"
    assert settings.file_roots == (cwd / "data/files",)
    assert (settings.runtime.kind, settings.runtime.bubblewrap.images) == ("auto", None)
    assert (settings.local.max_jobs, settings.local.cpu_cores, settings.local.ram_gb) == (None, None, None)
    assert set(found.sources.values()) == {"default"}
    assert found.warnings == ()


def test_later_sources_beat_earlier_ones(cwd: Path) -> None:
    toml = "[default.server]\nport = 1\nmax_body_mb = 2\n[default.local]\nmax_jobs = 3\n[dev.server]\nport = 4\n"
    found = loaded(
        cwd,
        toml,
        FASTAPI_PROFILE="dev",
        TESP_API_LOCAL__MAX_JOBS="5",
        TESP_API_LOCAL__CPU_CORES="6",
        TESAPI_LOCAL__CPU_CORES="7",
    )
    assert (found.settings.server.port, found.settings.server.max_body_mb) == (4, 2)
    assert (found.settings.local.max_jobs, found.settings.local.cpu_cores) == (5, 7)
    assert found.sources["server.host"] == "default"
    assert found.sources["server.max_body_mb"] == "settings.toml [default]"
    assert found.sources["server.port"] == "settings.toml [dev]"
    assert found.sources["local.max_jobs"] == "environment variable TESP_API_LOCAL__MAX_JOBS"
    assert found.sources["local.cpu_cores"] == "environment variable TESAPI_LOCAL__CPU_CORES"


def test_without_a_profile_only_default_holds(cwd: Path) -> None:
    assert loaded(cwd, "[default.server]\nport = 1\n[dev.server]\nport = 2\n").settings.server.port == 1


def test_a_list_is_replaced_and_not_merged(cwd: Path) -> None:
    toml = '[default.storage.file]\nroots = ["/a", "/b"]\n[dev.storage.file]\nroots = ["/c"]\n'
    assert loaded(cwd, toml, FASTAPI_PROFILE="dev").settings.file_roots == (Path("/c"),)


def test_a_profile_that_the_file_does_not_have_is_refused(cwd: Path) -> None:
    text = refusal(cwd, "[default.server]\nport = 1\n[dev.server]\nport = 2\n", FASTAPI_PROFILE="prod")
    assert text == "FASTAPI_PROFILE = 'prod': settings.toml has no such section; it has: default, dev"


def test_without_a_file_a_profile_is_ignored_with_a_warning(cwd: Path) -> None:
    assert loaded(cwd, FASTAPI_PROFILE="dev").warnings == (
        f"FASTAPI_PROFILE = 'dev' is ignored: there is no settings.toml in {cwd}.",
    )


def test_a_section_may_be_called_like_a_table_of_settings(cwd: Path) -> None:
    assert loaded(cwd, "[local.server]\nport = 2\n", FASTAPI_PROFILE="local").settings.server.port == 2


def test_a_table_without_its_section_is_refused(cwd: Path) -> None:
    assert "[server] (settings.toml): write [default.server]" in refusal(cwd, "[server]\nport = 2\n")
    assert "port (settings.toml): stands outside of every section" in refusal(cwd, "port = 2\n")


def test_a_file_of_which_nothing_holds_is_told(cwd: Path) -> None:
    assert loaded(cwd, "[dev.server]\nport = 2\n").warnings == (
        "Nothing of settings.toml is in effect: it has no [default] and FASTAPI_PROFILE is not set.",
    )


def test_a_file_that_is_named_is_read_instead(cwd: Path) -> None:
    (cwd / "settings.toml").write_text("[default.server]\nport = 1\n")
    (cwd / "other.conf").write_text("[default.server]\nport = 2\n")
    found = load(Path("other.conf"), environ={}, cwd=cwd)
    assert found.settings.server.port == 2
    assert found.sources["server.port"] == "other.conf [default]"


def test_a_file_that_is_named_must_exist(cwd: Path) -> None:
    with pytest.raises(ConfigurationProblem, match=re.escape(f"There is no settings file {cwd}/other.toml.")):
        load(Path("other.toml"), environ={}, cwd=cwd)


@pytest.mark.parametrize("content", [b"[default.server]\nport = \n", b"[default.server]\nhost = '\xff'\n"])
def test_broken_toml_is_refused_with_file_and_line(cwd: Path, content: bytes) -> None:
    (cwd / "settings.toml").write_bytes(content)
    assert re.search(r"settings\.toml is not valid TOML: .*line 2\b", refusal(cwd))


def test_a_file_that_cannot_be_read_is_refused(cwd: Path) -> None:
    (cwd / "settings.toml").mkdir()
    assert refusal(cwd) == "settings.toml cannot be read: Is a directory."


def test_an_empty_file_is_fine(cwd: Path) -> None:
    assert loaded(cwd, "# nothing\n").settings.server.port == 8080


def test_relative_paths_are_resolved_against_the_working_directory(cwd: Path) -> None:
    settings = loaded(cwd, '[default.server]\ndata_dir = "x/../y"\n[default.db]\nsqlite_path = "z.db"\n').settings
    assert (settings.server.data_dir, settings.sqlite_path) == (cwd / "y", cwd / "z.db")
    assert settings.file_roots == (cwd / "y/files",)


# The environment.


def test_values_in_the_environment_are_toml_or_else_texts(cwd: Path) -> None:
    settings = loaded(
        cwd,
        TESAPI_STORAGE__FILE__ROOTS='["/data", "/more"]',
        TESAPI_LOCAL__ENABLE="False",
        TESAPI_DISPATCHER__LEASE_S="20",
        TESAPI_SERVICE_INFO__NAME="Our TES",
        TESAPI_SERVICE_INFO__ENVIRONMENT='"2026"',
        TESAPI_RUNTIME__BUBBLEWRAP__IMAGES='{ "b:*" = "host", "a:*" = "/srv/a" }',
    ).settings
    assert settings.file_roots == (Path("/data"), Path("/more"))
    assert settings.local.enable is False
    assert settings.dispatcher.lease_s == 20.0
    assert (settings.service_info.name, settings.service_info.environment) == ("Our TES", "2026")
    images = settings.runtime.bubblewrap.images
    assert images is not None
    assert list(images.items()) == [("b:*", "host"), ("a:*", "/srv/a")]


def test_names_in_the_environment_are_the_same_in_any_case(cwd: Path) -> None:
    assert load(environ={"tesapi_Server__PORT": "81"}, cwd=cwd).settings.server.port == 81


def test_a_whole_table_in_the_environment_goes_before_its_single_keys(cwd: Path) -> None:
    server = loaded(cwd, TESAPI_SERVER__PORT="2", TESAPI_SERVER="{ port = 1, max_body_mb = 3 }").settings.server
    assert (server.port, server.max_body_mb) == (2, 3)


def test_names_that_the_operator_chose_keep_the_files_spelling(cwd: Path) -> None:
    toml = '[default.storage.s3.siteA]\nregion = ""\n'
    text = refusal(cwd, toml, TESAPI_STORAGE__S3__SITEA__REGION="eu", TESAPI_STORAGE__S3__SITEB__REGION="us")
    assert [line.split(" = ")[0] for line in text.splitlines()] == [
        "storage.s3.siteA.region",
        "storage.s3.siteb.region",
    ]


@pytest.mark.parametrize(("said", "kind"), [("docker", "docker"), ("singularity", "apptainer")])
def test_container_type_chooses_the_runtime(cwd: Path, said: str, kind: str) -> None:
    assert loaded(cwd, CONTAINER_TYPE=said).settings.runtime.kind == kind


def test_a_variable_of_ours_beats_container_type(cwd: Path) -> None:
    found = loaded(cwd, CONTAINER_TYPE="docker", TESAPI_RUNTIME__KIND="bubblewrap")
    assert found.settings.runtime.kind == "bubblewrap"
    assert found.sources["runtime.kind"] == "environment variable TESAPI_RUNTIME__KIND"


def test_an_unknown_container_type_is_refused(cwd: Path) -> None:
    text = refusal(cwd, CONTAINER_TYPE="lxc")
    assert text == 'environment variable CONTAINER_TYPE = "lxc": must be one of docker, singularity'


def test_other_variables_do_not_disturb(cwd: Path) -> None:
    found = loaded(
        cwd, TES_URL="http://x", TES_TOKEN="t", DYNACONF_SERVER__PORT="1", TESAPI_PORT="tcp://10.0.0.1", PORT="1"
    )
    assert set(found.sources.values()) == {"default"}
    assert found.warnings == ()


def test_a_variable_with_too_few_underscores_is_told(cwd: Path) -> None:
    found = loaded(cwd, TESAPI_SERVER_PORT="81")
    assert found.settings.server.port == 8080
    assert found.warnings == ("TESAPI_SERVER_PORT is not read: the variable for server.port is TESAPI_SERVER__PORT.",)


def test_loading_reads_nothing_but_what_it_is_given(cwd: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cwd / ".env").write_text("TESAPI_SERVER__PORT=1\n")
    (cwd / ".secrets.toml").write_text("[default.server]\nport = 2\n")
    (cwd / "settings.local.toml").write_text("[default.server]\nport = 3\n")
    (cwd / "dynaconf_hooks.py").write_text("raise SystemExit('a hook ran')\n")
    monkeypatch.chdir(cwd)
    monkeypatch.setenv("TESAPI_SERVER__PORT", "4")
    monkeypatch.setenv("SETTINGS_FILE_FOR_DYNACONF", str(cwd / ".secrets.toml"))
    monkeypatch.setenv("INCLUDES_FOR_DYNACONF", str(cwd / ".secrets.toml"))
    monkeypatch.setenv("ENV_FOR_DYNACONF", "dev")
    assert loaded(cwd, "[default.local]\nmax_jobs = 5\n[dev.server]\nport = 6\n").settings.server.port == 8080


def test_without_arguments_the_process_environment_and_directory_are_read(
    cwd: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cwd)
    monkeypatch.delenv("FASTAPI_PROFILE", raising=False)
    monkeypatch.setenv("TESAPI_SERVER__PORT", "4")
    assert (load().settings.server.port, load().settings.server.data_dir) == (4, cwd / "data")


def test_two_loads_are_independent(cwd: Path) -> None:
    (cwd / "a").mkdir()
    (cwd / "b").mkdir()
    first = loaded(cwd / "a", "[default.server]\nport = 1\n", TESAPI_LOCAL__MAX_JOBS="1")
    second = loaded(cwd / "b")
    assert (first.settings.server.port, first.settings.local.max_jobs) == (1, 1)
    assert first.settings.server.data_dir == cwd / "a/data"
    assert (second.settings.server.port, second.settings.local.max_jobs) == (8080, None)
    assert second.settings.server.data_dir == cwd / "b/data"


def test_strings_are_taken_as_they_are(cwd: Path) -> None:
    toml = '[default.service_info]\nname = "@format {env[HOME]}"\ndescription = "@jinja {{ this }}"\n'
    info = loaded(cwd, toml, TESAPI_SERVICE_INFO__ENVIRONMENT="@int 5").settings.service_info
    assert info.name == "@format {env[HOME]}"
    assert info.description == "@jinja {{ this }}"
    assert info.environment == "@int 5"


# Refusals.


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("SERVER__PORT", "65536", "server.port = 65536 (SOURCE): must be a whole number from 0 to 65535"),
        ("SERVER__PORT", "true", "server.port = true (SOURCE): must be a whole number from 0 to 65535"),
        ("SERVER__PORT", "http", 'server.port = "http" (SOURCE): must be a whole number from 0 to 65535'),
        ("SERVER__PORT__X", "1", 'server.port = { "x" = 1 } (SOURCE): must be a whole number from 0 to 65535'),
        ("SERVER__ALLOW_ANONYMOUS", "1", "server.allow_anonymous = 1 (SOURCE): must be true or false"),
        ("SERVER__HOST", "", 'server.host = "" (SOURCE): must be a host name or an address'),
        ("SERVER__DATA_DIR", "~/x", "server.data_dir = \"~/x\" (SOURCE): must be a path that is not empty; '~' is not"),
        ("SERVER__DATA_DIR", "", 'server.data_dir = "" (SOURCE): must be a path that is not empty'),
        ("SERVER__MAX_BODY_MB", "0", "server.max_body_mb = 0 (SOURCE): must be a whole number of MiB from 1 to 1024"),
        ("SERVER__ROOT_PATH", "tes", 'server.root_path = "tes" (SOURCE): must be a path without a slash at its end'),
        ("SERVER__ROOT_PATH", "/tes/", 'server.root_path = "/tes/" (SOURCE): must be a path without a slash at'),
        ("SERVER__ALLOWED_HOSTS", '["a:80"]', 'server.allowed_hosts = ["a:80"] (SOURCE): must be a list of host names'),
        ("SERVER__ALLOWED_HOSTS", '["*"]', 'server.allowed_hosts = ["*"] (SOURCE): must be a list of host names'),
        ("SERVER__ALLOWED_HOSTS", "a", 'server.allowed_hosts = "a" (SOURCE): must be a list of host names'),
        ("SERVER__CORS_ORIGINS", '["*"]', 'server.cors_origins = ["*"] (SOURCE): must be a list of origins'),
        ("SERVER__CORS_ORIGINS", '["https://a/"]', 'server.cors_origins = ["https://a/"] (SOURCE): must be a list of'),
        ("SERVER__TRUSTED_PROXIES", '["*"]', 'server.trusted_proxies = ["*"] (SOURCE): must be a list of addresses'),
        ("STORAGE__FILE__ROOTS", '["/a", "b"]', 'storage.file.roots = ["/a", "b"] (SOURCE): must be a list of abs'),
        ("STORAGE__FILE__ROOTS", '["/a/../b"]', 'storage.file.roots = ["/a/../b"] (SOURCE): must be a list of abs'),
        ("STORAGE__FILE__ROOTS", '["/"]', 'storage.file.roots = ["/"] (SOURCE): must be a list of absolute paths'),
        ("STORAGE__FILE__ROOTS", "/data", 'storage.file.roots = "/data" (SOURCE): must be a list of absolute paths'),
        (
            "STORAGE__HTTP__DENY_NETWORKS",
            '["10.0.0.0/8", "10.0.0.1/8"]',
            (
                'storage.http.deny_networks = ["10.0.0.0/8", "10.0.0.1/8"] (SOURCE): must be a list of networks '
                "such as [\"10.0.0.0/8\"]; '10.0.0.1/8' is none"
            ),
        ),
        ("STORAGE__HTTP__DENY_NETWORKS", "lan", 'storage.http.deny_networks = "lan" (SOURCE): must be a list of netw'),
        ("STORAGE__HTTP__STALL_S", "0", "storage.http.stall_s = 0 (SOURCE): must be a number of seconds above 0"),
        ("STORAGE__HTTP__MAX_GB", "-1", "storage.http.max_gb = -1 (SOURCE): must be a number of GB above 0"),
        ("RUNTIME__KIND", "lxc", 'runtime.kind = "lxc" (SOURCE): must be one of auto, docker, podman, apptainer,'),
        (
            "RUNTIME__BUBBLEWRAP__IMAGES",
            '{ a = "b" }',
            'runtime.bubblewrap.images = { "a" = "b" } (SOURCE): must map each',
        ),
        ("RUNTIME__BUBBLEWRAP__IMAGES", "host", 'runtime.bubblewrap.images = "host" (SOURCE): must be a table of'),
        ("RUNTIME__NETWORK", "mine", 'runtime.network = "mine" (SOURCE): must be one of default, none, host'),
        ("RUNTIME__USER", '"me"', 'runtime.user = "me" (SOURCE): must be numbers, "UID" or "UID:GID"'),
        ("RUNTIME__CAPABILITIES", '["ALL"]', 'runtime.capabilities = ["ALL"] (SOURCE): must be a list of single'),
        ("RUNTIME__PIDS_LIMIT", "0", "runtime.pids_limit = 0 (SOURCE): must be a whole number, at least 8"),
        ("RUNTIME__PULL", "often", 'runtime.pull = "often" (SOURCE): must be one of missing, always, never'),
        (
            "RUNTIME__DOCKER__HOST",
            "tcp://h:1",
            'runtime.docker.host = "tcp://h:1" (SOURCE): must be a socket of this machine',
        ),
        ("LOCAL__MAX_JOBS", "0", "local.max_jobs = 0 (SOURCE): must be a whole number, at least 1"),
        ("LOCAL__RAM_GB", "inf", "local.ram_gb = inf (SOURCE): must be a number of GB above 0"),
        ("DISPATCHER__LEASE_S", "0.5", "dispatcher.lease_s = 0.5 (SOURCE): must be a number of seconds, at least 1"),
        ("DISPATCHER__POLL_INTERVAL_S", "nan", "dispatcher.poll_interval_s = nan (SOURCE): must be a number of sec"),
        ("LOGGING__LEVEL", "loud", 'logging.level = "loud" (SOURCE): must be one of debug, info, warning, error'),
        ("SERVICE_INFO__NAME", "2026", "service_info.name = 2026 (SOURCE): must be a text that is not empty"),
        ("SERVICE_INFO__ORGANIZATION_URL", "x.org", 'service_info.organization_url = "x.org" (SOURCE): must be a URL'),
        ("SERVER", "5", "server (SOURCE): must be a table, [server], not a value"),
    ],
)
def test_a_wrong_value_is_refused_with_key_value_what_is_allowed_and_source(
    cwd: Path, variable: str, value: str, line: str
) -> None:
    text = refusal(cwd, **{f"TESAPI_{variable}": value})
    assert text.startswith(line.replace("SOURCE", f"environment variable TESAPI_{variable}"))
    assert "\n" not in text


@pytest.mark.parametrize(
    ("toml", "line"),
    [
        (
            "[default.server]\nprot = 1",
            "server.prot = 1 (settings.toml [default]): there is no such key; did you mean server.port?",
        ),
        ("[default.sever]\nport = 1", "sever (settings.toml [default]): there is no such key; did you mean server?"),
        (
            "[default]\nport = 1",
            "port = 1 (settings.toml [default]): there is no such key; did you mean server.port?",
        ),
        (
            "[default.oauth]\nzzz = 1",
            "oauth.zzz = ******** (settings.toml [default]): there is no such key; there are: enable",
        ),
        (
            "[default.storage.s3.a]\nregoin = 1",
            (
                "storage.s3.a.regoin = 1 (settings.toml [default]): "
                "there is no such key; did you mean storage.s3.a.region?"
            ),
        ),
    ],
)
def test_a_mistyped_key_is_refused_and_the_nearest_is_named(cwd: Path, toml: str, line: str) -> None:
    assert refusal(cwd, toml) == line


def test_all_problems_are_listed_one_a_line(cwd: Path) -> None:
    toml = '[default.server]\nport = -1\nprot = 1\n[default.local]\nmax_jobs = 0\n[default.pulsar]\nurl = "x"\n'
    lines = refusal(cwd, toml, FASTAPI_PROFILE="prod", TESAPI_LOGGING__LEVEL="loud").splitlines()
    named = ["FASTAPI_PROFILE", "server.prot", "server.port", "local.max_jobs", "logging.level", "pulsar.url"]
    assert sorted(line.split(" ")[0] for line in lines) == sorted(named)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "tes.example.org", "127.0.0.1.example.org"])
def test_without_identity_the_server_listens_on_loopback_only(cwd: Path, host: str) -> None:
    text = refusal(cwd, TESAPI_SERVER__HOST=f'"{host}"')
    assert text.startswith(f'server.host = "{host}" (environment variable TESAPI_SERVER__HOST): {NO_NAME}')
    assert "server.allow_anonymous = true" in text


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "LOCALHOST"])
def test_loopback_needs_no_permission(cwd: Path, host: str) -> None:
    found = loaded(cwd, TESAPI_SERVER__HOST=f'"{host}"')
    assert found.settings.server.is_loopback
    assert found.warnings == ()


def test_an_open_server_says_who_can_use_it(cwd: Path) -> None:
    found = loaded(cwd, TESAPI_SERVER__HOST="0.0.0.0", TESAPI_SERVER__ALLOW_ANONYMOUS="true")
    assert not found.settings.server.is_loopback
    assert found.warnings == (
        "server.allow_anonymous is true: anybody who reaches port 8080 of 0.0.0.0 can run containers here.",
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("basic_auth.enable", "true"),
        ("basic_auth.username", "u"),
        ("basic_auth.password", "p"),
        ("oauth.enable", "true"),
        ("storage.s3.a.endpoint", "https://s3"),
        ("storage.s3.a.region", "eu"),
        ("storage.s3.a.access_key", "a"),
        ("storage.s3.a.secret_key", "s"),
    ],
)
def test_what_is_not_built_yet_is_refused(cwd: Path, key: str, value: str) -> None:
    variable = "TESAPI_" + key.replace(".", "__").upper()
    text = refusal(cwd, **{variable: value})
    assert text.startswith(key)
    assert f"(environment variable {variable})" in text
    assert text.endswith(" is not built yet; remove this setting")


def test_saying_that_something_not_built_is_off_is_fine(cwd: Path) -> None:
    loaded(
        cwd,
        TESAPI_BASIC_AUTH__ENABLE="false",
        TESAPI_OAUTH__ENABLE="false",
        TESAPI_DB__MONGODB_URI="",
    )


@pytest.mark.parametrize(
    "uri",
    [
        "mongodb://h",
        "mongodb://h:27017",
        "mongodb://u:p%40@a:1,b:2/d?replicaSet=rs0",
        "mongodb+srv://tes.example.org/d",
        "mongodb://[::1]:27017/d",
    ],
)
def test_tasks_are_kept_in_mongodb_where_a_uri_of_it_is_given(cwd: Path, uri: str) -> None:
    found = loaded(cwd, TESAPI_DB__MONGODB_URI=uri).settings.db.mongodb_uri
    assert found is not None
    assert found.get_secret_value() == uri
    assert loaded(cwd, TESAPI_DB__MONGODB_URI="").settings.db.mongodb_uri is None


@pytest.mark.parametrize(
    "uri", [f"http://user:{SECRET}@h", SECRET, f"mongodb://u:{SECRET}@", "mongodb://", f"mongodb://u:[{SECRET}]@h"]
)
def test_what_is_no_uri_of_mongodb_is_refused_and_not_shown(cwd: Path, uri: str) -> None:
    text = refusal(cwd, TESAPI_DB__MONGODB_URI=uri)
    assert text.startswith("db.mongodb_uri = ********")
    assert text.endswith("must be a URL that begins with mongodb:// or mongodb+srv://")
    assert SECRET not in text


def test_tasks_are_not_kept_in_two_places(cwd: Path) -> None:
    text = refusal(cwd, TESAPI_DB__MONGODB_URI="mongodb://h", TESAPI_DB__SQLITE_PATH="/x.db")
    assert text.startswith("db.mongodb_uri = ")
    assert "set either this or db.sqlite_path" in text


# Secrets, and what stays as it is.


@pytest.mark.parametrize(
    "toml",
    [
        f'[default.basic_auth]\npassword = "{SECRET}"\n',
        f'[default.basic_auth]\npasword = "{SECRET}"\n',
        f'[default.basic_auth]\npassword = ["{SECRET}"]\n',
        f'[default]\nbasic_auth = "{SECRET}"\n',
        f'[default]\nbasic_aut = "{SECRET}"\n',
        f'[default.pulsar]\namqp_url = "http://user:{SECRET}@h"\n',
        f'[default.pulsar]\nurl = "{SECRET}"\n',
        f'[default.pulsar]\nprivate_token = ["{SECRET}"]\n',
        f'[default.storage.s3.a]\nsecret_key = "{SECRET}"\naccess_key = "{SECRET}"\n',
        f'[default.destinations.a]\nsomething = "{SECRET}"\n',
        f'[default.service_info]\nname = ["https://user:{SECRET}@h"]\n',
        f'[default.anything.at]\nall = "{SECRET}"\n',
    ],
)
def test_no_message_shows_a_secret(cwd: Path, toml: str) -> None:
    with pytest.raises(ConfigurationProblem) as caught:
        loaded(cwd, toml)
    assert "settings.toml [default]" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


def test_describing_masks_secrets_and_passwords_in_urls(cwd: Path) -> None:
    before = loaded(cwd, TESAPI_SERVICE_INFO__CONTACT_URL="https://u:pw@h/help", TESAPI_LOGGING__LEVEL="WARNING")
    settings = Settings.model_validate(
        {
            "db": {"mongodb_uri": f"mongodb://user:{SECRET}@h/d"},
            "basic_auth": {"password": SECRET},
            "service_info": before.settings.service_info,
            "logging": before.settings.logging,
        }
    )
    rows = {key: (value, source) for key, value, source in describe(Loaded(settings, before.sources, ()))}
    assert rows["db.mongodb_uri"] == ('"mongodb://********@h/d"', "default")
    assert rows["basic_auth.password"] == ("********", "default")
    assert rows["service_info.contact_url"] == (
        '"https://********@h/help"',
        "environment variable TESAPI_SERVICE_INFO__CONTACT_URL",
    )
    assert rows["logging.level"] == ('"warning"', "environment variable TESAPI_LOGGING__LEVEL")
    assert SECRET not in repr(settings) + str(rows)


def test_describing_shows_what_is_in_effect(cwd: Path) -> None:
    found = loaded(cwd, TESAPI_RUNTIME__BUBBLEWRAP__IMAGES='{ "a:*" = "host" }')
    rows = {key: value for key, value, _ in describe(found)}
    assert rows["db.sqlite_path"] == f'"{cwd}/data/tesapi.db"'
    assert rows["storage.file.roots"] == f'["{cwd}/data/files"]'
    assert rows["runtime.bubblewrap.images"] == '{ "a:*" = "host" }'
    assert rows["local.enable"] == "(not set)"
    assert rows["local.max_jobs"] == "(not set)"
    assert list(rows) == [key for key in declared_keys() if "NAME" not in key] == list(found.sources)


def test_a_url_without_a_password_is_shown_as_it_is() -> None:
    assert str(SecretUrl("mongodb://h/d")) == "mongodb://h/d"
    assert str(SecretUrl("mongodb://u:p@ss/word@h/d")) == "mongodb://********@h/d"


def test_settings_are_frozen_all_the_way_down(cwd: Path) -> None:
    found = loaded(cwd, TESAPI_RUNTIME__BUBBLEWRAP__IMAGES='{ a = "host" }', TESAPI_STORAGE__FILE__ROOTS='["/a"]')

    def values(table: BaseModel) -> Iterator[Any]:
        for name in type(table).model_fields:
            value = getattr(table, name)
            with pytest.raises(ValidationError, match="frozen"):
                setattr(table, name, value)
            yield from values(value) if isinstance(value, BaseModel) else [value]

    assert not [value for value in values(found.settings) if isinstance(value, list | dict | set)]
    with pytest.raises(FrozenInstanceError):
        found.warnings = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        found.sources["server.port"] = "x"  # type: ignore[index]


# What we ship.


@pytest.mark.parametrize("profile", ["", "dev-docker"])
def test_the_settings_file_of_this_repository_loads(cwd: Path, profile: str) -> None:
    found = load(REPOSITORY / "settings.toml", environ={"FASTAPI_PROFILE": profile}, cwd=cwd)
    assert found.settings.server.is_loopback
    assert found.settings.logging.output_json is (profile == "dev-docker")
    assert found.warnings == ()
    if not profile:
        assert found.settings == load(environ={}, cwd=cwd).settings


def test_every_line_that_the_settings_file_of_this_repository_shows_is_valid(cwd: Path) -> None:
    text = (REPOSITORY / "settings.toml").read_text(encoding="utf-8")
    found = loaded(cwd, re.sub(r"(?m)^#(?=[\w\[])", "", text))
    given = {key for key, source in found.sources.items() if source != "default"}
    shown = {key for key in found.sources if not key.startswith(("basic_auth", "oauth", "pulsar", "destinations"))}
    assert {key for key in given if not key.startswith(("pulsar", "destinations"))} == shown - {"db.mongodb_uri"}
    assert found.settings.pulsars.keys() == {"pulsar", "site-a"}


def test_the_documentation_lists_exactly_the_keys_that_exist_with_their_defaults(cwd: Path) -> None:
    text = (REPOSITORY / "docs/settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"(?m)^\| `([^`]+)` \| .+? \| (.+?) \| .+ \|$", text)
    tables = [key.removesuffix("…") for key, _ in rows if key.endswith(".…")]  # whose keys are those of another table
    single = [key for key, _ in rows if not key.endswith(".…")]
    assert all(any(key.startswith(table) for key in declared_keys()) for table in tables)
    assert sorted(single) == sorted(key for key in declared_keys() if not key.startswith(tuple(tables)))
    documented = dict(rows)
    for key, value, _ in describe(loaded(cwd)):
        if value != "(not set)" and str(cwd) not in value and not key.startswith(tuple(tables)):
            assert documented[key] == f"`{value}`", key


def test_a_root_around_our_own_data_is_refused(cwd: Path) -> None:
    (cwd / "link").symlink_to(cwd)
    for root in (cwd, cwd / "data", cwd / "data" / "jobs", cwd / "link"):
        text = refusal(cwd, TESAPI_STORAGE__FILE__ROOTS=f'["{root}"]')
        assert text.startswith("storage.file.roots = ")
        assert "lie in one another: tasks would reach the database" in text
    for root in (cwd / "data" / "files", cwd / "data" / "files" / "more", cwd / "database"):
        assert loaded(cwd, TESAPI_STORAGE__FILE__ROOTS=f'["{root}"]').settings.file_roots == (root,)
