"""What the operator has set: read from settings.toml and the environment, validated once, frozen from then on.

Later beats earlier: the defaults below, `[default]` of the file, the section that FASTAPI_PROFILE names,
CONTAINER_TYPE, `TESP_API_SECTION__KEY`, `TESAPI_SECTION__KEY`. The texts in `Field(description=...)` say what is
allowed; they are what a refusal shows. docs/settings.md says what each key means.
"""

import difflib
import fnmatch
import ipaddress
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, get_args, get_origin
from urllib.parse import urlsplit

from dynaconf.base import Settings as Dynaconf
from dynaconf.loaders.base import BaseLoader
from dynaconf.utils.parse_conf import boolean_fix, parse_conf_data
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FiniteFloat,
    SecretStr,
    ValidationError,
    ValidationInfo,
    WrapSerializer,
    field_validator,
)

from tesapi.errors import ConfigurationProblem

# Setting one of these is refused, never ignored: a row goes when its feature comes.
_NOT_BUILT = {
    "basic_auth.*": "HTTP Basic authentication",
    "oauth.*": "OpenID Connect",
    "storage.s3.*": "S3 storage",
}
_OFF: tuple[object, ...] = (None, False, "", [])
_CONTAINER_TYPES = {"docker": "docker", "singularity": "apptainer"}
_PREFIXES = ("TESP_API_", "TESAPI_")
_MASKED = "********"
# Operators' strings stay as they are: no @int, no @format, no dynaconf containers.
_PLAIN = {"AUTO_CAST_FOR_DYNACONF": False, "DYNABOXIFY": False}


class SecretUrl(SecretStr):
    """A URL that may carry a password; it prints itself without user and password."""

    def _display(self) -> str:
        return _without_userinfo(self.get_secret_value())


def _without_userinfo(text: str) -> str:
    # Up to the last "@": in a password that nobody escaped there may be more than one, or a "/".
    return re.sub(r"://\S*@", f"://{_MASKED}@", text)


def _own_path(value: object, info: ValidationInfo) -> Path:
    if not isinstance(value, str | Path) or not str(value) or str(value).startswith("~"):
        raise ValueError("must be a path that is not empty; '~' is not expanded")
    cwd: Path = (info.context or {}).get("cwd") or Path.cwd()
    return (cwd / value).resolve()


def _root(value: object) -> Path:
    path = PurePath(value) if isinstance(value, str | PurePath) else PurePath()
    if not path.is_absolute() or ".." in path.parts or path == PurePath("/"):
        raise ValueError("must be a list of absolute paths without '..'; '/' itself would open the whole machine")
    return Path(path)


def _network(value: str) -> str:
    try:
        ipaddress.ip_network(value)
    except ValueError:
        raise ValueError(f"must be {_NETWORKS}; {value!r} is none") from None
    return value


def _image_source(value: str) -> str:
    if value != "host" and (not PurePath(value).is_absolute() or ".." in PurePath(value).parts):
        raise ValueError("must map each image pattern to \"host\" or to an absolute directory without '..'")
    return value


def _unix_socket(value: str) -> str:
    if not value.startswith("unix:///"):
        raise ValueError("must be a socket of this machine, unix:///...: files of a task are mounted from here")
    return value


def _user(value: str) -> str:
    if not re.fullmatch(r"\d{1,10}(:\d{1,10})?", value):
        raise ValueError('must be numbers, "UID" or "UID:GID": names mean something else in each image')
    return value


def _capability(value: str) -> str:
    if not re.fullmatch(r"[A-Z_]+", value) or value == "ALL":
        raise ValueError('must be a list of single capabilities in capitals, without CAP_, such as ["CHOWN", "SETUID"]')
    return value.removeprefix("CAP_")


def _root_path(value: str) -> str:
    if value and not re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", value):
        raise ValueError(f"must be {_ROOT_PATH}")
    return value


def _host(value: str) -> str:
    """A host's name or address as browsers send it, without a port."""
    name = value.lower()
    if re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", name):
        return name
    try:
        return str(ipaddress.IPv6Address(name))
    except ValueError:
        raise ValueError(f"must be {_HOSTS}") from None


