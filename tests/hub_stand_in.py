"""A stand-in of the Hugging Face Hub on 127.0.0.1: the requests that huggingface_hub makes for a download.

It is no Hub: it says what the real one says about repositories, revisions and files, and nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Repository:
    """Commits and their files, and which commit each branch is at."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        content = json.dumps([len(self.commits), sorted(files)]).encode() + b"".join(
            files[name] for name in sorted(files)
        )
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha], self.branches[branch] = dict(files), sha
        return sha


class Hub:
    """Serves ``repositories`` while it is entered; ``requests`` are the paths that were asked for.

    Data sets have names like ``datasets/owner/name``.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, body=False)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = request.path.partition("?")[0]
        self.requests.append(f"{request.command} {path}")
        path = path.replace("/api/datasets/", "/api/models/datasets/")
        if match := re.fullmatch(r"/api/models/(.+?)/tree/([^/]+)", path):
            self._tree(request, match[1], match[2])
        elif match := re.fullmatch(r"/api/models/(.+?)(?:/revision/([^/]+))?", path):
            self._describe(request, match[1], match[2] or "main")
        elif match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._file(request, match[1], match[2], match[3], body)
        else:
            _send(request, 404, {})

    def _find(self, request: BaseHTTPRequestHandler, name: str, revision: str) -> str | None:
        """Return the commit, or None after an answer that says why not."""
        repository = self.repositories.get(name)
        if repository is None:
            _send(request, 404, {"X-Error-Code": "RepoNotFound"})
        elif repository.gated:
            _send(request, 403, {"X-Error-Code": "GatedRepo"})
        else:
            commit = repository.branches.get(revision, revision)
            if commit in repository.commits:
                return commit
            _send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        return None

    def _describe(self, request: BaseHTTPRequestHandler, name: str, revision: str) -> None:
        commit = self._find(request, name, revision)
        if commit is not None:
            files = self.repositories[name].commits[commit]
            siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
            answer = {"id": name, "sha": commit, "siblings": siblings, "tags": [], "downloads": 0, "likes": 0,
                      "private": False, "disabled": False, "gated": False}  # fmt: skip
            _send(request, 200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _tree(self, request: BaseHTTPRequestHandler, name: str, revision: str) -> None:
        commit = self._find(request, name, revision)
        if commit is not None:
            answer = [
                {"type": "file", "path": file, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for file, content in self.repositories[name].commits[commit].items()
            ]
            _send(request, 200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def _file(self, request: BaseHTTPRequestHandler, name: str, revision: str, file: str, body: bool) -> None:
        commit = self._find(request, name, revision)
        if commit is None:
            return
        content = self.repositories[name].commits[commit].get(file)
        if content is None:
            _send(request, 404, {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
        _send(request, 200, headers, content, body=body)


def _send(
    request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes = b"", *, body: bool = True
) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if body:
        request.wfile.write(content)
