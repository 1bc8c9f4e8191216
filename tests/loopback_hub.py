"""A Hub on 127.0.0.1 for tests: what the real `huggingface_hub` client needs, and faults on demand.

Not collected by pytest; `tests/conftest.py` loads it by its path. It keeps everything in memory,
listens on a free port and stops with the `with` block (and at the latest with the process, its
threads being daemons). Weights go through Git LFS; Xet is not spoken, so clients must be started
with HF_HUB_DISABLE_XET=1.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import sys
import threading
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep  # bound here: tests replace `time.sleep` for the client

LFS_SUFFIXES = (".safetensors", ".png", ".bin")


@dataclass
class Fault:
    """What happens to the next `times` requests that match.

    `status` answers with an error; `cut` closes the connection "before" the request is acted upon,
    "after" it, or in the middle of its answer ("midway"); `delay` waits that many seconds first.
    """

    path: str
    method: str = ".*"
    status: int | None = None
    cut: str | None = None
    delay: float = 0.0
    headers: dict = field(default_factory=dict)
    times: int = 1


@dataclass
class Repo:
    """Branches point at commits, a commit maps paths to contents."""

    private: bool = False
    branches: dict = field(default_factory=dict)
    commits: dict = field(default_factory=dict)
    messages: list = field(default_factory=list)

    def commit(self, branch, files, message):
        number = len(self.commits)
        sha = hashlib.sha1(f"{branch} {number}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def files(self, revision="main"):
        return self.commits.get(self.branches.get(revision, revision))


class Hub:
    """The state of the server, and what tests ask it."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, tuple] = {}  # token -> (user, may write)
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple] = []  # (method, path, authorization, status)
        self.private_by_default = False  # an organisation may be set up so
        self.lock = threading.RLock()

    def add_repo(self, repo_id, files=None, private=False):
        """Put a repository there without a client."""
        repo = self.repos[repo_id] = Repo(private=private)
        repo.commit("main", {".gitattributes": b""}, "initial commit")
        if files:
            repo.commit("main", files, "files")
        return repo

    def take_fault(self, method, path):
        with self.lock:
            for fault in self.faults:
                if re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    if fault.times <= 0:
                        self.faults.remove(fault)
                    return fault
        return None

    def unknown(self):
        """Requests that this server does not understand: a test of the server itself."""
        return [r for r in self.requests if r[3] == 501]


