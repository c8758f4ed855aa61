"""A Hugging Face hub in this process: the few answers that huggingface_hub's own client asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

LARGE = (".safetensors", ".pt", ".bin")
"""What the hub keeps outside of git."""


class FakeHub:
    """Repositories as a list of commits; a commit is its files by name."""

    def __init__(self) -> None:
        self.repos: dict[str, list[dict[str, bytes]]] = {}
        self.private: dict[str, bool] = {}
        self.uploaded: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.logins: set[str | None] = set()
        self.refuses: int | None = None
        """Status with which every request is answered."""
        self.before_commit = lambda: None
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (_Answers,), {"hub": self})
        )
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repo: str, files: dict[str, bytes], *, private: bool = False) -> str:
        """A commit with these files beside those that are there; returns its name."""
        commits = self.repos.setdefault(repo, [])
        self.private.setdefault(repo, private)
        commits.append((commits[-1] if commits else {}) | files)
        return self.sha(repo)

    def sha(self, repo: str, number: int | None = None) -> str:
        number = len(self.repos[repo]) if number is None else number
        return hashlib.sha1(f"{repo} {number}".encode(), usedforsecurity=False).hexdigest()

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes] | None:
        commits = self.repos[repo]
        if revision == "main":
            return commits[-1]
        return next((f for i, f in enumerate(commits, 1) if self.sha(repo, i) == revision), None)


@contextmanager
def fake_hub(patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that huggingface_hub takes for the real one; it may be reached, though tests are offline."""
    hub = FakeHub()
    template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # there is no store of chunks
    yield hub
    hub.close()


class _Answers(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        parts = self._parts()
        if parts is None:
            return
        if parts[:2] == ["api", "models"]:
            repo, rest = "/".join(parts[2:4]), parts[4:]
            revision = rest[1] if len(rest) > 1 else "main"
            files = self._repo(repo, revision)
            if files is not None:
                tree = rest[:1] == ["tree"]
                self._json(self._tree(files, rest[2:]) if tree else self._info(repo, revision))
        elif len(parts) < 5:
            self._json({"error": "nothing here"}, 404)
        else:  # owner/name/resolve/revision/file
            repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            files = self._repo(repo, revision)
            if files is not None:
                if self.command == "GET":
                    self.hub.fetched.append(name)
                headers = {"X-Repo-Commit": revision, "ETag": f'"{_blob(files[name])}"'}
                self._send(200, files[name], headers)

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        if self._parts() is not None:
            content = self._body()
            self.hub.uploaded[hashlib.sha256(content).hexdigest()] = content
            self._send(200, b"")

    def do_POST(self) -> None:
        parts = self._parts()
        if parts is None:
            return
        body = self._body()
        if parts == ["api", "validate-yaml"]:
            self._json({"warnings": [], "errors": []})
        elif parts == ["api", "repos", "create"]:
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            private = asked["visibility"] == "private"
            self.hub.add(repo, {".gitattributes": b"* -text\n"}, private=private)
            self._json({"url": f"{self.hub.endpoint}/{repo}"})
        elif parts[-1] == "batch":
            actions = {"upload": {"href": f"{self.hub.endpoint}/upload"}}
            objects = [one | {"actions": actions} for one in json.loads(body)["objects"]]
            self._json({"transfer": "basic", "objects": objects})
        elif parts[4] == "preupload":
            names = [one["path"] for one in json.loads(body)["files"]]
            modes = {name: "lfs" if name.endswith(LARGE) else "regular" for name in names}
            files = [{"path": n, "uploadMode": m, "shouldIgnore": False} for n, m in modes.items()]
            self._json({"files": files})
        else:
            self._commit("/".join(parts[2:4]), [json.loads(line) for line in body.splitlines()])

    def _commit(self, repo: str, lines: list[dict]) -> None:
        self.hub.before_commit()
        parent = lines[0]["value"]["parentCommit"]
        if parent != self.hub.sha(repo):
            self._json({"error": "the branch has moved"}, 412)
            return
        files = dict(self.hub.repos[repo][-1])
        for line in lines[1:]:
            key, value = line["key"], line["value"]
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
            else:
                del files[value["path"]]
        self.hub.repos[repo].append(files)
        sha = self.hub.sha(repo)
        url = f"{self.hub.endpoint}/{repo}/commit/{sha}"
        self._json({"success": True, "commitOid": sha, "commitUrl": url})

    def _parts(self) -> list[str] | None:
        """The path's parts; None if the request has been answered already."""
        login = self.headers.get("authorization")
        self.hub.logins.add(login)
        if self.hub.refuses is not None:
            self._body()
            self._json({"error": "no"}, self.hub.refuses)
            return None
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _repo(self, repo: str, revision: str) -> dict[str, bytes] | None:
        if repo not in self.hub.repos:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
            return None
        files = self.hub.files(repo, revision)
        if files is None:
            self._json({"error": "none"}, 404, {"X-Error-Code": "RevisionNotFound"})
        return files

    def _info(self, repo: str, revision: str) -> dict:
        sha = self.hub.sha(repo) if revision == "main" else revision
        return {"id": repo, "sha": sha, "private": self.hub.private[repo], "tags": []}

    def _tree(self, files: dict[str, bytes], folder: list[str]) -> list[dict]:
        entries, inside = {}, "".join(f"{part}/" for part in folder)
        for name, content in files.items():
            if not name.startswith(inside):
                continue
            head, slash, _ = name.removeprefix(inside).partition("/")
            entry = {"path": inside + head, "oid": _blob(content), "size": len(content)}
            if name.endswith(LARGE):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 134}
            kind = {"type": "directory"} if slash else {"type": "file"}
            entries[head] = entry | kind
        return list(entries.values())

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding") == "chunked":
            content = b""
            while size := int(self.rfile.readline(), 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _json(self, content: object, status: int = 200, headers: dict | None = None) -> None:
        kind = {"Content-Type": "application/json"}
        self._send(status, json.dumps(content).encode(), kind | (headers or {}))

    def _send(self, status: int, content: bytes, headers: dict | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _blob(content: bytes) -> str:
    """Git's name of a file's content."""
    blob = b"blob %d\0" % len(content) + content
    return hashlib.sha1(blob, usedforsecurity=False).hexdigest()
