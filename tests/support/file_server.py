"""An HTTP server on 127.0.0.1 with files in memory, which can fail in several ways."""

import hashlib
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FileServer(ThreadingHTTPServer):
    """Attributes that a test may change:

    files: content by path, such as "/a.pth".
    headers: headers of every answer.
    ranges: whether Range requests are answered with a part.
    redirect: where requests of a file that is not there are sent; None answers 404.
    cut: close the connection after so many bytes of a body; None sends all.
    seen: (method, path, Range header) of every request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.headers, self.seen = {}, {}, []
        self.ranges, self.cut, self.redirect = True, None, None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.seen.append((self.command, self.path, asked))
        body = self.server.files.get(self.path)
        if body is None and self.server.redirect is not None:
            self._start(302, 0, Location=self.server.redirect)
            return
        if body is None:
            self._start(404, 0)
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and self.server.ranges else 0
        if start and start >= len(body):
            self._start(416, 0)
            return
        part = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        part["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        self._start(206 if start else 200, len(body) - start, **part)
        if self.command == "GET":
            self.wfile.write(body[start:][: self.server.cut])
            self.close_connection = self.server.cut is not None

    do_HEAD = do_GET

    def _start(self, status, length, **headers):
        self.send_response(status)
        for name, value in {"Content-Length": length, **self.server.headers, **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()


@contextmanager
def serving():
    """A running FileServer; its port is closed afterwards."""
    with FileServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
