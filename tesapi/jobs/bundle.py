"""The runner as one ASCII text file, which any Python from 3.9 on runs under `-I -S`.

Text, because Pulsar writes `message` files in text mode. The modules stand in it compressed, and are imported from
memory: a zip file would have to be written somewhere before Python could import from it.
"""

from __future__ import annotations

import base64
import functools
import json
import textwrap
import zlib
from importlib import resources

_PACKAGE = "tesapi_runner"

_LOADER = '''\
"""The runner of a job of tesapi {version}: `python3 runner.py JOB.JSON`. Its modules are in the text below."""
import sys

if sys.version_info < (3, 9):
    sys.exit("The runner needs Python 3.9 or newer; this is " + sys.version.split()[0] + ".")

import base64
import json
import zlib
from importlib.machinery import ModuleSpec

TEXT = """
{text}
"""
SOURCES = json.loads(zlib.decompress(base64.b85decode("".join(TEXT.split()))).decode("utf-8"))


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in SOURCES:
            return ModuleSpec(name, self, is_package=name + ".__init__" in SOURCES)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name = module.__name__
        exec(compile(SOURCES[name], "<runner>/" + name, "exec", dont_inherit=True), module.__dict__)


sys.meta_path.insert(0, Finder())
from {package}.__main__ import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
'''


@functools.cache
def runner_text(version: str) -> str:
    """The program; `version` of tesapi stands in its first line."""
    sources = json.dumps(_sources()).encode()
    text = base64.b85encode(zlib.compress(sources, 9)).decode("ascii")
    return _LOADER.format(version=version, package=_PACKAGE, text="\n".join(textwrap.wrap(text, 120)))


def _sources() -> dict[str, str]:
    """Module name -> source. A package has an `__init__` beside it, empty, which says that it is one."""
    sources: dict[str, str] = {}
    folders = [(resources.files("tesapi.runner"), _PACKAGE)]
    while folders:
        folder, package = folders.pop()
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.name.startswith("__"):
                folders.append((entry, f"{package}.{entry.name}"))
            elif entry.name == "__init__.py":
                sources[package] = entry.read_text("utf-8")
                sources[f"{package}.__init__"] = ""
            elif entry.name.endswith(".py"):
                sources[f"{package}.{entry.name.removesuffix('.py')}"] = entry.read_text("utf-8")
    return dict(sorted(sources.items()))
