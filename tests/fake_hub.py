"""A hub on this machine that holds what is uploaded to it: as much of its HTTP as that takes."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0" * 39 + "1"


class Hub(ThreadingHTTPServer):
    """Attributes:
    files: content by `OWNER/NAME/PATH`.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.unknown: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None: ...

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind = self.path.rpartition("/main")[0].rpartition("/")[2] or self.path
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.answer({"url": f"{self.server.address}/{name}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif kind == "preupload":
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular"} for f in files]
            self.answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif kind == "commit":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    path = f"{self.repo()}/{line['value']['path']}"
                    self.server.files[path] = base64.b64decode(line["value"]["content"])
            place = f"{self.server.address}/{self.repo()}/commit/{COMMIT}"
            self.answer({"commitUrl": place, "commitOid": COMMIT, "success": True})
        else:
            self.refuse()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        names = {name: data for name, data in self.server.files.items() if self.repo() in name}
        short = {name.removeprefix(f"{self.repo()}/"): data for name, data in names.items()}
        if "/resolve/" in path:
            owner, repo, _, _, file = path.lstrip("/").split("/", 4)
            data = self.server.files.get(f"{owner}/{repo}/{file}")
            self.refuse() if data is None else self.send(data, "application/octet-stream")
        elif "/tree/" in path:
            sizes = [{"path": name, "size": len(data)} for name, data in short.items()]
            self.answer([{"type": "file", "oid": "0" * 40, **each} for each in sizes])
        elif path.startswith("/api/models/") and short:
            siblings = [{"rfilename": name} for name in short]
            self.answer({"id": self.repo(), "sha": COMMIT, "siblings": siblings})
        else:
            self.refuse()

    do_HEAD = do_GET

    def repo(self) -> str:
        return "/".join(self.path.removeprefix("/api/models").strip("/").split("/")[:2])

    def answer(self, value: Any) -> None:
        self.send(json.dumps(value).encode(), "application/json")

    def send(self, data: bytes, kind: str, code: int = 200) -> None:
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refuse(self) -> None:
        self.server.unknown.append(f"{self.command} {self.path}")
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def fake_hub() -> Iterator[Hub]:
    """A hub that serves as long as the block runs."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    yield hub
    hub.shutdown()
    thread.join()
