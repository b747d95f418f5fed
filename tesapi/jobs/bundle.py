"""The runner as one ASCII text file, which any Python from 3.9 on runs under `-I -S`.

Text, because Pulsar writes `message` files in text mode. The modules stand in it compressed, and are imported from
memory: a zip file would have to be written somewhere before Python could import from it.

Compiling them is most of what a runner does before its job. Where it is known which Python will run it, they may lie
compiled beside it, under the name of the text and CODE_SUFFIX; any other Python, and any other text, passes that by.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import marshal
import sys
import textwrap
import zlib
from importlib import resources

CODE_SUFFIX = ".code"
_PACKAGE = "tesapi_runner"

_LOADER = '''\
"""The runner of a job of tesapi {version}: `python3 runner.py JOB.JSON`. Its modules are in the text below."""
import sys

if sys.version_info < (3, 9):
    sys.exit("The runner needs Python 3.9 or newer; this is " + sys.version.split()[0] + ".")

from importlib.machinery import ModuleSpec

TEXT = """
{text}
"""


def compiled():
    import marshal

    wanted = "{digest} " + sys.version
    try:
        with open(__file__ + "{suffix}", "rb") as file:
            return marshal.load(file) if marshal.load(file) == wanted else None
    except (OSError, EOFError, ValueError, TypeError):
        return None


def sources():
    import binascii
    import json
    import zlib

    return json.loads(zlib.decompress(binascii.a2b_base64(TEXT)).decode("utf-8"))


CODE = compiled()
MODULES = CODE or sources()


class Finder:
    def find_spec(self, name, path=None, target=None):
        if name in MODULES:
            return ModuleSpec(name, self, is_package=name + ".__init__" in MODULES)

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        name = module.__name__
        if CODE:
            import marshal
            import zlib

            code = marshal.loads(zlib.decompress(CODE[name]))
        else:
            code = compile(MODULES[name], "<runner>/" + name, "exec", dont_inherit=True)
        exec(code, module.__dict__)


sys.meta_path.insert(0, Finder())
from {package}.__main__ import main

if __name__ == "__main__":
    import os

    os._exit(main(sys.argv[1:]))  # all is written and closed: to take Python apart would only take time
'''


@functools.cache
def runner_text(version: str) -> str:
    """The program; `version` of tesapi stands in its first line."""
    packed = _packed()
    text = "\n".join(textwrap.wrap(base64.b64encode(packed).decode("ascii"), 120))
    return _LOADER.format(version=version, package=_PACKAGE, text=text, digest=_digest(packed), suffix=CODE_SUFFIX)


@functools.cache
def runner_code() -> bytes:
    """The same modules, compiled for the Python that runs this."""
    modules = {
        name: zlib.compress(marshal.dumps(compile(source, f"<runner>/{name}", "exec", dont_inherit=True)), 9)
        for name, source in _sources().items()
    }
    tag = f"{_digest(_packed())} {sys.version}"
    return marshal.dumps(tag) + marshal.dumps(modules)


@functools.cache
def _packed() -> bytes:
    return zlib.compress(json.dumps(_sources()).encode(), 9)


def _digest(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()[:32]


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
