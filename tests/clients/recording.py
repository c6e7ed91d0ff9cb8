"""A proxy that notes the JSON bodies which clients send, for sent_fields.json."""

from __future__ import annotations

import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

from compatibility import Row

EXAMPLES = 6  # of each field


class Recorder:
    """Forwards to ``address``, and keeps each body that was answered under the client whose test runs."""

    def __init__(self, address: str) -> None:
        self.upstream = urlsplit(address).netloc
        self.client: tuple[str, str] | None = None
        self.fields: dict[tuple[str, str, str], dict[str, list[Any]]] = {}
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._forward(None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self._forward(body) == 200:
                    recorder.note(self.path, json.loads(body), self.headers["User-Agent"])

            def _forward(self, body: bytes | None) -> int:
                upstream = http.client.HTTPConnection(recorder.upstream, timeout=60)
                headers = {name: self.headers[name] for name in ("Content-Type", "Authorization") if self.headers[name]}
                upstream.request(self.command, self.path, body, headers)
                response = upstream.getresponse()
                self.send_response(response.status)
                self.send_header("Content-Type", response.headers["Content-Type"])
                self.end_headers()  # HTTP/1.0: the answer ends where the connection does
                while piece := response.read1():
                    self.wfile.write(piece)
                upstream.close()
                return response.status

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def test_begins(self, row: Row | None) -> None:
        """Requests of the project's own environment name the version of the openai package themselves."""
        self.client = row[:2] if row else None

    def note(self, path: str, body: dict[str, Any], agent: str) -> None:
        if agent.startswith("Python-urllib"):
            return  # plain HTTP
        client = self.client or ("openai", agent.rpartition(" ")[2])
        fields = self.fields.setdefault((*client, path), {})
        for name, value in body.items():
            seen = fields.setdefault(name, [])
            if value not in seen and len(seen) < EXAMPLES:
                seen.append(value)

    def text(self, date: str) -> str:
        """Clients, endpoints, and the fields that were sent with example values: a line for each endpoint."""
        lines = [
            json.dumps({"client": client, "version": number, "endpoint": path, "fields": dict(sorted(fields.items()))})
            for (client, number, path), fields in sorted(self.fields.items())
        ]
        return f'{{"recorded": "{date}", "requests": [\n  ' + ",\n  ".join(lines) + "\n]}\n"