class Refuse(Exception):
    """An answer other than success."""

    def __init__(self, status, message, code=None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def is_lfs(path):
    return path.endswith(LFS_SUFFIXES)


def oid_of(path, content):
    if is_lfs(path) and content:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


REPO = r"(?P<repo>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"


class Handler(BaseHTTPRequestHandler):
    """One connection; requests are told apart by method and path."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    routes = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", rf"/api/models/{REPO}", "info"),
        ("GET", rf"/api/models/{REPO}/revision/{REVISION}", "info"),
        ("GET", rf"/api/models/{REPO}/tree/{REVISION}(/.*)?", "tree"),
        ("GET", rf"/api/models/{REPO}/refs", "refs"),
        ("POST", rf"/api/models/{REPO}/branch/{REVISION}", "branch"),
        ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/{REVISION}", "commit"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("(GET|HEAD)", r"/cdn/(?P<oid>[0-9a-f]{64})", "cdn"),
        ("(GET|HEAD)", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", "resolve"),
    )

    # -- plumbing

    def log_message(self, *args):
        pass

    def do_GET(self):  # noqa: N802
        self.handle_request()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_request(self):
        path = self.path.partition("?")[0]
        body = self.read_body()
        fault = self.hub.take_fault(self.command, path)
        self.cut_midway = False
        if fault is not None:
            sleep(fault.delay)
            if fault.cut == "before":
                return self.cut(path, 0)
            if fault.status is not None:
                return self.answer(fault.status, b"fault on demand", fault.headers)
            self.cut_midway = fault.cut == "midway"
        try:
            status, content, headers = self.route(path, body)
        except Refuse as refusal:
            headers = {"X-Error-Message": refusal.message}
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            status, content = refusal.status, {"error": refusal.message}
        if fault is not None and fault.cut == "after":
            return self.cut(path, status)
        self.answer(status, content, headers)

    def read_body(self):
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def route(self, path, body):
        # a Space is kept as "spaces/USER/NAME"
        of_model = re.sub("^/(api/)?spaces/", lambda m: "/api/models/" if m[1] else "/", path)
        for method, pattern, name in self.routes:
            match = re.fullmatch(pattern, of_model)
            if match and re.fullmatch(method, self.command):
                parts = {k: urllib.parse.unquote(v or "") for k, v in match.groupdict().items()}
                if of_model != path:
                    parts["repo"] = f"spaces/{parts['repo']}"
                with self.hub.lock:
                    return getattr(self, name)(body=body, **parts)
        raise Refuse(501, f"the loopback hub does not know {self.command} {path}")

    def note(self, path, status):
        self.hub.requests.append((self.command, path, self.headers.get("Authorization"), status))

    def cut(self, path, status):
        self.note(path, status)
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def answer(self, status, content, headers=None):
        self.note(self.path.partition("?")[0], status)
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json", **(headers or {})}
        headers = {"Content-Length": str(len(content)), **(headers or {})}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.cut_midway:
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.wfile.write(content)

    # -- who may do what

    @property
    def base(self):
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def user(self):
        """(name, may write) of the token, or None without one."""
        sent = self.headers.get("Authorization", "")
        if not sent:
            return None
        token = sent.removeprefix("Bearer ")
        if token not in self.hub.tokens:
            raise Refuse(401, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repo(self, repo_id, write=False):
        user = self.user()
        repo = self.hub.repos.get(repo_id)
        owner = user is not None and user[0] == repo_id.split("/")[-2]
        if repo is None or (repo.private and not owner):
            raise Refuse(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and user is None:
            raise Refuse(401, "Unauthorized")
        if write and not (owner and user[1]):
            raise Refuse(403, "you have no write access to this repository")
        return repo

    def files_of(self, repo, revision):
        files = repo.files(revision)
        if files is None:
            raise Refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo.branches.get(revision, revision), files

    # -- the API

    def whoami(self, body):
        user = self.user()
        if user is None:
            raise Refuse(401, "Unauthorized")
        return 200, {"type": "user", "name": user[0], "orgs": []}, {}

    def validate_yaml(self, body):
        errors = []
        if not json.loads(body)["content"].startswith("---\n"):
            errors.append({"message": "empty or missing yaml metadata in repo card"})
        return (400 if errors else 200), {"errors": errors, "warnings": []}, {}

    def create(self, body):
        asked, user = json.loads(body), self.user()
        if user is None:
            raise Refuse(401, "Unauthorized")
        namespace = asked.get("organization") or user[0]
        repo_id = f"{namespace}/{asked['name']}"
        if asked.get("type") == "space":
            if asked.get("sdk") != "gradio":
                raise Refuse(400, "sdk is required for a Space")
            repo_id = f"spaces/{repo_id}"
        if namespace != user[0] or not user[1]:
            raise Refuse(403, f"you have no right to create a repository under {namespace}")
        url = {"url": f"{self.base}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repos:
            return 409, {**url, "error": "You already created this model repo"}, {}
        default = "private" if self.hub.private_by_default else "public"
        if "private" in asked:  # older clients
            default = "private" if asked["private"] else "public"
        self.hub.add_repo(repo_id, private=asked.get("visibility", default) == "private")
        return 200, url, {}

    def info(self, body, repo, revision="main"):
        found = self.repo(repo)
        sha, files = self.files_of(found, revision)
        facts = {"_id": repo, "id": repo, "modelId": repo, "author": repo.partition("/")[0]}
        facts |= {"sha": sha, "private": found.private, "disabled": False, "gated": False}
        facts |= {"downloads": 0, "likes": 0, "tags": []}
        facts["siblings"] = [{"rfilename": path} for path in sorted(files)]
        return 200, facts, {}

    def tree(self, body, repo, revision):
        _, files = self.files_of(self.repo(repo), revision)
        entries = []
        for path, content in sorted(files.items()):
            entry = {"type": "file", "path": path, "size": len(content)}
            entry["oid"] = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            if is_lfs(path):
                oid = oid_of(path, content)
                entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 127}
            entries.append(entry)
        return 200, entries, {}

    def refs(self, body, repo):
        branches = self.repo(repo).branches.items()
        heads = [{"name": b, "ref": f"refs/heads/{b}", "targetCommit": s} for b, s in branches]
        return 200, {"branches": heads, "converts": [], "tags": [], "pullRequests": []}, {}

    def branch(self, body, repo, revision):
        found = self.repo(repo, write=True)
        if revision in found.branches:
            raise Refuse(409, "Reference already exists")
        found.branches[revision] = found.branches["main"]
        return 200, {}, {}

    def preupload(self, body, repo, revision):
        _, files = self.files_of(self.repo(repo, write=True), revision)
        answers = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            answer = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular"}
            answer["shouldIgnore"] = False
            if path in files:
                answer["oid"] = oid_of(path, files[path])
            answers.append(answer)
        return 200, {"files": answers}, {}

    def lfs_batch(self, body, repo):
        self.repo(repo, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            if wanted["oid"] not in self.hub.blobs:
                wanted["actions"] = {"upload": {"href": f"{self.base}/lfs/{wanted['oid']}"}}
            objects.append(wanted)
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_put(self, body, oid):
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refuse(400, "the content does not match its hash")
        self.hub.blobs[oid] = body
        return 200, b"", {}

    def commit(self, body, repo, revision):
        found = self.repo(repo, write=True)
        _, files = self.files_of(found, revision)
        files, message = dict(files), ""
        for line in body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                message = value["summary"]
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    raise Refuse(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refuse(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refuse(400, f"unknown operation {key}")
        sha = found.commit(revision, files, message)
        url = f"{self.base}/{repo}/commit/{sha}"
        return 200, {"success": True, "commitOid": sha, "commitUrl": url}, {}

    def resolve(self, body, repo, revision, path):
        sha, files = self.files_of(self.repo(repo), revision)
        if path not in files:
            raise Refuse(404, "Entry not found", "EntryNotFound")
        content, oid = files[path], oid_of(path, files[path])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
        if is_lfs(path):  # another host, where the token must not be sent
            self.hub.blobs[oid] = content
            headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{oid}"'}
            headers["Location"] = f"http://localhost:{self.server.server_address[1]}/cdn/{oid}"
            return 302, b"", headers
        return self.ranged(content, headers)

    def cdn(self, body, oid):
        return self.ranged(self.hub.blobs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})

    def ranged(self, content, headers):
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            return 200, content, headers
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        if first >= len(content):
            raise Refuse(416, "Requested range not satisfiable")
        headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        return 206, content[first : last + 1], headers


class Server(ThreadingHTTPServer):
    """One thread for each connection; a client that has gone away is no news."""

    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def running():
    """Yield a running `Hub`; `hub.url` is its endpoint."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)
