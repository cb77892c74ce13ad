"""A page that follows runs while they go on: a server for this machine alone, which reads files and changes none."""

from __future__ import annotations

import hashlib
import secrets
import threading
import webbrowser
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pyrnode.errors import ConfigError, PyrnodeError
from pyrnode.files import to_json
from pyrnode.pages import found, page_of
from pyrnode.pages.markup import plain

HOST = "127.0.0.1"


class Server(ThreadingHTTPServer):
    """Serves the page on runs, and its news, to browsers of this machine that know the address.

    Args:
        runs: Folders of runs, as `pyrnode.report` takes them.
        port: Port to listen on; 0 takes a free one.

    Raises:
        ConfigError: The port is taken, or is none.
        CheckpointError: A folder holds no run.
    """

    daemon_threads = True

    def __init__(self, runs: Sequence[str | Path], *, port: int = 0) -> None:
        self.folders = found(runs)
        page_of(self.folders)  # whatever is wrong with them is said before anything is served
        self.secret = secrets.token_urlsafe(16)  # so that other users of this machine, and other pages, cannot ask
        self._one = threading.Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"port = {port}: cannot listen there ({reason}); leave it out to take a free one"
            ) from None

    @property
    def address(self) -> str:
        """Where the page is."""
        return f"http://{HOST}:{self.server_port}/{self.secret}/"

    def page(self) -> bytes:
        """The page as it is now."""
        with self._one:
            return page_of(self.folders).html(live=True).encode()

    def news(self) -> bytes:
        """What may have changed of it, as JSON."""
        with self._one:
            page = page_of(self.folders)
        going = [story for story in page.stories if story.owner is not None]
        said = "; ".join(f"{plain(story.label)}: {story.state}" for story in (going or page.stories)[:3])
        more = len(going or page.stories) - 3
        said += f"; and {more} more" if more > 0 else ""
        return to_json({"parts": page.parts, "data": page.data, "said": said, "ended": not going}).encode()


class _Handler(BaseHTTPRequestHandler):
    """Answers GET for two paths, and for nothing else."""

    server: Server
    server_version, sys_version = "pyrnode", ""
    protocol_version = "HTTP/1.0"  # a connection for each question: when the server ends, no thread answers on

    def do_GET(self) -> None:
        """The page, or its news."""
        own = (f"{HOST}:{self.server.server_port}", f"localhost:{self.server.server_port}")
        paths = {f"/{self.server.secret}/": ("text/html", self.server.page)}
        paths |= {f"/{self.server.secret}/news": ("application/json", self.server.news)}
        if self.headers.get("Host") not in own or self.path not in paths:  # a name of another's may lead here too
            self._answer(404, "text/plain", b"There is nothing here.\n")
            return
        kind, make = paths[self.path]
        try:
            content = make()
        except PyrnodeError as error:  # the folder has gone
            self._answer(410, "text/plain", f"{error}\n".encode(errors="replace"))
            return
        mark = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
        if self.headers.get("If-None-Match") == mark:
            self._answer(304, kind, b"", mark)
        else:
            self._answer(200, kind, content, mark)

    def _answer(self, status: int, kind: str, content: bytes, mark: str | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Referrer-Policy", "no-referrer")
        if mark is not None:
            self.send_header("ETag", mark)
        self.end_headers()
        if status != 304:
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged: the terminal belongs to whoever started it."""


def serve(runs: Sequence[str | Path], *, port: int = 0, open: bool = False, say: Any = print) -> None:
    """Serves the page until Ctrl-C; errors as `Server`.

    Args:
        runs: Folders of runs.
        port: Port to listen on; 0 takes a free one.
        open: Show it in the browser.
        say: Told where the page is.
    """
    with Server(runs, port=port) as server:
        say(f"following {', '.join(plain(path) for path in server.folders)} at {server.address} (Ctrl-C ends this)")
        if open:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            say("no longer followed; the run itself goes on")
