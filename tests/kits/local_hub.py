"""A small Hub on this machine: what huggingface_hub 2.4 asks for when it creates a repo, commits and lists files.

Repos are kept in memory. A `Fault` makes requests fail in ways that a test chooses.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LFS = (".safetensors", ".bin", ".pt", ".pth", ".mp4")
REPO = r"/api/models/(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Commit:
    message: str
    deleted: list[str]
    lfs: list[str]
    files: dict[str, bytes]  # all of the branch, after it


@dataclass
class Repo:
    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit("initial commit", [], [], {})]})

    @property
    def commits(self):
        return self.branches["main"][1:]

    @property
    def files(self):
        return self.branches["main"][-1].files

    def messages(self):
        return [commit.message for commit in self.commits]


@dataclass
class Fault:
    """What happens to requests whose `METHOD /path` matches the expression `where`, `times` times.

    `what`: an HTTP status; "drop", the connection is closed without an answer; "hang", there is none; or a function
    that is called before the request is answered as usual.
    """

    where: str
    what: int | str | Callable[[], None]
    times: int = 1000

    def applies(self, request):
        applies = self.times > 0 and re.search(self.where, request)
        self.times -= bool(applies)
        return applies


class LocalHub(ThreadingHTTPServer):
    """`with LocalHub() as hub`: it answers at `hub.url`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos = {}  # name -> Repo
        self.tokens = {}  # token -> (user, what it may do: "read", "write")
        self.faults, self.requests = [], []  # of type `Fault`; `METHOD /path` of all that came
        self.blobs = {}  # sha256 -> bytes
        self.over = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def __exit__(self, *_):
        self.over.set()
        self.shutdown()
        self.server_close()

    def answer(self, method, path, body, user, rights):
        """(status, JSON, headers) of a request that no fault applies to."""
        if method == "PUT" and path.startswith("/storage/"):  # as S3: the address is the permission
            oid = path.removeprefix("/storage/")
            if hashlib.sha256(body).hexdigest() != oid:
                return 400, {}, {}
            self.blobs[oid] = body
            return 200, {}, {}
        if user is None:
            return 401, {"error": "Invalid username or password."}, {}
        for pattern, route in ROUTES:
            if match := re.fullmatch(pattern, f"{method} {path}"):
                groups = {key: unquote(value) for key, value in match.groupdict().items()}
                if "repo" in groups and groups["repo"] not in self.repos:
                    return 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
                if route is LocalHub.info and groups.get("rev", "main") not in self.repos[groups["repo"]].branches:
                    return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
                status, content = route(self, body=body, user=user, rights=rights, **groups)
                return status, content, {}
        return 404, {"error": f"no such address: {method} {path}"}, {}

    def create(self, body, user, rights):
        request = json.loads(body)
        name = f"{request.get('organization') or user}/{request['name']}"
        answer = {"url": f"{self.url}/{name}", "name": name}
        if name in self.repos:
            return 409, answer | {"error": "You already created this model repo"}
        if "write" not in rights or not name.startswith(f"{user}/"):
            return 403, {"error": f"You may not create {name}"}
        self.repos[name] = Repo(private=request.get("visibility") == "private")
        return 200, answer

    def info(self, repo, rev="main", **_):
        branch = self.repos[repo].branches[rev]
        sha = hashlib.sha1(f"{repo}{len(branch)}".encode()).hexdigest()
        files = [{"rfilename": path} for path in branch[-1].files]
        return 200, {"id": repo, "sha": sha, "private": self.repos[repo].private, "siblings": files}

    def may_write(self, repo, user, rights, **_):
        allowed = repo.startswith(f"{user}/") and "write" in rights
        return (200, {}) if allowed else (403, {"error": f"You may not write to {repo}"})

    def branch(self, repo, rev, **_):
        branches = self.repos[repo].branches
        branches[rev] = list(branches["main"])
        return 200, {}

    def tree(self, repo, rev, **_):
        files = self.repos[repo].branches[rev][-1].files.items()
        return 200, [{"type": "file", "path": path, "size": len(content), "oid": path} for path, content in files]

    def validate(self, body, **_):
        data = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        values = {key: data.get(key) or [] for key in ("base_model", "datasets")}  # the Hub takes no local paths
        errors = [
            {"message": f'"{key}" with value "{value}" is not valid.'}
            for key, named in values.items()
            for value in ([named] if isinstance(named, str) else named)
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value)
        ]
        return (400 if errors else 200), {"errors": errors, "warnings": []}

    def preupload(self, body, **_):
        paths = [file["path"] for file in json.loads(body)["files"]]
        modes = {path: "lfs" if path.endswith(LFS) else "regular" for path in paths}
        return 200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}

    def batch(self, body, **_):
        objects = []
        for item in json.loads(body)["objects"]:
            objects.append({"oid": item["oid"], "size": item["size"]})
            if item["oid"] not in self.blobs:
                objects[-1]["actions"] = {"upload": {"href": f"{self.url}/storage/{item['oid']}"}}
        return 200, {"transfer": "basic", "objects": objects}

    def commit(self, repo, rev, body, **rest):
        if self.may_write(repo, **rest)[0] != 200:
            return 403, {"error": "You may not write"}
        branch = self.repos[repo].branches[rev]
        commit = Commit("", [], [], dict(branch[-1].files))
        for line in body.decode().splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                commit.message = value["summary"]
            elif key == "file":
                commit.files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                commit.files[value["path"]] = self.blobs[value["oid"]]
                commit.lfs.append(value["path"])
            else:
                assert key == "deletedFile", key
                del commit.files[value["path"]]
                commit.deleted.append(value["path"])
        branch.append(commit)
        oid = hashlib.sha1(body).hexdigest()
        return 200, {"commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}", "hookOutput": ""}


ROUTES = [
    (r"POST /api/repos/create", LocalHub.create),
    (r"POST /api/validate-yaml", LocalHub.validate),
    (rf"GET {REPO}", LocalHub.info),
    (rf"GET {REPO}/revision/(?P<rev>[^/]+)", LocalHub.info),
    (rf"GET {REPO}/auth-check/write", LocalHub.may_write),
    (rf"POST {REPO}/branch/(?P<rev>[^/]+)", LocalHub.branch),
    (rf"GET {REPO}/tree/(?P<rev>[^/]+)", LocalHub.tree),
    (rf"POST {REPO}/preupload/(?P<rev>[^/]+)", LocalHub.preupload),
    (rf"POST {REPO}/commit/(?P<rev>[^/]+)", LocalHub.commit),
    (r"POST /(?P<repo>[\w.-]+/[\w.-]+)\.git/info/lfs/objects/batch", LocalHub.batch),
]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do(self):
        hub, path, body = self.server, urlsplit(self.path).path, self._body()
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        request = f"{self.command} {path}"
        hub.requests.append(request)
        fault = next((fault.what for fault in hub.faults if fault.applies(request)), None)
        if fault in ("drop", "hang"):
            if fault == "hang":
                hub.over.wait(60)
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        if isinstance(fault, int):  # it repeats the token, as careless servers do
            return self._send(fault, {"error": f"no luck with {token}"}, {})
        if fault:
            fault()
        self._send(*hub.answer(self.command, path, body, *hub.tokens.get(token, (None, ()))))

    do_GET = do_POST = do_PUT = do_HEAD = do

    def _body(self):
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status, content, headers):
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args):
        pass