def _origin(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in {"http", "https"} or not parts.hostname or value != f"{parts.scheme}://{parts.netloc}":
        raise ValueError(f"must be {_ORIGINS}; '*' would open this server to every page")
    return value


def _proxy(value: str) -> str:
    try:
        ipaddress.ip_network(value)
    except ValueError:
        raise ValueError(f"must be {_PROXIES}") from None
    return value


def _url(*schemes: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        parts = urlsplit(value)
        if parts.scheme not in schemes or not (parts.hostname or (parts.scheme == "mailto" and parts.path)):
            raise ValueError(f"must be a URL that begins with {' or '.join(schemes)}")
        return value

    return check


_T = TypeVar("_T")
_Key = tuple[str, ...]
_OwnPath = Annotated[Path, BeforeValidator(_own_path)]
_Roots = Annotated[tuple[Annotated[Path, BeforeValidator(_root)], ...], Field(strict=False)]
_HttpUrl = Annotated[str, AfterValidator(_url("http", "https"))]
_ContactUrl = Annotated[str, AfterValidator(_url("http", "https", "mailto"))]
_Level = Literal["debug", "info", "warning", "error"]
_AnyCase = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
_Frozen = Annotated[
    Mapping[str, _T], AfterValidator(MappingProxyType), WrapSerializer(lambda value, dump: dump(dict(value)))
]
# Not an instance: paths among the defaults are resolved when settings are loaded, not when this is imported.
_DEFAULTS: Any = Field(default_factory=dict)
_Texts = Annotated[tuple[_T, ...], Field(strict=False)]
_ROOT_PATH = 'a path without a slash at its end, such as "/tes", or an empty text'
_HOSTS = 'a list of host names without ports, such as ["tes.example.org"]'
_ORIGINS = 'a list of origins such as ["https://workbench.example.org"]'
_PROXIES = 'a list of addresses or networks such as ["10.0.0.1", "10.1.0.0/16"]'
_IMAGES = 'a table of image patterns, each with "host" or an absolute directory'
_NETWORKS = 'a list of networks such as ["10.0.0.0/8"]'


class _Table(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, validate_default=True, hide_input_in_errors=True
    )


class Server(_Table):
    allow_anonymous: bool = Field(False, description="true or false")
    host: str = Field("127.0.0.1", min_length=1, description="a host name or an address")
    port: int = Field(8080, ge=0, le=65535, description="a whole number from 0 to 65535")
    data_dir: _OwnPath = Field(Path("./data"), description="a path")
    max_body_mb: int = Field(8, ge=1, le=1024, description="a whole number of MiB from 1 to 1024")
    max_queued_tasks: int | None = Field(None, ge=1, description="a whole number, at least 1")
    root_path: Annotated[str, AfterValidator(_root_path)] = Field("", description=_ROOT_PATH)
    allowed_hosts: _Texts[Annotated[str, AfterValidator(_host)]] = Field((), description=_HOSTS)
    cors_origins: _Texts[Annotated[str, AfterValidator(_origin)]] = Field((), description=_ORIGINS)
    trusted_proxies: _Texts[Annotated[str, AfterValidator(_proxy)]] = Field((), description=_PROXIES)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the port."""
        return _is_loopback(self.host)

    @field_validator("host")
    @classmethod
    def _nobody_from_outside_without_a_name(cls, host: str, info: ValidationInfo) -> str:
        if not _is_loopback(host) and info.data.get("allow_anonymous") is False:
            raise ValueError(
                "without a configured identity the server listens on loopback only (127.0.0.0/8, ::1 or "
                "localhost); server.allow_anonymous = true lets everybody who reaches the port run containers"
            )
        return host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class Db(_Table):
    sqlite_path: _OwnPath | None = Field(None, description="a path")
    mongodb_uri: SecretUrl | None = Field(None, description="a text: mongodb://...")

    @field_validator("mongodb_uri")
    @classmethod
    def _is_of_mongodb(cls, uri: SecretUrl | None, info: ValidationInfo) -> SecretUrl | None:
        uri = _with_scheme(uri, "mongodb", "mongodb+srv")
        if uri is not None and info.data.get("sqlite_path") is not None:
            raise ValueError("tasks are kept in one place: set either this or db.sqlite_path")
        return uri


class FileStorage(_Table):
    roots: _Roots | None = Field(None, description="a list of absolute paths")


class HttpStorage(_Table):
    deny_networks: Annotated[tuple[Annotated[str, AfterValidator(_network)], ...], Field(strict=False)] = Field(
        (), description=_NETWORKS
    )
    connect_s: FiniteFloat = Field(20.0, gt=0, description="a number of seconds above 0")
    stall_s: FiniteFloat = Field(120.0, gt=0, description="a number of seconds above 0")
    min_bytes_s: FiniteFloat = Field(1000.0, ge=0, description="a number of bytes per second, 0 for any speed")
    max_gb: FiniteFloat | None = Field(None, gt=0, description="a number of GB above 0")
    keep_free_gb: FiniteFloat = Field(1.0, ge=0, description="a number of GB, at least 0")
    tries: int = Field(5, ge=1, le=100, description="a whole number from 1 to 100")


class S3Site(_Table):
    endpoint: str | None = Field(None, description="a text: https://...")
    region: str | None = Field(None, description="a text")
    access_key: SecretStr | None = Field(None, description="a text")
    secret_key: SecretStr | None = Field(None, description="a text")


class Storage(_Table):
    file: FileStorage = _DEFAULTS
    http: HttpStorage = _DEFAULTS
    s3: _Frozen[S3Site] = _DEFAULTS


class RemoteFileStorage(_Table):
    roots: _Roots = Field((), description="a list of absolute paths")


class RemoteStorage(_Table):
    file: RemoteFileStorage = _DEFAULTS
    http: HttpStorage = _DEFAULTS


class Bubblewrap(_Table):
    images: _Frozen[Annotated[str, AfterValidator(_image_source)]] | None = Field(None, description=_IMAGES)


class Docker(_Table):
    host: Annotated[str, AfterValidator(_unix_socket)] | None = Field(None, description="a text: unix:///...")


class Runtime(_Table):
    kind: Literal["auto", "docker", "podman", "apptainer", "bubblewrap"] = Field(
        "auto", description="one of auto, docker, podman, apptainer, bubblewrap"
    )
    network: Literal["default", "none", "host"] = Field("default", description="one of default, none, host")
    user: Annotated[str, AfterValidator(_user)] | None = Field(None, description="a text: UID or UID:GID")
    capabilities: Annotated[tuple[Annotated[str, AfterValidator(_capability)], ...], Field(strict=False)] = Field(
        (), description='a list of capabilities such as ["CHOWN", "SETUID"]'
    )
    pids_limit: int = Field(4096, ge=8, le=4_000_000, description="a whole number, at least 8")
    pull: Literal["missing", "always", "never"] = Field("missing", description="one of missing, always, never")
    docker: Docker = _DEFAULTS
    bubblewrap: Bubblewrap = _DEFAULTS


class Local(_Table):
    enable: bool | None = Field(None, description="true or false")
    max_jobs: int | None = Field(None, ge=1, description="a whole number, at least 1")
    cpu_cores: int | None = Field(None, ge=1, description="a whole number, at least 1")
    ram_gb: FiniteFloat | None = Field(None, gt=0, description="a number of GB above 0")


class Dispatcher(_Table):
    host: str = Field("127.0.0.1", min_length=1, description="a host name or an address")
    port: int | None = Field(None, ge=0, le=65535, description="a whole number from 0 to 65535")
    give_up_after_days: FiniteFloat = Field(7.0, gt=0, description="a number of days above 0")
    lease_s: FiniteFloat = Field(15.0, ge=1, description="a number of seconds, at least 1")
    poll_interval_s: float = Field(1.0, ge=0.05, le=60, description="a number of seconds from 0.05 to 60")


class Retention(_Table):
    max_age_days: FiniteFloat | None = Field(None, ge=0, description="a number of days, at least 0")
    max_tasks: int | None = Field(None, ge=0, description="a whole number, at least 0")


class Logging(_Table):
    level: Annotated[_Level, _AnyCase] = Field("info", description="one of debug, info, warning, error")
    output_json: bool = Field(False, description="true or false")


class ServiceInfo(_Table):
    id: str = Field("org.tesapi", min_length=1, description="a text that is not empty: org.example.tes")
    name: str = Field("tesapi", min_length=1, description="a text that is not empty")
    description: str = Field("GA4GH TES 1.1: batch tasks in containers.", description="a text")
    organization_name: str = Field("tesapi", min_length=1, description="a text that is not empty")
    organization_url: _HttpUrl = Field("https://example.org", description="a text: https://...")
    contact_url: _ContactUrl | None = Field(None, description="a text: https://... or mailto:...")
    environment: str | None = Field(None, description="a text: prod, test, ...")


class _PulsarPlace(_Table):
    """A Pulsar: where it is, what it is given, and what may go there."""

    url: SecretUrl | None = Field(None, description="a text: https://...")
    amqp_url: SecretUrl | None = Field(None, description="a text: amqps://...")
    manager: str = Field("", description="a text: the name of a manager of that Pulsar")
    amqp_key_prefix: str | None = Field(None, description="a text: what the Pulsar's app.yml says")
    private_token: SecretStr | None = Field(None, description="a text")
    ca: _OwnPath | None = Field(None, description="the path of a file of certificates")
    client_certificate: _OwnPath | None = Field(None, description="the path of a file with a certificate and its key")
    python: str = Field("python3", min_length=1, description="the name or the path of a Python 3.9 or newer there")
    max_jobs: int = Field(16, ge=1, description="a whole number, at least 1")
    cpu_cores: int | None = Field(None, ge=1, description="a whole number, at least 1")
    ram_gb: FiniteFloat | None = Field(None, gt=0, description="a number of GB above 0")
    disk_gb: FiniteFloat | None = Field(None, gt=0, description="a number of GB above 0")
    preemptible: bool = Field(False, description="true or false")
    zones: _Texts[str] = Field((), description='a list of texts such as ["eu-1"]')
    labels: _Frozen[str] = Field(default_factory=dict, description='a table of texts such as { gpu = "a100" }')
    drain: bool = Field(False, description="true or false")
    runtime: Runtime = _DEFAULTS
    storage: RemoteStorage = _DEFAULTS

    @field_validator("url")
    @classmethod
    def _is_of_the_web(cls, url: SecretUrl | None) -> SecretUrl | None:
        return _with_scheme(url, "http", "https")

    @field_validator("amqp_url")
    @classmethod
    def _is_of_a_broker(cls, url: SecretUrl | None) -> SecretUrl | None:
        return _with_scheme(url, "amqp", "amqps")


def _with_scheme(url: SecretUrl | None, *schemes: str) -> SecretUrl | None:
    if url is not None and url.get_secret_value():
        try:
            parts = urlsplit(url.get_secret_value())
            right = parts.scheme in schemes and bool(parts.hostname)
        except ValueError:  # its text may quote a password
            right = False
        if not right:
            raise ValueError(f"must be a URL that begins with {' or '.join(f'{scheme}://' for scheme in schemes)}")
        return url
    return None


class PulsarStatus(_Table):
    poll_interval: FiniteFloat = Field(5.0, gt=0, description="a number of seconds above 0")
    max_polls: int | None = Field(None, ge=1, description="a whole number, at least 1")


class Pulsar(_PulsarPlace):
    """The only Pulsar of a site that has one, with the keys of TESP API."""

    status: PulsarStatus = _DEFAULTS
    client_timeout: FiniteFloat = Field(30.0, gt=0, description="a number of seconds above 0")


_Kind = Literal["pulsar_rest", "pulsar_amqp", "pulsar"]


class Destination(_PulsarPlace):
    """One of any number of Pulsars."""

    kind: _Kind | None = Field(None, description="one of pulsar_rest, pulsar_amqp, pulsar")
    poll_interval: FiniteFloat = Field(5.0, gt=0, description="a number of seconds above 0")
    max_polls: int | None = Field(None, ge=1, description="a whole number, at least 1")
    client_timeout: FiniteFloat = Field(30.0, gt=0, description="a number of seconds above 0")

    @field_validator("kind")
    @classmethod
    def _has_what_it_needs(cls, kind: _Kind | None, info: ValidationInfo) -> _Kind | None:
        if "url" not in info.data or "amqp_url" not in info.data:  # they are wrong, which is told already
            return kind
        has = {"url": info.data["url"] is not None, "amqp_url": info.data["amqp_url"] is not None}
        needs = {"pulsar_rest": ["url"], "pulsar_amqp": ["amqp_url"], "pulsar": ["url", "amqp_url"], None: []}[kind]
        missing = [name for name in needs if not has[name]] or ([] if any(has.values()) else ["url or amqp_url"])
        if missing:
            raise ValueError(f"needs {' and '.join(missing)} beside it")
        return kind


class BasicAuth(_Table):
    enable: bool = Field(False, description="true or false")
    username: str | None = Field(None, description="a text")
    password: SecretStr | None = Field(None, description="a text")


class OAuth(_Table):
    enable: bool = Field(False, description="true or false")


class Settings(_Table):
    """Every setting, with its default. Paths are absolute."""

    server: Server = _DEFAULTS
    db: Db = _DEFAULTS
    storage: Storage = _DEFAULTS
    runtime: Runtime = _DEFAULTS
    local: Local = _DEFAULTS
    dispatcher: Dispatcher = _DEFAULTS
    retention: Retention = _DEFAULTS
    logging: Logging = _DEFAULTS
    service_info: ServiceInfo = _DEFAULTS
    pulsar: Pulsar = _DEFAULTS
    destinations: _Frozen[Destination] = _DEFAULTS
    basic_auth: BasicAuth = _DEFAULTS
    oauth: OAuth = _DEFAULTS

    @property
    def sqlite_path(self) -> Path:
        """`db.sqlite_path`, by default a file in the data directory."""
        return self.db.sqlite_path or self.server.data_dir / "tesapi.db"

    @property
    def file_roots(self) -> tuple[Path, ...]:
        """`storage.file.roots`, by default one folder in the data directory; none at all when the list is empty."""
        roots = self.storage.file.roots
        return (self.server.data_dir / "files",) if roots is None else roots

    @property
    def job_storage(self) -> Mapping[str, Mapping[str, object]]:
        """What documents of local jobs say of storage: by module of `tesapi.runner.storage`."""
        return _job_storage(self.file_roots, self.storage.http)

    @property
    def pulsars(self) -> Mapping[str, Destination]:
        """Every Pulsar by the name of its destination; the one of `pulsar.…` is called `pulsar`."""
        one = self.pulsar
        if one.url is None and one.amqp_url is None:
            return self.destinations
        own: dict[str, Any] = {name: getattr(one, name) for name in _PulsarPlace.model_fields}
        own |= {"poll_interval": one.status.poll_interval, "max_polls": one.status.max_polls, "kind": None}
        return {"pulsar": Destination.model_construct(**own, client_timeout=one.client_timeout), **self.destinations}

    @property
    def local_enabled(self) -> bool:
        """`local.enable`, by default true where no other destination is configured."""
        return not self.pulsars if self.local.enable is None else self.local.enable


def kind_of(pulsar: Destination) -> _Kind:
    """How jobs get to a Pulsar: `kind`, by default whatever the URLs allow."""
    if pulsar.kind is not None:
        return pulsar.kind
    if pulsar.url is None:
        return "pulsar_amqp"
    return "pulsar_rest" if pulsar.amqp_url is None else "pulsar"


def remote_job_storage(pulsar: Destination) -> Mapping[str, Mapping[str, object]]:
    """What documents of jobs at a Pulsar say of storage."""
    return _job_storage(pulsar.storage.file.roots, pulsar.storage.http)


def _job_storage(roots: tuple[Path, ...], http: HttpStorage) -> Mapping[str, Mapping[str, object]]:
    return {"file": {"roots": [str(root) for root in roots]}, "http": http.model_dump(mode="json")}


@dataclass(frozen=True)
class Loaded:
    """The settings, where each came from (by its dotted key), and what the operator should hear at every start."""

    settings: Settings
    sources: Mapping[str, str]
    warnings: tuple[str, ...]


def load(path: Path | None = None, *, environ: Mapping[str, str] | None = None, cwd: Path | None = None) -> Loaded:
    """Read the file (by default settings.toml in `cwd`, when there is one) and the environment.

    Raises ConfigurationProblem with one line for everything that is wrong; no line shows a secret.
    """
    environ = os.environ if environ is None else environ
    cwd = Path.cwd() if cwd is None else cwd
    problems: list[str] = []
    warnings: list[str] = []
    given: dict[_Key, _Given] = {}

    for layer in _file_layers(path, cwd, environ.get("FASTAPI_PROFILE", ""), problems, warnings):
        _lay_over(given, layer, problems)
    for layer in _environment_layers(environ, given, problems, warnings):
        _lay_over(given, layer, problems)

    wrong, settings = _validate(given, cwd)
    if settings is not None:
        wrong = _wrong_together(settings)
    not_built = {key: text for key in given if key not in wrong and (text := _not_built(key, given[key]))}
    unset = _Given(None, "not set")
    problems += [_line(key, *given.get(key, unset), text) for key, text in (wrong | not_built).items()]
    if problems or settings is None:
        raise ConfigurationProblem("\n".join(problems))

    if not settings.server.is_loopback:
        where = f"port {settings.server.port} of {settings.server.host}"
        warnings.append(f"server.allow_anonymous is true: anybody who reaches {where} can run containers here.")
    for name, pulsar in settings.pulsars.items():
        if pulsar.max_polls is not None:
            warnings.append(
                f"Jobs at {name} are stopped after {pulsar.max_polls * pulsar.poll_interval:g} s: max_polls is set."
            )
    sources = {_dotted(k): given[k].source if k in given else "default" for k, _ in _values(settings)}
    return Loaded(settings, MappingProxyType(sources), tuple(warnings))


def _wrong_together(settings: Settings) -> dict[_Key, str]:
    """What is wrong of values that are each right."""
    wrong: dict[_Key, str] = {}
    if overlap := _root_around_our_data(settings):
        wrong["storage", "file", "roots"] = overlap
    for name in settings.destinations:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", name) or name in ("local", "pulsar"):
            wrong["destinations", name, "kind"] = (
                "the name of a destination must be letters, digits, '.', '_' and '-', and not local or pulsar"
            )
    return wrong


def _root_around_our_data(settings: Settings) -> str | None:
    """A sentence on a root through which tasks would reach the database, or the jobs of others."""
    data_dir = settings.server.data_dir.resolve()
    files = data_dir / "files"
    for root in settings.storage.file.roots or ():
        real = root.resolve()
        if data_dir.is_relative_to(real) or (real.is_relative_to(data_dir) and not real.is_relative_to(files)):
            return f"{root} and server.data_dir ({data_dir}) lie in one another: tasks would reach the database"
    return None


def describe(loaded: Loaded) -> list[tuple[str, str, str]]:
    """Every key that is in effect, its value as TOML with secrets masked, and where it came from."""
    settings = loaded.settings
    derived = {"db.sqlite_path": settings.sqlite_path, "storage.file.roots": settings.file_roots}
    rows = [(_dotted(key), value) for key, value in _values(settings)]
    return [(key, _toml(derived.get(key, value)), loaded.sources[key]) for key, value in rows]


def declared_keys(table: Any = Settings, above: str = "") -> Iterator[str]:
    """Every key that may be set, in dotted form; NAME stands for a name that the operator chooses."""
    if not _is_model(table):
        yield from declared_keys(get_args(table)[1], f"{above}NAME.")
        return
    for name, field in table.model_fields.items():
        if _is_table(field.annotation):
            yield from declared_keys(field.annotation, f"{above}{name}.")
        else:
            yield above + name
    if table.model_config["extra"] == "allow":
        yield above + "…"


class _Given(NamedTuple):
    value: Any
    source: str


class _Layer(NamedTuple):
    table: Mapping[str, Any]
    source: str


def _file_layers(
    path: Path | None, cwd: Path, profile: str, problems: list[str], warnings: list[str]
) -> Iterator[_Layer]:
    name = str(path or "settings.toml")
    sections = _read(cwd / name, name)
    if sections is None and path is not None:
        raise ConfigurationProblem(f"There is no settings file {cwd / name}.")
    if sections is None:
        if profile:
            warnings.append(f"FASTAPI_PROFILE = {profile!r} is ignored: there is no settings.toml in {cwd}.")
        return

    for section, table in sections.items():
        if not isinstance(table, dict):
            problems.append(f"{section} ({name}): stands outside of every section; write it below [default.…]")
        elif section in Settings.model_fields and not table.keys() <= Settings.model_fields.keys():
            problems.append(f"[{section}] ({name}): write [default.{section}], or the profile's name for default")
    by_name = {section.lower(): _Layer(table, f"{name} [{section}]") for section, table in sections.items()}
    if profile and profile.lower() not in by_name:
        there = ", ".join(sections) or "none"
        problems.append(f"FASTAPI_PROFILE = {profile!r}: {name} has no such section; it has: {there}")
    if sections and not by_name.keys() & {"default", profile.lower()}:
        warnings.append(f"Nothing of {name} is in effect: it has no [default] and FASTAPI_PROFILE is not set.")
    for section in dict.fromkeys(("default", profile.lower())):
        if section in by_name and isinstance(by_name[section].table, dict):
            yield by_name[section]


def _read(file: Path, name: str) -> dict[str, Any] | None:
    # dynaconf's reader alone: a whole Dynaconf would also run a dynaconf_hooks.py that lies beside the file,
    # follow includes, substitute @format and @jinja, and obey every *_FOR_DYNACONF variable of the process.
    bare = Dynaconf(dynaconf_skip_loaders=True)
    reader = BaseLoader(bare, "default", "toml", ("",), tomllib.load, tomllib.loads, {"mode": "rb"})
    try:
        file.open("rb").close()  # dynaconf only warns of a file that it cannot read
        sections: dict[str, Any] = reader.get_source_data([str(file)]).get(str(file), {})
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationProblem(f"{name} cannot be read: {error.strerror}.") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationProblem(f"{name} is not valid TOML: {error}.") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigurationProblem(f"{name} is not valid TOML: line {line} is not UTF-8.") from None
    return sections


def _environment_layers(
    environ: Mapping[str, str], given: Mapping[_Key, _Given], problems: list[str], warnings: list[str]
) -> Iterator[_Layer]:
    source = "environment variable CONTAINER_TYPE"
    if container_type := environ.get("CONTAINER_TYPE"):
        if kind := _CONTAINER_TYPES.get(container_type.lower()):
            yield _Layer({"runtime": {"kind": kind}, "pulsar": {"runtime": {"kind": kind}}}, source)
        else:
            problems.append(f"{source} = {_toml(container_type)}: must be one of {', '.join(_CONTAINER_TYPES)}")

    flat = {key.replace(".", "_"): key for key in declared_keys()}
    for prefix in _PREFIXES:
        # A whole table (TESAPI_SERVER='{...}') goes before the single keys of it.
        for name in sorted(environ, key=lambda name: (name.count("__"), name)):
            key = tuple(name[len(prefix) :].lower().split("__"))
            if not name.upper().startswith(prefix):
                continue
            if len(key) == 1 and key[0] not in Settings.model_fields:
                # Not refused: Kubernetes sets TESAPI_PORT and the like for a service of this name.
                if meant := flat.get(key[0]):
                    right = prefix + meant.replace(".", "__").upper()
                    warnings.append(f"{name} is not read: the variable for {meant} is {right}.")
                continue
            table = parse_conf_data(boolean_fix(environ[name]), tomlfy=True, box_settings=_PLAIN)
            for part in reversed(_spelled_as_in_the_file(key, given)):
                table = {part: table}
            yield _Layer(table, f"environment variable {name}")


def _spelled_as_in_the_file(key: _Key, given: Mapping[_Key, _Given]) -> _Key:
    spelled: _Key = ()
    for part in key:
        depth = len(spelled)
        known = sorted(k[depth] for k in given if len(k) > depth and k[:depth] == spelled)
        spelled += (next((name for name in known if name.lower() == part), part),)
    return spelled


def _lay_over(given: dict[_Key, _Given], layer: _Layer, problems: list[str]) -> None:
    for key, value in _leaves(layer.table, Settings):
        if (declared := _declared(key)) is None:
            problems.append(_unknown(key, value, layer.source))
        elif _is_table(declared) and not isinstance(value, Mapping):
            problems.append(f"{_dotted(key)} ({layer.source}): must be a table, [{_dotted(key)}], not a value")
        else:
            given[key] = _Given(value, layer.source)


def _leaves(data: Mapping[str, Any], table: Any, above: _Key = ()) -> Iterator[tuple[_Key, Any]]:
    for name, value in data.items():
        key, below = (*above, name), _below(table, name)
        # [destinations.x] without a key in it is a destination all the same.
        if _is_table(below) and isinstance(value, Mapping) and (value or _is_model(table)):
            yield from _leaves(value, below, key)
        else:
            yield key, value


def _declared(key: _Key) -> Any:
    declared: Any = Settings
    for name in key:
        declared = _below(declared, name)
    return declared


def _below(table: Any, name: str) -> Any:
    if not _is_model(table):
        return get_args(table)[1] if _is_table(table) else None
    if field := table.model_fields.get(name):
        return field.annotation
    return Any if table.model_config["extra"] == "allow" else None


def _is_model(declared: Any) -> bool:
    return isinstance(declared, type) and issubclass(declared, BaseModel)


def _is_table(declared: Any) -> bool:
    return _is_model(declared) or (get_origin(declared) is Mapping and _is_model(get_args(declared)[1]))


def _is_secret(declared: Any) -> bool:
    return (
        declared in (None, Any)
        or _is_table(declared)
        or any(isinstance(t, type) and issubclass(t, SecretStr) for t in (declared, *get_args(declared)))
    )


def _unknown(key: _Key, value: Any, source: str) -> str:
    level = list(_declared(key[:-1]).model_fields)
    near = difflib.get_close_matches(key[-1].lower(), level, 1)
    elsewhere = [tuple(k.split(".")) for k in declared_keys() if k.split(".")[-1] == key[-1].lower()]
    meant = (*key[:-1], near[0]) if near else (elsewhere or [()])[0]
    hint = f"did you mean {_dotted(meant)}?" if meant else f"there are: {', '.join(level)}"
    return _line(key, value, source, f"there is no such key; {hint}", meant)


def _validate(given: Mapping[_Key, _Given], cwd: Path) -> tuple[dict[_Key, str], Settings | None]:
    tree: dict[str, Any] = {}
    for key, (value, _) in given.items():
        table = tree
        for name in key[:-1]:
            table = table.setdefault(name, {})
        table[key[-1]] = value
    try:
        return {}, Settings.model_validate(tree, context={"cwd": cwd})
    except ValidationError as error:
        wrong = {}
        for problem in error.errors(include_url=False, include_input=False):
            place = tuple(str(part) for part in problem["loc"])
            own_keys = (key for key in given if place[: len(key)] == key and not _is_table(_declared(key)))
            key = next(own_keys, place)
            allowed = _declared(key[:-1]).model_fields[key[-1]].description
            own = problem["type"] == "value_error"
            wrong[key] = str(problem["ctx"]["error"]) if own else f"must be {allowed}"
        return wrong, None


def _not_built(key: _Key, given: _Given) -> str | None:
    names = (_dotted(key), f"{_dotted(key)}={given.value}")
    for pattern, feature in _NOT_BUILT.items():
        if given.value not in _OFF and any(fnmatch.fnmatchcase(name, pattern) for name in names):
            return f"{feature} is not built yet; remove this setting"
    return None


def _values(table: Any, declared: Any = Settings, above: _Key = ()) -> Iterator[tuple[_Key, Any]]:
    names = table if isinstance(table, Mapping) else type(table).model_fields
    for name in names:
        value = table[name] if isinstance(table, Mapping) else getattr(table, name)
        below = _below(declared, name)
        yield from _values(value, below, (*above, name)) if _is_table(below) else [((*above, name), value)]


def _dotted(key: _Key) -> str:
    return ".".join(key)


def _line(key: _Key, value: Any, source: str, text: str, declared_as: _Key | None = None) -> str:
    declared = _declared(key if declared_as is None else declared_as or ("",))
    shown = f" = {_MASKED if _is_secret(declared) else _toml(value)}"
    if isinstance(value, Mapping) and _is_secret(declared):
        shown = ""  # a table that is not where it should be; whether secrets are in it, nobody knows
    return f"{_dotted(key)}{shown} ({source}): {text}"


def _toml(value: Any) -> str:
    match value:
        case None:
            return "(not set)"
        case SecretUrl():
            return json.dumps(str(value))
        case SecretStr():
            return _MASKED
        case bool() | int() | float():
            return str(value).lower()
        case Mapping():
            pairs = ", ".join(f"{json.dumps(k)} = {_toml(v)}" for k, v in value.items())
            return f"{{ {pairs} }}" if pairs else "{}"
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case _:
            return json.dumps(_without_userinfo(str(value)), ensure_ascii=False)
