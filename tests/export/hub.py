"""A stand-in for the Hugging Face hub: the part of its HTTP API that an upload needs, on loopback, in this process.

It speaks what `huggingface_hub` 2.4 sends: whoami, repositories, preupload, the LFS batch with its uploads, commits,
and files to download. Objects are kept by their hash, as the hub keeps them. Of Xet, which the library takes where its
extension is installed, it counts what arrives and believes the hashes: such a file is kept as `sha256:...`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

TOKEN = "hf_" + "a" * 34
OWNER = "me"


@dataclass
class Repo:
    """A repository: its files by name, its commits' messages, and who may see it."""

    private: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class StandIn:
    """The hub as it is: what a test looks at, and how it fails on demand.

    fail  (method, pattern of the path) -> (status, how many times); a status of 0 breaks the connection off
    """

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    datasets: dict[str, bool] = field(default_factory=dict)  # name -> private
    objects: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    xet_bytes: int = 0
    log: list[str] = field(default_factory=list)
    fail: dict[tuple[str, str], list[int]] = field(default_factory=dict)


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """A hub that runs while the block does."""
    hub = StandIn()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Nothing: the test reads `log`."""

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        body = self._body()
        path = self.path.partition("?")[0]
        self.hub.log.append(f"{method} {path}")
        for (which, pattern), left in self.hub.fail.items():
            if which == method and re.search(pattern, path) and left[1] > 0:
                left[1] -= 1
                if left[0] == 0:
                    self.close_connection = True
                    self.connection.close()
                    return
                return self._send({"error": "as the test wanted"}, left[0])
        if path.startswith("/lfs/"):
            return self._object(path.removeprefix("/lfs/"), body)
        if path.startswith("/v"):
            return self._xet(path, len(body))
        if self._who() is None and (method != "GET" or "/datasets/" not in path):
            return self._send({"error": "Invalid credentials in Authorization header"}, 401)
        if path == "/api/whoami-v2":
            return self._send({"type": "user", "name": OWNER, "auth": {"accessToken": {"role": "write"}}})
        if path.endswith("/xet-write-token/main"):
            given = {"X_Xet_Cas_Url": self.hub.url, "X_Xet_Access_Token": "x", "X_Xet_Token_Expiration": "9000000000"}
            return self._send({"accessToken": "x", "exp": 9000000000, "casUrl": self.hub.url}, **given)
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
            return self._send({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)", path):
            return self._info(found[1], found[2])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/main", path):
            return self._preupload(self.hub.repos[found[1]], json.loads(body))
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._batch(json.loads(body))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            return self._commit(found[1], body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/main/(.+)", path):
            return self._file(self.hub.repos[found[1]], found[2])
        return self._send({"error": f"the stand-in doesn't know {method} {path}"}, 501)

    def _body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _who(self) -> str | None:
        return OWNER if self.headers.get("Authorization") == f"Bearer {TOKEN}" else None

    def _send(self, content: object, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization'] or OWNER}/{asked['name']}"
        if not name.startswith(f"{OWNER}/"):
            return self._send({"error": "You don't have the rights to create a model under this namespace"}, 403)
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repos:
            return self._send({"error": "You already created this model repo", "url": url}, 409)
        self.hub.repos[name] = Repo(asked.get("visibility") == "private" or asked.get("private") is True)
        return self._send({"url": url, "name": name, "id": name})

    def _info(self, kind: str, name: str) -> None:
        if kind == "datasets":
            hidden = self.hub.datasets.get(name, True)
        elif name in self.hub.repos:
            hidden = False
        else:
            hidden = True
        if hidden:
            return self._send({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        private = kind == "models" and self.hub.repos[name].private
        return self._send({"id": name, "private": private, "sha": "0" * 40, "tags": [], "siblings": []})

    def _preupload(self, repo: Repo, asked: dict[str, Any]) -> None:
        files = []
        for one in asked["files"]:
            large = one["path"].endswith((".safetensors", ".gguf", "tokenizer.json"))
            files.append({"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
        self._send({"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}
            objects.append(entry)
        self._send({"transfer": "basic", "objects": objects})

    def _object(self, oid: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.objects[oid] = body
        self.hub.uploads.append(oid)
        self._send(b"")

    def _xet(self, path: str, size: int) -> None:
        if "/xorbs/" in path:
            self.hub.xet_bytes += size
            return self._send({"was_inserted": True})
        if "/shards" in path:
            return self._send(b'{"type": "result", "result": 1}\n')
        return self._send({}, 404)

    def _commit(self, name: str, body: bytes) -> None:
        repo = self.hub.repos[name]
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repo.commits.append(value["summary"])
            elif line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                known = self.hub.objects
                if value["oid"] not in known and not self.hub.xet_bytes:
                    return self._send({"error": f"{value['path']} was never uploaded"}, 400)
                repo.files[value["path"]] = known.get(value["oid"], f"sha256:{value['oid']}".encode())
            else:
                return self._send({"error": f"the stand-in doesn't know {line['key']}"}, 501)
        return self._send({"success": True, "commitOid": "1" * 40, "commitUrl": f"{self.hub.url}/{name}/commit/1"})

    def _file(self, repo: Repo, name: str) -> None:
        if name not in repo.files:
            return self._send({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        etag = hashlib.sha1(repo.files[name]).hexdigest()
        return self._send(repo.files[name], ETag=f'"{etag}"', X_Repo_Commit="1" * 40)
