"""The smallest image there is, to try an engine without a registry: one program that ends at once with 0."""

from __future__ import annotations

import io
import platform
import struct
import tarfile

NAME = "tesapi-probe"
COMMAND = ("/true",)

# Machine number of ELF, and exit(0) in that machine's code.
_PROGRAMS = {
    "x86_64": (0x3E, bytes.fromhex("31ff b83c000000 0f05")),
    "aarch64": (0xB7, bytes.fromhex("000080d2 a80b80d2 010000d4")),
}
_ADDRESS = 0x400000


def archive() -> bytes | None:
    """The image's root file system as tar; None where this machine's code is not known here."""
    if platform.machine() not in _PROGRAMS:
        return None
    program = _elf(*_PROGRAMS[platform.machine()])
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        entry = tarfile.TarInfo("true")
        entry.size, entry.mode = len(program), 0o755
        tar.addfile(entry, io.BytesIO(program))
    return data.getvalue()


def _elf(machine: int, code: bytes) -> bytes:
    """An executable of one segment. Source: elf(5)."""
    header_size, segment_size = 64, 56
    start = header_size + segment_size
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(ident, 2, machine, 1, _ADDRESS + start, header_size, 0, 0, header_size, segment_size, 1, 0, 0, 0),
    )
    size = start + len(code)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _ADDRESS, _ADDRESS, size, size, 0x1000)
    return header + segment + code
