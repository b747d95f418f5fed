"""The local web server of the storage benchmark: it sends one file from the page cache, and swallows what is put."""

from __future__ import annotations

import http.server
import os
import pathlib
import sys

FILE = pathlib.Path(sys.argv[2])


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        with FILE.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            self.wfile.flush()
            self.connection.sendfile(file)

    def do_PUT(self) -> None:
        left = int(self.headers["Content-Length"])
        if self.headers.get("Expect") == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        with FILE.with_suffix(".put").open("wb") as file:
            buffer = memoryview(bytearray(1 << 20))
            while left:
                count = self.rfile.readinto1(buffer[: min(left, len(buffer))])
                if not count:
                    return
                file.write(buffer[:count])
                left -= count
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def handle_expect_100(self) -> bool:
        return True

    def log_message(self, *args: object) -> None:
        pass


if __name__ == "__main__":
    http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), _Handler).serve_forever()
