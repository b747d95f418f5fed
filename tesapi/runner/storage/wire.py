"""A connection with patience that ends: it hears a stop within a second, and gives up on whoever stalls."""

from __future__ import annotations

import errno
import functools
import io
import os
import select
import socket
import ssl
import threading
import time
from typing import Any, BinaryIO, Callable, List, NamedTuple, Optional, Sequence

from .addresses import Found, Policy, literal

_SLICE_S = 0.2
_ADDRESSES = 4
_MOST_TALK = 1 << 20
_CHUNK = 1 << 20
_TLS_CHUNK = 64 << 10
_BUNDLES = (  # where distributions keep the certificates of authorities, for a Python that was built elsewhere
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


class Failed(Exception):
    """A request came to nothing; the text is a clause. `again` says whether another try may help, after `wait_s`."""

    def __init__(self, clause: str, *, again: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(clause)
        self.again = again
        self.wait_s = wait_s


class Patience(NamedTuple):
    """How long servers may take: to be connected to, without moving a byte, and how slow they may be meanwhile."""

    connect_s: float
    stall_s: float
    min_bytes_s: float


class Wire(io.RawIOBase):
    """A socket to a server, as a stream of what it says; `http.client` takes it for a socket."""

    def __init__(self, connected: socket.socket, patience: Patience, check: Callable[[], None]) -> None:
        self._socket = connected
        self._patience = patience
        self._check = check
        self._heard = b""
        self._ended = False
        self._read_ahead = True
        self.reader = io.BufferedReader(self, 64 << 10)
        self.answer_within_stall_s()

    def answer_within_stall_s(self) -> None:
        """From now on the other side has that long for all that it has to say, which is little."""
        self._allow(self._patience.stall_s, 0.0)

    def flow(self) -> None:
        """From now on `moved` is to be called again and again."""
        self._allow(self._patience.stall_s, self._patience.min_bytes_s)

    def _allow(self, silence_s: float, min_bytes_s: float) -> None:
        # Only time that was spent waiting counts: a machine that is busy, or was asleep, is no fault of the server's.
        self._silence_s, self._min_bytes_s = silence_s, min_bytes_s
        self._waited_s = self._window_s = 0.0
        self._useless = self._count = 0

    def moved(self, count: int) -> None:
        """So many bytes of a file have come or gone."""
        self._count += count
        self._waited_s, self._useless = 0.0, 0

    def wait(self, event: int) -> None:
        """Sleep until `event`, a moment at most; the caller tries again. Raises Failed where patience has an end."""
        self._check()
        if self._waited_s >= self._silence_s:
            raise Failed(f"the server was silent for {self._silence_s:g} s", again=True)
        if self._window_s >= self._patience.stall_s:
            if self._count < self._min_bytes_s * self._window_s:
                raise Failed(f"it goes slower than {self._min_bytes_s:g} bytes/s", again=True)
            self._window_s, self._count = 0.0, 0
        began = time.monotonic()
        poll = select.poll()
        poll.register(self._socket, event)
        poll.poll(min(_SLICE_S, self._silence_s) * 1000)
        spent_s = min(time.monotonic() - began, _SLICE_S)
        self._waited_s += spent_s
        self._window_s += spent_s

    def makefile(self, mode: str) -> BinaryIO:
        """What `http.client` asks of a socket."""
        return self.reader

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._heard or self._ended:
            count = min(len(buffer), len(self._heard))
            buffer[:count] = self._heard[:count]
            self._heard = self._heard[count:]
            return count
        received: Optional[int] = None
        while received is None:
            self._check()
            received = self._try(lambda: self._socket.recv_into(buffer), select.POLLIN)
        self._useless += received
        if self._useless > _MOST_TALK:
            raise Failed("the server talks without end and sends nothing")
        return received

    def take(self, buffer: memoryview) -> memoryview:
        """What there is of a body, in front of `buffer` or elsewhere; empty at its end.

        `readinto1` of the reader would do, if it did not wait for more once it has emptied its own buffer into ours.
        """
        if self._read_ahead:
            self._read_ahead = False
            return memoryview(self.reader.read1(len(buffer)))
        return buffer[: self.readinto(buffer)]

    def is_answering(self) -> bool:
        """Whether the server says something, or has left; nothing is lost of what it says."""
        if not self._heard and not self._ended:
            try:
                self._heard = self._socket.recv(64 << 10)
                self._ended = not self._heard
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return False
            except OSError as error:
                raise broken(error) from error
        return True

    def say(self, data: bytes) -> None:
        """Send all of it."""
        view = memoryview(data)
        while view:
            self._check()
            sent = self._try(functools.partial(self._socket.send, view), select.POLLOUT)
            view = view[sent or 0 :]

    def send_file(self, source: int, size: int) -> bool:
        """Send the first `size` bytes of a file; False where the server answers before it has them all."""
        position = 0
        self.flow()
        while position < size:
            self._check()
            if self.is_answering():
                return False
            try:
                sent = self._send_some(source, position, min(_CHUNK, size - position))
            except Failed:
                if self.is_answering():  # it has closed its ears, and perhaps said why
                    return False
                raise
            position += sent
            if sent:
                self.moved(sent)
        return True

    def _send_some(self, source: int, position: int, count: int) -> int:
        """The number of bytes that went, which may be none yet. Inside the kernel where nothing has to be encrypted."""
        if isinstance(self._socket, ssl.SSLSocket):
            data = os.pread(source, min(count, _TLS_CHUNK), position)
            sent = self._try(lambda: self._socket.send(data), select.POLLOUT) if data else 0
        else:
            outlet = self._socket.fileno()
            sent = self._try(lambda: os.sendfile(outlet, source, position, count), select.POLLOUT)
        if sent == 0:
            raise Failed("the file became shorter while it was sent")
        return sent or 0

    def has_more(self, patience_s: float) -> bool:
        """Whether the server has more to say although it should be done; it has so long to close."""
        self._allow(patience_s, 0.0)
        try:
            return bool(self.reader.read1(1))
        except Failed:
            return False

    def secure(self, host: str) -> None:
        """Speak TLS from now on, with a server that proves to be `host`."""
        try:
            secured = _tls().wrap_socket(
                self._socket,
                server_hostname=host.rstrip("."),
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,  # where nobody says how long a file is, its end has to be told
            )
        except (OSError, ValueError) as error:
            raise Failed(f"TLS cannot be begun ({type(error).__name__})") from error
        self._socket = secured

        def shake() -> int:
            secured.do_handshake()
            return 1

        while self._try(shake, select.POLLIN) is None:
            self._check()

    def _try(self, act: Callable[[], int], event: int) -> Optional[int]:
        """What `act` returns; None where it has to wait for `event`, after a moment of doing so."""
        try:
            return act()
        except ssl.SSLWantReadError:
            self.wait(select.POLLIN)
        except ssl.SSLWantWriteError:
            self.wait(select.POLLOUT)
        except BlockingIOError:
            self.wait(event)
        except OSError as error:
            raise broken(error) from error
        return None

    def hang_up(self) -> None:
        """Close the connection."""
        self._socket.close()


def dial(host: str, port: int, policy: Policy, patience: Patience, check: Callable[[], None]) -> Wire:
    """A connection to `host`, at one of the addresses that it has now, if all of them are allowed. Raises Failed.

    The name is not looked up again: what has been checked is what is connected to.
    """
    found = _look_up(host, port, patience.connect_s, check)
    objection = policy.objection_to(found)
    if objection is not None:
        raise Failed(f"the host {host} is refused: {objection}")
    failure = Failed(f"the host {host} has no address")
    for address in found[:_ADDRESSES]:
        try:
            return Wire(_connected(address, patience.connect_s, check), patience, check)
        except OSError as error:
            failure = broken(error)
    raise failure


def broken(error: OSError) -> Failed:
    """What went wrong with a connection, as a clause without anything that the other side wrote."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return Failed(f"the server's certificate is not to be trusted ({error.verify_message})")
    if isinstance(error, ssl.SSLEOFError) or getattr(error, "reason", None) == "UNEXPECTED_EOF_WHILE_READING":
        return Failed("the server broke the connection off", again=True)
    if isinstance(error, ssl.SSLError):
        return Failed(f"TLS failed ({error.reason or type(error).__name__})", again=True)
    if error.errno in (errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED):
        return Failed("the server broke the connection off", again=True)
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    return Failed(f"the server cannot be reached ({reason})", again=True)


def _look_up(host: str, port: int, patience_s: float, check: Callable[[], None]) -> Sequence[Found]:
    """The addresses of `host`. In a thread, for a resolver cannot be interrupted; one that hangs is left behind."""
    known = literal(host, port)
    if known:
        return known
    found: List[Found] = []
    failed: List[OSError] = []

    def ask() -> None:
        try:
            found.extend(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            failed.append(error if isinstance(error, OSError) else OSError(str(error)))

    thread = threading.Thread(target=ask, daemon=True)
    due = time.monotonic() + patience_s
    thread.start()
    while thread.is_alive():
        thread.join(_SLICE_S)
        check()
        if time.monotonic() >= due:
            raise Failed(f"the host {host} could not be looked up in {patience_s:g} s", again=True)
    if failed:
        raise Failed(f"the host {host} is unknown", again=failed[0].errno == socket.EAI_AGAIN)
    return found


def _connected(address: Found, patience_s: float, check: Callable[[], None]) -> socket.socket:
    family, kind, protocol, _, place = address
    connecting = socket.socket(family, kind, protocol)
    try:
        connecting.setblocking(False)
        code = connecting.connect_ex(place)
        poll = select.poll()
        poll.register(connecting, select.POLLOUT)
        due = time.monotonic() + patience_s
        while code in (errno.EINPROGRESS, errno.EALREADY, errno.EINTR):
            check()
            if time.monotonic() >= due:
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
            if poll.poll(_SLICE_S * 1000):
                code = connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                break
        if code:
            raise OSError(code, os.strerror(code))
        connecting.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connecting
    except BaseException:
        connecting.close()
        raise


@functools.lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # Some Pythons take a connection that breaks off for one that was closed (Debian's 3.11, for instance).
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    known = ssl.get_default_verify_paths()
    if known.cafile is None and known.capath is None:
        for bundle in _BUNDLES:
            if os.path.exists(bundle):
                context.load_verify_locations(bundle)
                break
    return context
