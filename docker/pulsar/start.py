"""Writes Pulsar's configuration from the environment, and becomes Pulsar.

PULSAR_DIRECTORY is where its jobs lie: the same path in here and on the machine of the Docker engine, which mounts
folders of them into containers; PULSAR_FILES, likewise, is where the files of tasks lie. With PULSAR_AMQP_URL it
listens to that broker, and else to HTTP on port 8913, where PULSAR_TOKEN, if there is one, has to be told.
"""

import json
import os
import pathlib

directory = pathlib.Path(os.environ["PULSAR_DIRECTORY"])
broker = os.environ.get("PULSAR_AMQP_URL", "")
token = os.environ.get("PULSAR_TOKEN", "")

configuration = pathlib.Path("/etc/pulsar")
configuration.mkdir(mode=0o700, exist_ok=True)
for needed in (directory, pathlib.Path(os.environ["PULSAR_FILES"])):
    needed.mkdir(parents=True, exist_ok=True)

app = {
    "staging_directory": str(directory / "staging"),
    "persistence_directory": str(directory / "persisted"),
    "managers": {"_default_": {"type": "queued_python", "min_polling_interval": 0.1}},
}
if token:
    app["private_token"] = token
if broker:
    app["message_queue_url"] = broker
(configuration / "app.yml").write_text(json.dumps(app), "utf-8")  # JSON is YAML
(configuration / "server.ini").write_text(
    "[server:main]\nhost = 0.0.0.0\nport = 8913\n[app:main]\napp_config = %(here)s/app.yml\n"
    if not broker
    else "[loggers]\nkeys = root\n[handlers]\nkeys = console\n[formatters]\nkeys = plain\n"
    "[logger_root]\nlevel = INFO\nhandlers = console\n"
    "[handler_console]\nclass = StreamHandler\nargs = (sys.stderr,)\nformatter = plain\n"
    "[formatter_plain]\nformat = %(asctime)s %(levelname)s [%(name)s] %(message)s\n",
    "utf-8",
)
command = ["pulsar-main", "-c", str(configuration)] if broker else ["pulsar-serve", str(configuration / "server.ini")]
os.execvp(command[0], command)  # noqa: S606
